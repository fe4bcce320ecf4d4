import * as api from "./api.js";
import { Blind } from "./blind.js";
import * as draw from "./draw.js";
import { Player } from "./player.js";
import { Recorder } from "./record.js";

const $ = (id) => document.getElementById(id);
const STAGES = {
  receive: "Sending", video: "Reading the video", wait: "Waiting", read: "Taking the pictures",
  encode: "Looking and reading", generate: "Making the sound", decode: "Decoding the sound", write: "Writing",
};
const HUES = { receive: 210, video: 190, wait: 60, read: 168, encode: 150, generate: 25, decode: 340, write: 280 };
const CONTAINERS = { mp4: "MP4", webm: "WebM", mov: "MOV", mkv: "MKV" };
const MODES = { cfg_scaled: "Scaled guidance", cfg: "Plain guidance", none: "No guidance" };

let limits = null;
let video = null; // the Blob that was chosen
let running = null; // AbortController of the request in progress
let shown = null; // { job, drawings, urls } of the result on the page
let blind = null;
const recorder = new Recorder();
const player = new Player($("picture"), (tick) => showPlayer(tick));

// --- what is asked --------------------------------------------------------------------------

function choose(blob, name) {
  if (limits && blob.size > limits.max_upload) {
    fail(`The video has ${(blob.size / 2 ** 20).toFixed(0)} MB: at most ${limits.max_upload / 2 ** 20} MB are taken.`);
    return;
  }
  clear();
  video = blob;
  const preview = $("preview");
  preview.src = URL.createObjectURL(blob);
  preview.play().catch(() => {});
  $("name").textContent = name;
  $("empty").hidden = true;
  $("chosen").hidden = false;
  fail(null);
}

function clear() {
  video = null;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").removeAttribute("src");
  $("chosen").hidden = $("camera").hidden = true;
  $("empty").hidden = false;
  $("file").value = "";
}

async function record() {
  fail(null);
  try {
    $("empty").hidden = true;
    $("camera").hidden = false;
    const blob = await recorder.start($("finder"), limits.max_duration, (seconds) => {
      $("elapsed").textContent = `${seconds.toFixed(1)} s`;
    });
    if (!$("camera").hidden) choose(blob, "Recording");
  } catch (error) {
    recorder.close();
    clear();
    fail(error.name === "NotAllowedError" ? "The camera was not allowed." : `No recording: ${error.message}`);
  }
}

const number = (id) => ($(id).value === "" ? null : Number($(id).value));

function asked() {
  const modes = [...document.querySelectorAll("[name=mode]:checked")].map((box) => box.value);
  return {
    prompt: $("prompt").value.trim() || null,
    negative_prompt: $("negative").value.trim() || null,
    steps: number("steps"),
    guidance: number("guidance"),
    guidance_mode: modes.length ? modes : null,
    seed: number("seed") ?? 0,
    count: number("count") ?? 1,
    duration: number("duration"),
  };
}

// --- making it ------------------------------------------------------------------------------

async function make() {
  const request = asked();
  if (!video && !request.prompt) {
    fail("Drop a video, or say in the prompt what is to be heard.");
    $("prompt").focus();
    return;
  }
  running?.abort();
  const mine = (running = new AbortController());
  fail(null);
  busy(true);
  player.pause();
  if (matchMedia("(max-width: 820px)").matches) $("stage").scrollIntoView();
  progress(video ? "Sending and reading the video" : "Sending", null);
  try {
    const began = performance.now();
    const source = video;
    let job = await api.generate(source, request, mine.signal);
    job = await api.follow(job, tell, mine.signal);
    if (job.status !== "done") throw new api.Refused(job.error, 0);
    const numbers = job.sounds.map((sound) => sound.number);
    const [drawings, blobs] = await Promise.all([
      Promise.all(numbers.map((n) => api.drawing(job, n))),
      Promise.all(numbers.map((n) => api.sound(job, n))),
    ]);
    if (mine.signal.aborted) return;
    show(job, drawings, blobs, source);
    document.body.dataset.seconds = ((performance.now() - began) / 1000).toFixed(3);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message, error.status);
  } finally {
    if (running === mine) {
      running = null;
      busy(false);
    }
  }
}

