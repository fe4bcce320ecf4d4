// A video from the camera, without sound: sound is what is made here.

const KINDS = ["video/mp4", "video/webm;codecs=vp9", "video/webm"];

export class Recorder {
  async start(finder, limit, ticked) {
    if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) {
      throw new Error("This browser gives no camera to this page. Open it on localhost or over https.");
    }
    this.stream = await navigator.mediaDevices.getUserMedia({
      video: { width: { ideal: 960 }, facingMode: "environment" },
    });
    finder.srcObject = this.stream;
    const mimeType = KINDS.find((kind) => MediaRecorder.isTypeSupported(kind));
    this.recorder = new MediaRecorder(this.stream, { mimeType });
    const parts = [];
    this.recorder.ondataavailable = (event) => parts.push(event.data);
    this.ended = new Promise((resolve) => {
      this.recorder.onstop = () => {
        this.close();
        resolve(new Blob(parts, { type: this.recorder.mimeType.split(";")[0] }));
      };
    });
    const began = performance.now();
    this.recorder.start();
    this.timer = setInterval(() => {
      const seconds = (performance.now() - began) / 1000;
      ticked(seconds);
      if (seconds >= limit) this.stop();
    }, 100);
    return this.ended;
  }

  stop() {
    if (this.recorder?.state === "recording") this.recorder.stop();
  }

  close() {
    clearInterval(this.timer);
    this.stream?.getTracks().forEach((track) => track.stop());
  }
}
