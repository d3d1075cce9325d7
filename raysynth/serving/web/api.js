// The service as pages speak to it: a token, requests, events, and refusals in plain words.

import { ask as askDialog, make } from "./dom.js";

const TOKEN = "raysynth-token";

// A request that the service refused: `message` says why, `field` which part of it is to blame.
export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.detail || `the service answered ${status}`);
    this.status = status;
    this.field = problem.field ?? null;
  }
}

export const token = () => sessionStorage.getItem(TOKEN) ?? "";

export const keepToken = (text) => sessionStorage.setItem(TOKEN, text.trim());

export const forgetToken = () => sessionStorage.removeItem(TOKEN);

// What the fragment of the address says, as a map; a token in it is kept, and taken out of sight.
export function readFragment() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (parts.has("token")) {
    keepToken(parts.get("token"));
    parts.delete("token");
    writeFragment(parts);
  }
  return parts;
}

export function writeFragment(parts) {
  const text = new URLSearchParams(parts).toString();
  history.replaceState(null, "", location.pathname + (text && `#${text}`));
}

let asking = null;

// Asks for a token; whoever else needs one meanwhile waits for the same answer.
export function askToken(reason) {
  asking ??= showTokenDialog(reason).finally(() => (asking = null));
  return asking;
}

async function showTokenDialog(reason) {
  const field = make("input", { id: "token-field", type: "password", autocomplete: "off", required: true });
  const dialog = make(
    "dialog",
    { id: "token-dialog", "aria-labelledby": "token-title" },
    make(
      "form",
      { method: "dialog" },
      make("h2", { id: "token-title" }, "Your token"),
      make("p", {}, reason),
      make("label", { htmlFor: "token-field" }, "Token of this service"),
      field,
      make("p", { className: "hint" }, "It stays in this tab and is forgotten when the tab closes."),
      make("div", { className: "row end" }, make("button", { className: "primary", value: "take" }, "Use it")),
    ),
  );
  const answer = await askDialog(dialog);
  if (answer === "take" && field.value.trim()) keepToken(field.value);
  else throw new Refusal(401, { detail: "without a token the service shows nothing" });
}

// Sends a request and gives the answer, once it is not a refusal. Options:
//   body: an object (sent as JSON) or bytes; media: of those bytes; accept; headers; signal.
export async function request(method, path, options = {}) {
  const { body, media, accept = "application/json", headers = {}, signal } = options;
  const told = { Accept: accept, ...headers };
  let content = body;
  if (media) told["Content-Type"] = media;
  else if (body !== undefined) {
    told["Content-Type"] = "application/json";
    content = JSON.stringify(body);
  }
  for (;;) {
    if (!token()) await askToken("The service prints one as it starts; `raysynth token` makes more.");
    const sent = token();
    const answer = await fetch(path, {
      method, body: content, signal, headers: { ...told, Authorization: `Bearer ${sent}` },
    }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refusal(0, { detail: "the service does not answer: is it still running?" });
    });
    if (answer.status === 401) {
      if (token() === sent) forgetToken();
      if (!token()) await askToken("The service does not know that token. Give another.");
      continue;
    }
    if (!answer.ok) throw await refusal(answer);
    return answer;
  }
}

async function refusal(answer) {
  const problem = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  if (wait) problem.detail = `${problem.detail} (in ${wait} s)`;
  return new Refusal(answer.status, problem);
}

// Seeds have up to 63 bits, and numbers here 53: long ones stay texts, which the service takes, too.
const exact = (text) => JSON.parse(text.replace(/("seed":\s*)(\d{16,})/g, '$1"$2"'));

export const getJson = async (path, options) => exact(await (await request("GET", path, options)).text());

export const postJson = async (path, body, options) =>
  exact(await (await request("POST", path, { body, ...options })).text());

export const getBytes = async (path, accept, options) =>
  new Uint8Array(await (await request("GET", path, { accept, ...options })).arrayBuffer());

// Server-sent events as they come, each as {name, data}. `EventSource` cannot send a token.
export async function* events(path, signal) {
  const answer = await request("GET", path, { accept: "text/event-stream", signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const block of whole) yield parseEvent(block);
  }
}

function parseEvent(block) {
  const event = { name: "message", data: null };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    if (line.startsWith("data: ")) event.data = JSON.parse(line.slice(6));
  }
  return event;
}
