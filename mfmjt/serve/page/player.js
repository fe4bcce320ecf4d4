// One video and several sounds for it: the sound that is heard leads, the pictures follow.

const DRIFT = 0.1; // seconds that pictures may be off before they are put right

export class Player {
  constructor(video, changed) {
    this.video = video;
    this.changed = changed;
    this.sounds = [];
    this.current = 0;
    this.loop = false;
  }

  load(videoUrl, soundUrls) {
    this.close();
    this.current = 0;
    this.sounds = soundUrls.map((url) => {
      const sound = new Audio(url);
      sound.preload = "auto";
      sound.addEventListener("ended", () => this.#ended(sound));
      return sound;
    });
    if (videoUrl) this.video.src = videoUrl;
    this.#tick();
  }

  close() {
    this.pause();
    cancelAnimationFrame(this.frame);
    for (const sound of this.sounds) sound.removeAttribute("src");
    this.sounds = [];
    this.video.removeAttribute("src");
    this.video.load();
  }

  get heard() {
    return this.sounds[this.current];
  }

  get playing() {
    return Boolean(this.heard && !this.heard.paused);
  }

  get time() {
    return this.heard?.currentTime ?? 0;
  }

  // Another sound goes on where this one is.
  async choose(number, play = this.playing) {
    const before = this.heard;
    const time = this.time;
    this.current = number;
    if (before && before !== this.heard) before.pause();
    this.heard.currentTime = time;
    if (play) await this.play();
    this.changed();
  }

  async play() {
    if (!this.heard) return;
    if (this.heard.ended || this.heard.currentTime >= this.heard.duration - 0.01) this.seek(0);
    await this.heard.play();
    if (this.video.src) this.video.play().catch(() => {}); // one it cannot show stays still
    this.changed();
  }

  pause() {
    for (const sound of this.sounds) sound.pause();
    this.video.pause();
    this.changed();
  }

  seek(time) {
    if (!this.heard) return;
    this.heard.currentTime = Math.max(0, time);
    if (this.video.src) this.video.currentTime = Math.max(0, time);
    this.changed();
  }

  #ended(sound) {
    if (sound !== this.heard) return;
    if (this.loop) {
      this.seek(0);
      this.play();
    } else {
      this.pause();
    }
  }

  #tick() {
    if (this.playing && this.video.readyState > 1 && !this.video.seeking) {
      const off = this.video.currentTime - this.time;
      if (Math.abs(off) > DRIFT && this.time < this.video.duration) this.video.currentTime = this.time;
    }
    this.changed(true);
    this.frame = requestAnimationFrame(() => this.#tick());
  }
}
