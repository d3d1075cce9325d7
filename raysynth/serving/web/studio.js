// The studio: ask for a sample, watch it come, look at it, compare; the store's runs; live metrics.

import { askToken, forgetToken, getJson, readFragment, writeFragment } from "./api.js";
import { $, ask, make } from "./dom.js";
import { onStageKey, startEditing, undo } from "./edit.js";
import { anotherSeed, startForm } from "./form.js";
import { openGallery, referencesName, startGallery } from "./gallery.js";
import { loadHistory, resume, startJobs, useVoice } from "./jobs.js";
import { closeMetrics, openMetrics } from "./metrics.js";
import { canCompare, change, setWindow, state } from "./state.js";
import { startStage, useTool } from "./stage.js";

const VIEWS = ["draw", "gallery", "metrics"];
const KEYS = [
  ["w p c", "mouse: window, pan, crosshair (volumes)"],
  ["b l r", "draw a box, paint a layout, paint a region"],
  ["1 2 3 4", "lung, mediastinum, bone, full window"],
  ["↑ ↓", "on an image of a volume: planes; PgUp, PgDn: five"],
  ["+ − 0", "on an image: zoom in, out, fit"],
  ["arrows", "with the box tool, on an image: move the box; with Shift: its side"],
  ["[ ]", "smaller and larger brush; Alt while painting erases"],
  ["z", "undo what was drawn"],
  ["x", "next way to compare"],
  ["n", "another seed"],
  ["Ctrl+Enter", "sample"],
  ["g m d", "gallery, live metrics, draw"],
  ["?", "this list"],
];

const tell = (words) => ($("told").textContent = words);

function showView(name) {
  for (const one of VIEWS) {
    $(one).hidden = one !== name;
    if (one === name) $(`to-${one}`).setAttribute("aria-current", "page");
    else $(`to-${one}`).removeAttribute("aria-current");
  }
  const fragment = readFragment();
  if (name === "draw") fragment.delete("view");
  else fragment.set("view", name);
  writeFragment(fragment);
  if (name === "gallery") attempt("gallery-error", () => openGallery());
  if (name === "metrics") attempt("metrics-error", openMetrics);
  else closeMetrics();
  change();
}

async function attempt(place, act) {
  try {
    await act();
  } catch (error) {
    $(place).textContent = error.message;
  }
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
  const isTyping = event.target.closest("input:not([type=range], [type=radio], [type=checkbox]), textarea, select");
  if (event.key === "Enter" && event.ctrlKey) return $("request").requestSubmit();
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const views = { g: "gallery", m: "metrics", d: "draw" };
  if (views[event.key]) return showView(views[event.key]);
  if (event.key === "?") return showKeys();
  if ($("draw").hidden) return;
  const tools = { w: "window", p: "pan", b: "box", l: "paint", r: "region", c: "cross" };
  const windows = { 1: "lung", 2: "mediastinum", 3: "bone", 4: "full" };
  if (tools[event.key]) useTool(tools[event.key]);
  else if (windows[event.key]) setWindow(windows[event.key]);
  else if (event.key === "z") undo();
  else if (event.key === "n") anotherSeed();
  else if (event.key === "[" || event.key === "]") {
    change({ brush: Math.max(1, Math.min(20, state.brush + (event.key === "]" ? 1 : -1))) });
  } else if (event.key === "x" && canCompare()) {
    const ways = ["off", "beside", "swipe", "difference"];
    change({ compare: ways[(ways.indexOf(state.compare) + 1) % ways.length], shown: "result" });
  }
}

async function start() {
  const view = readFragment().get("view");
  startStage();
  startEditing();
  startJobs(tell);
  startGallery(showView);
  useVoice(tell);
  for (const one of VIEWS) $(`to-${one}`).addEventListener("click", () => showView(one));
  $("show-keys").addEventListener("click", showKeys);
  $("change-token").addEventListener("click", async () => {
    forgetToken();
    await askToken("Give the token that shall be used from now on.").catch(() => {});
    location.reload();
  });
  $("browse-store").addEventListener("click", () => {
    showView("gallery");
    attempt("gallery-error", () => openGallery(referencesName));
  });
  document.addEventListener("keydown", onKey);
  $("stage").addEventListener("keydown", onStageKey, { capture: true });
  try {
    startForm(await getJson("/v1/models"));
    setWindow(state.model.intensity === "hu" ? "lung" : "full");
    await loadHistory();
    if (view && VIEWS.includes(view)) showView(view);
    await resume();
  } catch (error) {
    $("run-error").textContent = error.message;
    $("sample").disabled = true;
  }
  document.body.dataset.ready = "yes";
}

start();
