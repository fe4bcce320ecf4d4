// The server, as functions. Nothing here touches the page.

const ROOT = new URL("..", import.meta.url); // wherever a proxy put it
const KEY = `mfmjt-token ${ROOT.pathname}`;
let token = sessionStorage.getItem(KEY) ?? "";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useToken(value) {
  token = value;
  sessionStorage.setItem(KEY, value);
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(new URL(path, ROOT), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. See whether it still runs.", 0);
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    const large = "What stands before the server takes no upload of this size. Raise its limit (nginx: client_max_body_size).";
    throw new Refused(said.detail ?? (answer.status === 413 ? large : `The server answered ${answer.status}.`), answer.status);
  }
  return answer;
}

export const model = async () => (await (await request("v1/models")).json()).models[0];

export async function generate(video, asked, signal) {
  const given = Object.entries(asked).filter(([, value]) => value !== null);
  if (!video) {
    const body = JSON.stringify(Object.fromEntries(given));
    const headers = { "Content-Type": "application/json" };
    return (await request("v1/generate", { method: "POST", headers, body, signal })).json();
  }
  const form = new FormData();
  for (const [name, value] of given) {
    for (const one of [value].flat()) form.append(name, one);
  }
  form.append("video", video, "video");
  return (await request("v1/generate", { method: "POST", body: form, signal })).json();
}

// Calls back with each state of a job until it is over, and returns the last one.
export async function follow(job, told, signal) {
  const answer = await request(`v1/jobs/${job.id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let state = job;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (data) told((state = JSON.parse(data.slice(6))));
    }
  }
  if (!["done", "failed", "cancelled"].includes(state.status)) {
    throw new Refused("The server ended before the sound was made.", 0);
  }
  return state;
}

const file = (job, number, kind) => request(`v1/jobs/${job.id}/sounds/${number}.${kind}`);
export const sound = async (job, number) => (await file(job, number, "wav")).blob();
export const drawing = async (job, number) => (await file(job, number, "json")).json();
export const muxed = async (job, number, kind) => (await file(job, number, kind)).blob();
export const state = async (job) => (await request(`v1/jobs/${job.id}`)).json();
export const example = async (name) => (await request(`examples/${name}.mp4`)).blob();
export const forget = (job) => request(`v1/jobs/${job.id}`, { method: "DELETE" }).catch(() => {});
