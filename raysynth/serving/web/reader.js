// A reader's page: what it is about, calibration, image after image, and a pause whenever wanted.
//
// It knows of an image no more than the service tells: an id and a place in the order.

import { Refusal } from "./api.js";
import { $, ask, make } from "./dom.js";
import { makeView, makeViewer, makeVolume, WINDOWS } from "./viewer.js";

const SECTIONS = ["start", "reading", "paused", "finish", "problem"];
const PLANES = ["axial", "coronal", "sagittal"];
const WINDOW_KEYS = { l: "lung", m: "mediastinum", b: "bone", f: "full" };
const KEYS = [
  ["R S", "real, synthetic"],
  ["1 2 3 4 5", "how real it looks, where that is asked"],
  ["Enter", "next image"],
  ["L M B F", "lung, mediastinum, bone, full window"],
  ["W P C", "mouse: window, pan, crosshair (volumes)"],
  ["+ − 0", "zoom in, out, fit"],
  ["↑ ↓", "on a volume: planes; PgUp, PgDn: five"],
  ["?", "this list"],
];

const view = makeView();
const fetched = new Map(); // images by their ids, as promises

let study = null; // what the service has told last
let volume = null;
let viewers = [];
let chosen = { answer: null, rating: null };
let following = null; // after an answer in calibration: where the study goes on
let isBusy = false;

// The service, spoken to with what the link says.