function tell(job) {
  if (job.status === "queued") progress(job.ahead ? `Waiting behind ${job.ahead}` : "Waiting", null);
  else if (job.status === "running") progress(STAGES[job.stage] ?? job.stage, job.progress);
}

function progress(text, part) {
  if ($("doing").textContent !== text) $("doing").textContent = text;
  if (part === null) $("bar").removeAttribute("value");
  else $("bar").value = part;
}

function busy(is) {
  $("working").hidden = !is;
  $("cancel").hidden = !is;
  $("go").disabled = is;
  $("idle").hidden = is || shown !== null;
}

function fail(message, status) {
  $("error").hidden = message === null;
  $("error").textContent = message ?? "";
  if (status === 401) $("secret").showModal();
}

// --- what was made --------------------------------------------------------------------------

function show(job, drawings, blobs, source) {
  if (shown) {
    shown.urls.forEach((url) => URL.revokeObjectURL(url));
    api.forget(shown.job);
  }
  const urls = blobs.map((blob) => URL.createObjectURL(blob));
  const pictures = source && URL.createObjectURL(source);
  shown = { job, drawings, urls: pictures ? [...urls, pictures] : urls };
  blind = null;
  $("idle").hidden = true;
  $("result").hidden = false;
  $("picture").hidden = !pictures;
  films();
  player.load(pictures, urls);
  candidates();
  $("blind").hidden = job.sounds.length < 2;
  endBlind();
  notes(job);
  times(job);
  redraw();
  pick(0, false);
  $("play").focus({ preventScroll: true });
  $("stage").scrollIntoView({ block: "nearest" });
}

// What can hold the pictures, the best first.
function films() {
  $("films").replaceChildren(
    ...shown.job.containers.map((kind) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", id: kind, textContent: CONTAINERS[kind] });
      button.addEventListener("click", () => download(kind));
      return button;
    }),
  );
}

function allowDownloads(are) {
  for (const button of document.querySelectorAll("#wav, #films button")) button.disabled = !are;
}

const title = (sound) => `${MODES[sound.guidance_mode]}, seed ${sound.seed}`;

function candidates() {
  const many = shown.job.sounds.length > 1;
  $("candidates").replaceChildren(
    ...(many ? shown.job.sounds : []).map((sound, place) => {
      const card = document.createElement("button");
      card.type = "button";
      card.setAttribute("role", "radio");
      card.innerHTML = "<canvas></canvas><b><i></i><span></span></b><small></small>";
      card.querySelector("i").textContent = place + 1;
      card.querySelector("span").textContent = `Seed ${sound.seed}`;
      card.querySelector("small").textContent = `${MODES[sound.guidance_mode]} · ${sound.onsets} onsets`;
      card.setAttribute("aria-label", `Candidate ${place + 1}: ${title(sound)}, ${sound.onsets} onsets`);
      card.addEventListener("click", () => pick(place, true));
      return card;
    }),
  );
}

function pick(place, play = player.playing) {
  player.choose(place, play);
  for (const [i, card] of [...$("candidates").children].entries()) {
    card.setAttribute("aria-checked", String(i === place));
    card.tabIndex = i === place ? 0 : -1;
  }
  drawCurrent();
}

function drawCurrent() {
  const drawn = shown.drawings[player.current];
  // While two are compared blindly, a picture would tell them apart.
  $("timeline").classList.toggle("veiled", blind !== null);
  const neutral = { ...drawn, peaks: [[-0.001], [0.001]], onsets: [], columns: 1, bands: 1, spectrogram: btoa("\0") };
  draw.wave($("wave"), blind ? neutral : drawn);
  draw.spectrum($("spectrum"), blind ? neutral : drawn);
  const sound = shown.job.sounds[player.current];
  $("legend").textContent = blind
    ? "Hidden while you compare."
    : `${drawn.onsets.length} onsets detected · ${title(sound)} · ${drawn.sample_rate / 1000} kHz`;
  $("timeline").setAttribute("aria-valuemax", drawn.duration.toFixed(2));
}

function redraw() {
  if (!shown) return;
  drawCurrent();
  for (const [i, card] of [...$("candidates").children].entries()) {
    draw.wave(card.querySelector("canvas"), shown.drawings[i], false);
  }
}

