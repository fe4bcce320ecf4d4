// Waveform and spectrogram on canvases, in the colours of the page.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function sized(canvas) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  return { context, width: canvas.width, height: canvas.height, ratio };
}

export function wave(canvas, drawn, onsets = true) {
  const { context, width, height, ratio } = sized(canvas);
  const [low, high] = drawn.peaks;
  const loudest = Math.max(0.02, ...high, ...low.map((value) => -value));
  const scale = (0.47 * height) / loudest;
  context.fillStyle = colour("--wave");
  const step = width / low.length;
  for (let x = 0; x < width; x += ratio) {
    const first = Math.floor(x / step);
    const last = Math.max(first + 1, Math.ceil((x + ratio) / step));
    const top = Math.max(...high.slice(first, last));
    const bottom = Math.min(...low.slice(first, last));
    const thick = Math.max(ratio, (top - bottom) * scale);
    context.fillRect(x, height / 2 - top * scale, ratio * 0.8, thick);
  }
  if (onsets) marks(context, drawn, width, height, ratio);
}

function marks(context, drawn, width, height, ratio) {
  context.fillStyle = colour("--onset");
  for (const time of drawn.onsets) {
    const x = (time / drawn.duration) * width;
    context.globalAlpha = 0.55;
    context.fillRect(x - ratio / 2, 0, ratio, height);
    context.globalAlpha = 1;
    context.beginPath();
    context.moveTo(x - 4 * ratio, 0);
    context.lineTo(x + 4 * ratio, 0);
    context.lineTo(x, 6 * ratio);
    context.fill();
  }
}

const rgb = (name) => {
  const text = colour(name).replace("#", "");
  return [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16));
};

function ramp() {
  const stops = [rgb("--cold"), rgb("--warm"), rgb("--hot")];
  return Array.from({ length: 256 }, (_, level) => {
    const place = (level / 255) * 2;
    const from = Math.min(1, Math.floor(place));
    const part = place - from;
    return stops[from].map((value, i) => value + part * (stops[from + 1][i] - value));
  });
}

export function spectrum(canvas, drawn) {
  const { context, width, height, ratio } = sized(canvas);
  const { columns, bands } = drawn;
  const bytes = Uint8Array.from(atob(drawn.spectrogram), (c) => c.charCodeAt(0));
  const image = new ImageData(columns, bands);
  const colours = ramp();
  for (let x = 0; x < columns; x++) {
    for (let y = 0; y < bands; y++) {
      const [r, g, b] = colours[bytes[x * bands + y]];
      image.data.set([r, g, b, 255], 4 * ((bands - 1 - y) * columns + x));
    }
  }
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, bands];
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, width, height);
  scale(context, drawn, width, height, ratio);
}

function scale(context, drawn, width, height, ratio) {
  context.font = `${10.5 * ratio}px system-ui, sans-serif`;
  context.textBaseline = "bottom";
  for (const hertz of [100, 1000, 4000, 10000]) {
    if (hertz >= drawn.high) continue;
    const part = Math.log(hertz / drawn.low) / Math.log(drawn.high / drawn.low);
    const text = hertz < 1000 ? `${hertz} Hz` : `${hertz / 1000} kHz`;
    const y = height * (1 - part);
    context.globalAlpha = 0.25;
    context.fillStyle = colour("--soft");
    context.fillRect(0, y, width, ratio);
    context.globalAlpha = 0.8;
    context.fillStyle = colour("--card");
    context.fillRect(4 * ratio, y - 14 * ratio, context.measureText(text).width + 6 * ratio, 13 * ratio);
    context.globalAlpha = 1;
    context.fillStyle = colour("--soft");
    context.fillText(text, 7 * ratio, y - 1 * ratio);
  }
}