async function send(method, path, body) {
  const headers = { Authorization: `Bearer ${location.hash.slice(1)}` };
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) }).catch(() => {
    throw new Refusal(0, { detail: "The service does not answer. Your answers until now are kept: try again." });
  });
  if (!answer.ok) throw new Refusal(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

const getJson = async (path) => (await send("GET", path)).json();

function image(item) {
  if (!fetched.has(item.id)) {
    const coming = send("GET", `/v1/reader/items/${item.id}/image`)
      .then((answer) => answer.arrayBuffer())
      .then((bytes) => makeVolume(new Int16Array(bytes), study.shape, study.depth_mm, study.pixel_mm));
    coming.catch(() => fetched.delete(item.id));
    fetched.set(item.id, coming);
  }
  return fetched.get(item.id);
}

// What is in sight.

function show(name) {
  for (const one of SECTIONS) $(one).hidden = one !== name;
  const isUnderWay = name === "reading" || name === "paused";
  $("place").hidden = $("progress").hidden = !isUnderWay;
  $("pause").hidden = name !== "reading";
}

function showProblem(error) {
  $("problem-words").textContent = error.message.replace(/^./, (letter) => letter.toUpperCase());
  show("problem");
}

function placeWords() {
  const { answered, num_calibration: before, total } = study;
  return answered < before ? `Calibration ${answered + 1} of ${before}` : `Image ${answered - before + 1} of ${total - before}`;
}

function showStart() {
  $("share").textContent = study.tells_share ? "Half of them are synthetic." : "How many of each there are is not told.";
  $("and-rating").hidden = study.task !== "rating";
  const count = study.num_calibration;
  $("about-calibration").hidden = !count;
  $("about-calibration").textContent =
    `The first ${count} are for calibration: they are not counted, and after your answer you are told what they were. Then come ${study.total - count} that count.`;
  show("start");
}

async function showItem() {
  following = null;
  if (!study.item) {
    $("finish-words").textContent = `You have answered all ${study.total} images; every answer is kept.`;
    return show("finish");
  }
  $("place").textContent = placeWords();
  $("progress").value = study.answered / study.total;
  choose({ answer: null, rating: null });
  $("truth").hidden = true;
  $("calibration").hidden = !study.item.is_calibration;
  $("error").textContent = "";
  isBusy = true;
  volume = null;
  if (!viewers.length) buildViewers();
  view.change({ zoom: 1, pan: [0, 0] });
  show("reading");
  const { item, after } = study;
  try {
    const shown = await image(item);
    if (study.item !== item) return;
    volume = shown;
    view.change({ at: volume.shape.map((one) => one >> 1) });
    isBusy = false;
    refresh();
    $("told").textContent = placeWords();
    document.body.dataset.item = item.id;
    if (after) image(after).catch(() => {});
    document.querySelector("#images canvas").focus({ preventScroll: true });
  } catch (error) {
    showProblem(error);
  }
}

function buildViewers() {
  const axes = study.shape.length === 3 ? [0, 1, 2] : [0];
  $("images").dataset.arrangement = axes.length > 1 ? "planes" : "one";
  const unit = study.intensity === "hu" ? "HU" : "(no unit)";
  viewers = axes.map((axis) => {
    const name = axes.length > 1 ? `Image to judge, ${PLANES[axis]} plane` : "Image to judge";
    const canvas = make("canvas", { role: "application", "aria-label": name });
    $("images").append(make("figure", { className: "viewer" }, canvas));
    return makeViewer(canvas, view, () => volume && { volume, unit }, axis);
  });
  view.cross = axes.length > 1;
  document.querySelector("[data-tool=cross]").hidden = $("of-plane").hidden = axes.length === 1;
  $("plane").max = axes.length > 1 ? study.shape[0] - 1 : 0;
  const names = study.intensity === "hu" ? ["lung", "mediastinum", "bone", "full"] : ["full"];
  $("windows").replaceChildren(...names.map((name) => make("button", {
    type: "button", dataset: { window: name }, onclick: () => setWindow(name),
  }, { mediastinum: "Mediast." }[name] ?? WINDOWS[name]?.name ?? "Full")));
  for (const button of $("windows").children) button.title = WINDOWS[button.dataset.window]?.name ?? "Full";
  const [rows, columns] = study.shape.slice(-2);
  $("size").textContent = `${study.shape.length === 3 ? `${study.shape[0]} × ` : ""}${rows} × ${columns} pixels of ${study.pixel_mm.toFixed(2)} mm`;
  setWindow(names[0]);
}

function setWindow(name) {
  if (name !== "full" && study.intensity !== "hu") return;
  const [low, high] = study.value_range;
  const preset = WINDOWS[name] ?? { low, high };
  view.change({ window: { low: preset.low, high: preset.high }, preset: name });
}

function refresh() {
  for (const button of document.querySelectorAll("[data-answer]")) press(button, button.dataset.answer === chosen.answer);
  for (const button of document.querySelectorAll("[data-rating]")) press(button, Number(button.dataset.rating) === chosen.rating);
  for (const button of document.querySelectorAll("[data-window]")) press(button, button.dataset.window === view.preset);
  for (const button of document.querySelectorAll("[data-tool]")) press(button, button.dataset.tool === view.tool);
  for (const button of document.querySelectorAll("[data-answer], [data-rating]")) button.disabled = following !== null;
  $("rating").hidden = study.task !== "rating";
  $("plane").value = view.at[0];
  $("confirm").disabled = isBusy || !(following || isComplete());
}

const press = (button, isPressed) => button.setAttribute("aria-pressed", String(isPressed));

const isComplete = () => chosen.answer !== null && (study.task === "choice" || chosen.rating !== null);

// Answers.

function choose(parts) {
  if (following) return;
  chosen = { ...chosen, ...parts };
  refresh();
}

async function confirm() {
  if (isBusy) return;
  if (following) {
    study = following;
    return showItem();
  }
  if (!isComplete()) return;
  isBusy = true;
  refresh();
  const { item } = study;
  try {
    const body = study.task === "rating" ? chosen : { answer: chosen.answer };
    const answer = await send("PUT", `/v1/reader/items/${item.id}`, body);
    const kept = await answer.json();
    isBusy = false;
    fetched.delete(item.id);
    if (kept.truth) return showTruth(kept);
    study = kept.reader;
    await showItem();
  } catch (error) {
    isBusy = false;
    if (error.status === 409) return resume(); // another tab of this reader was faster
    $("error").textContent = error.message;
    refresh();
  }
}

function showTruth(kept) {
  following = kept.reader;
  const isRight = kept.truth === kept.answer;
  $("truth").replaceChildren(make("strong", { className: isRight ? "good" : "warn" }, `It is ${kept.truth}.`),
    ` You said ${kept.answer}.`);
  $("truth").hidden = false;
  refresh();
}

async function resume() {
  try {
    study = await getJson("/v1/reader");
    $("title").textContent = document.title = study.title;
    if (study.answered === 0 && !viewers.length) showStart();
    else await showItem();
  } catch (error) {
    showProblem(error);
  }
  document.body.dataset.ready = "yes";
}

function pause() {
  $("paused-place").textContent = `You are at ${placeWords().replace(/^./, (letter) => letter.toLowerCase())}.`;
  show("paused");
  $("resume").focus();
}

function showKeys() {
  const rows = KEYS.map(([keys, does]) => make("tr", {},
    make("td", {}, ...keys.split(" ").flatMap((key) => [make("kbd", {}, key), " "])), make("td", {}, does)));
  ask(make("dialog", { "aria-labelledby": "keys-title" }, make("form", { method: "dialog" },
    make("h2", { id: "keys-title" }, "Keys and mouse"),
    make("p", { className: "hint" }, "Drag: what the mouse tool says. Right button: window. Shift + drag: pan. Wheel: planes, or zoom."),
    make("table", {}, ...rows),
    make("div", { className: "row end" }, make("button", { className: "primary" }, "Close")))));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "?") return showKeys();
  if ($("reading").hidden) return;
  const key = event.key.toLowerCase();
  const tools = { w: "window", p: "pan", c: "cross" };
  if (key === "enter") {
    // On a button it presses that, unless it is pressed already.
    const button = event.target.closest("button");
    if (button && button.id !== "confirm" && button.getAttribute("aria-pressed") !== "true") return;
    event.preventDefault();
    if (!event.repeat) confirm();
  } else if (key === "r" || key === "s") choose({ answer: key === "r" ? "real" : "synthetic" });
  else if (study.task === "rating" && /^[1-5]$/.test(key)) choose({ rating: Number(key) });
  else if (WINDOW_KEYS[key]) setWindow(WINDOW_KEYS[key]);
  else if (!event.defaultPrevented && "+=-0".includes(key)) zoom(key);
  else if (tools[key] && !document.querySelector(`[data-tool=${tools[key]}]`).hidden) view.change({ tool: tools[key] });
}