function notes(job) {
  $("notes").replaceChildren(
    ...job.notes.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
  );
}

function times(job) {
  const spent = Object.entries(job.timings).filter(([, seconds]) => seconds >= 0.005);
  const sum = spent.reduce((total, [, seconds]) => total + seconds, 0);
  const hue = (stage) => `hsl(${HUES[stage] ?? 0} 38% 56%)`;
  $("shares").replaceChildren(
    ...spent.map(([stage, seconds]) => {
      const bar = document.createElement("span");
      bar.style.flex = `${seconds} 0 0`;
      bar.style.background = hue(stage);
      return bar;
    }),
  );
  $("stages").replaceChildren(
    ...[...spent, ["", sum]].map(([stage, seconds]) => {
      const row = document.createElement("div");
      row.innerHTML = "<i></i><dt></dt><dd></dd>";
      row.querySelector("i").style.background = stage ? hue(stage) : "none";
      row.querySelector("dt").textContent = stage ? STAGES[stage] : "Together";
      row.querySelector("dd").textContent = `${seconds.toFixed(2)} s`;
      return row;
    }),
  );
}

function showPlayer(tick) {
  if (!shown) return;
  const drawn = shown.drawings[player.current];
  const time = Math.min(player.time, drawn.duration);
  $("head").style.left = `${(100 * time) / drawn.duration}%`;
  const clock = `${time.toFixed(1)} / ${drawn.duration.toFixed(1)} s`;
  if ($("clock").textContent === clock && tick) return;
  $("clock").textContent = clock;
  $("timeline").setAttribute("aria-valuenow", time.toFixed(2));
  $("timeline").setAttribute("aria-valuetext", `${time.toFixed(1)} seconds`);
  $("play").toggleAttribute("data-playing", player.playing);
  $("play").setAttribute("aria-label", player.playing ? "Pause" : "Play");
}