function zoom(key) {
  if (key === "0") view.change({ zoom: 1, pan: [0, 0] });
  else view.change({ zoom: Math.max(0.5, Math.min(20, view.zoom * (key === "-" ? 0.8 : 1.25))) });
}

function start() {
  view.listeners.add(() => study && refresh());
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.addEventListener("click", () => choose({ answer: button.dataset.answer }));
  }
  for (const button of document.querySelectorAll("[data-rating]")) {
    button.addEventListener("click", () => choose({ rating: Number(button.dataset.rating) }));
  }
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.addEventListener("click", () => view.change({ tool: button.dataset.tool }));
  }
  $("answer").addEventListener("submit", (event) => {
    event.preventDefault();
    confirm();
  });
  $("consent").addEventListener("change", (event) => ($("begin").disabled = !event.target.checked));
  $("begin").addEventListener("click", showItem);
  $("pause").addEventListener("click", pause);
  $("resume").addEventListener("click", () => {
    show("reading");
    document.querySelector("#images canvas").focus({ preventScroll: true });
  });
  $("again").addEventListener("click", resume);
  $("show-keys").addEventListener("click", showKeys);
  $("zoom-in").addEventListener("click", () => zoom("+"));
  $("zoom-out").addEventListener("click", () => zoom("-"));
  $("zoom-fit").addEventListener("click", () => zoom("0"));
  $("plane").addEventListener("input", (event) => {
    const [, y, x] = view.at;
    view.change({ at: [Number(event.target.value), y, x] });
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => location.reload());
  resume();
}

start();