async function download(kind) {
  const place = player.current;
  const { job } = shown;
  const sound = job.sounds[place];
  try {
    const blob = await (kind === "wav" ? api.sound(job, place) : api.muxed(job, place, kind));
    // What the file does not hold is said by now.
    if (kind !== "wav") api.state(job).then((now) => shown.job === job && notes(now), () => {});
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = blind ? `mfmjt.${kind}` : `mfmjt-${sound.guidance_mode}-${sound.seed}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    fail(error.message, error.status);
  }
}

// --- comparing without knowing --------------------------------------------------------------

function beginBlind() {
  blind = new Blind(shown.job.sounds.length);
  $("trial").hidden = false;
  $("candidates").classList.add("veiled");
  $("begin").hidden = $("ask-blind").hidden = true;
  allowDownloads(false);
  $("verdict").replaceChildren();
  round();
  $("hear-a").focus();
}

function round() {
  player.pause();
  player.seek(0);
  $("hear-a").setAttribute("aria-pressed", "false");
  $("hear-b").setAttribute("aria-pressed", "false");
  $("tally").textContent = `Pair ${blind.rounds + 1}`;
  pick(blind.pair[0], false);
}

function hear(which) {
  $("hear-a").setAttribute("aria-pressed", String(which === 0));
  $("hear-b").setAttribute("aria-pressed", String(which === 1));
  pick(blind.pair[which], true);
}

function endBlind() {
  const done = blind;
  blind = null;
  $("trial").hidden = true;
  $("candidates").classList.remove("veiled");
  $("begin").hidden = $("ask-blind").hidden = false;
  allowDownloads(true);
  $("verdict").replaceChildren();
  if (!done) return;
  const table = document.createElement("table");
  table.innerHTML = "<tr><th>Sound</th><th>Preferred</th><th>Compared</th></tr>";
  const order = done.wins.map((_, i) => i).sort((a, b) => done.wins[b] - done.wins[a]);
  for (const i of order) {
    const row = table.insertRow();
    for (const text of [title(shown.job.sounds[i]), done.wins[i], done.heard[i]]) row.insertCell().textContent = text;
  }
  $("verdict").append(table);
  redraw();
  $("begin").focus();
}

// --- wiring ---------------------------------------------------------------------------------

function theme(name) {
  document.documentElement.dataset.theme = name;
  redraw();
}

const system = matchMedia("(prefers-color-scheme: dark)");
theme(localStorage.getItem("mfmjt-theme") ?? (system.matches ? "dark" : "light"));
system.addEventListener("change", () => {
  if (!localStorage.getItem("mfmjt-theme")) theme(system.matches ? "dark" : "light");
});
$("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("mfmjt-theme", next);
  theme(next);
});

const drop = $("drop");
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    if (name === "drop" || event.relatedTarget === null) drop.classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  const file = event.dataTransfer?.files[0];
  if (!file) return;
  choose(file, file.name);
  if (video === file) make();
});
$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  if (file) choose(file, file.name);
});
for (const chip of document.querySelectorAll("[data-example]")) {
  chip.addEventListener("click", async () => {
    try {
      choose(await api.example(chip.dataset.example), chip.textContent);
      await make();
    } catch (error) {
      fail(error.message, error.status);
    }
  });
}
$("clear").addEventListener("click", () => {
  clear();
  $("file").focus();
});
$("record").addEventListener("click", record);
$("stop").addEventListener("click", () => recorder.stop());
$("discard").addEventListener("click", () => {
  clear();
  recorder.stop();
});
$("dice").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 1e6);
});
$("guidance").addEventListener("input", () => {
  $("strength").textContent = Number($("guidance").value).toFixed(1);
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
for (const id of ["prompt", "negative"]) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
}
$("cancel").addEventListener("click", () => running?.abort());
$("play").addEventListener("click", () => (player.playing ? player.pause() : player.play()));
$("loop").addEventListener("change", () => (player.loop = $("loop").checked));
$("wav").addEventListener("click", () => download("wav"));
$("begin").addEventListener("click", beginBlind);
$("reveal").addEventListener("click", endBlind);
$("hear-a").addEventListener("click", () => hear(0));
$("hear-b").addEventListener("click", () => hear(1));
for (const button of document.querySelectorAll("[data-vote]")) {
  button.addEventListener("click", () => {
    blind.vote(button.dataset.vote);
    round();
  });
}

const timeline = $("timeline");
const seekTo = (event) => {
  const { left, width } = timeline.getBoundingClientRect();
  player.seek(((event.clientX - left) / width) * shown.drawings[player.current].duration);
};
timeline.addEventListener("pointerdown", (event) => {
  timeline.setPointerCapture(event.pointerId);
  seekTo(event);
});
timeline.addEventListener("pointermove", (event) => {
  if (event.buttons) seekTo(event);
});
timeline.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: -0.5, ArrowRight: 0.5, ArrowDown: -0.5, ArrowUp: 0.5, PageDown: -2, PageUp: 2 };
  if (event.key in steps) player.seek(player.time + steps[event.key]);
  else if (event.key === "Home") player.seek(0);
  else if (event.key === "End") player.seek(shown.drawings[player.current].duration);
  else if (event.key === " ") player.playing ? player.pause() : player.play();
  else return;
  event.preventDefault();
});
$("candidates").addEventListener("keydown", (event) => {
  const way = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (!way) return;
  event.preventDefault();
  const cards = $("candidates").children;
  const next = (player.current + way + cards.length) % cards.length;
  pick(next, player.playing);
  cards[next].focus();
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
  const place = Number(event.key) - 1;
  if (shown && !blind && place >= 0 && place < shown.job.sounds.length) pick(place);
  if (event.key === "Escape") running?.abort();
});
new ResizeObserver(redraw).observe(timeline);

$("secret").addEventListener("cancel", (event) => event.preventDefault());
$("secret").addEventListener("close", () => {
  api.useToken($("token").value);
  start();
});
window.addEventListener("pagehide", () => running?.abort());

async function start() {
  try {
    limits = await api.model();
  } catch (error) {
    fail(error.message, error.status);
    return;
  }
  fail(null);
  $("model").textContent = `${limits.name} on ${limits.device}, up to ${limits.max_duration} s`;
  $("steps").value = limits.steps;
  $("steps").max = limits.max_steps;
  $("count").max = limits.max_count;
  $("duration").max = limits.max_duration;
  $("guidance").value = limits.guidance;
  $("strength").textContent = limits.guidance.toFixed(1);
  document.querySelector(`[name=mode][value=${limits.guidance_mode}]`).checked = true;
  document.body.dataset.ready = "yes";
}
start();
