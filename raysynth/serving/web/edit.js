// What one draws on an image: the nodule's box, a layout, the region to fill.

import { $, make } from "./dom.js";
import { change, isVolumeModel, onChange, shape3, size3, state } from "./state.js";
import { COLOURS } from "./viewer.js";

const LABELS = { 4: "Body", 1: "Left lung", 2: "Right lung", 3: "Trachea", 5: "Nodule", 0: "Eraser" };
const MAX_UNDO = 40;

const past = [];
let corner = null;
let last = null;

export function startEditing() {
  state.view.onTool = onTool;
  for (const [label, name] of [[4, LABELS[4]], [1, LABELS[1]], [2, LABELS[2]], [3, LABELS[3]], [5, LABELS[5]], [0, LABELS[0]]]) {
    const colour = COLOURS[label];
    const swatch = make("span", { className: "swatch" });
    if (colour) swatch.style.background = `rgb(${colour.join(" ")})`;
    const button = make("button", { type: "button", dataset: { label } }, swatch, name);
    button.addEventListener("click", () => change({ label }));
    $("labels").append(button);
  }
  $("brush-size").addEventListener("input", (event) => change({ brush: Number(event.target.value) }));
  $("undo").addEventListener("click", undo);
  $("clear-painting").addEventListener("click", clear);
  onChange(() => {
    for (const button of document.querySelectorAll("[data-label]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.label) === state.label));
    }
    $("undo").disabled = past.length === 0;
    $("brush-size").value = state.brush;
  });
}

function remember() {
  past.push({
    box: state.box, layout: state.layout && state.layout.slice(), region: state.region && state.region.slice(),
  });
  if (past.length > MAX_UNDO) past.shift();
}

export function undo() {
  const before = past.pop();
  if (before) change({ ...before, version: state.version + 1 });
}

export const forgetPast = () => past.splice(0);

function clear() {
  remember();
  change({ [state.view.tool === "region" ? "region" : "layout"]: null, version: state.version + 1 });
}

// Labels to paint on: those that are there, else the reference's, else nothing but background.
export function ensureLayout() {
  if (state.layout) return;
  const from = state.reference?.layout;
  change({ layout: from ? from.slice() : new Uint8Array(size3(state.model)), version: state.version + 1 });
}

function onTool(tool, phase, voxel, axis, event) {
  if (!voxel || !state.model || state.preview) return;
  if (tool === "swipe") {
    const columns = shape3(state.model)[axis === 2 ? 1 : 2];
    const swipe = Math.max(0, Math.min(1, voxel[axis === 2 ? 1 : 2] / columns));
    $("swipe").value = 100 * swipe;
    change({ swipe });
    return;
  }
  if (tool === "box") dragBox(phase, voxel, axis);
  else drawStroke(tool, phase, voxel, axis, event.altKey);
}

function dragBox(phase, voxel, axis) {
  const shape = shape3(state.model);
  const clamped = voxel.map((one, at) => Math.max(0, Math.min(shape[at] - 1, Math.floor(one))));
  if (phase === "start") {
    remember();
    corner = clamped;
    return;
  }
  if (phase !== "move" || !corner) return;
  const axes = [0, 1, 2].filter((one) => one !== axis);
  const side = Math.max(...axes.map((one) => Math.abs(clamped[one] - corner[one]) + 1));
  const box = [0, 0, 0, 0, 0, 0];
  for (const one of [0, 1, 2]) {
    let low = clamped[one] < corner[one] ? corner[one] - side + 1 : corner[one];
    if (one === axis) low = corner[one] - (side >> 1);
    setSide(box, one, low, side, shape[one]);
  }
  change({ box });
}

// One axis of a box, inside the image.
function setSide(box, axis, low, side, size) {
  const own = Math.min(side, size);
  box[axis] = Math.max(0, Math.min(size - own, low));
  box[axis + 3] = box[axis] + own;
}

export function moveBox([dz, dy, dx], grow = 0) {
  const shape = shape3(state.model);
  const old = state.box ?? defaultBox();
  const side = Math.max(1, old[5] - old[2] + grow);
  const box = [0, 0, 0, 0, 0, 0];
  [dz, dy, dx].forEach((step, axis) => setSide(box, axis, old[axis] + step, side, shape[axis]));
  remember();
  change({ box });
}

export function defaultBox() {
  const shape = shape3(state.model);
  const side = Math.max(2, Math.round(shape[2] / 6));
  const box = [0, 0, 0, 0, 0, 0];
  shape.forEach((size, axis) => setSide(box, axis, Math.round(size / (axis === 2 ? 3 : 2) - side / 2), side, size));
  return box;
}

export function boxFrom(z, y, x, side) {
  const shape = shape3(state.model);
  const box = [0, 0, 0, 0, 0, 0];
  [z, y, x].forEach((low, axis) => setSide(box, axis, low, side, shape[axis]));
  return box;
}

function drawStroke(tool, phase, voxel, axis, isErasing) {
  if (phase === "start") {
    if (tool === "paint") ensureLayout();
    else if (!state.region) change({ region: new Uint8Array(size3(state.model)) });
    remember();
    last = voxel;
  }
  if (!last) return;
  const target = tool === "paint" ? state.layout : state.region;
  const value = isErasing ? 0 : tool === "paint" ? state.label : state.label === 0 ? 0 : 1;
  const far = Math.hypot(...voxel.map((one, at) => one - last[at]));
  const steps = Math.max(1, Math.ceil(far / Math.max(0.5, state.brush / 4)));
  for (let step = 0; step <= steps; step += 1) {
    dab(target, voxel.map((one, at) => last[at] + ((one - last[at]) * step) / steps), axis, value);
  }
  last = phase === "end" ? null : voxel;
  change({ version: state.version + 1 });
}

// A disc in a plane.
function dab(target, voxel, axis, value) {
  const shape = shape3(state.model);
  const [a, b] = [0, 1, 2].filter((one) => one !== axis);
  const strides = [shape[1] * shape[2], shape[2], 1];
  const radius = state.brush / 2;
  const plane = Math.max(0, Math.min(shape[axis] - 1, Math.floor(voxel[axis])));
  for (let i = Math.max(0, Math.floor(voxel[a] - radius)); i <= Math.min(shape[a] - 1, Math.ceil(voxel[a] + radius)); i += 1) {
    for (let j = Math.max(0, Math.floor(voxel[b] - radius)); j <= Math.min(shape[b] - 1, Math.ceil(voxel[b] + radius)); j += 1) {
      if (Math.hypot(i + 0.5 - voxel[a], j + 0.5 - voxel[b]) > Math.max(0.71, radius)) continue;
      target[plane * strides[axis] + i * strides[a] + j * strides[b]] = value;
    }
  }
}

// Arrows move a box while its tool is in hand; with Shift they change its side.
export function onStageKey(event) {
  if (state.view.tool !== "box" || !state.model) return;
  const arrows = { ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0], ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1] };
  if (isVolumeModel()) Object.assign(arrows, { PageUp: [1, 0, 0], PageDown: [-1, 0, 0] });
  const move = arrows[event.key];
  if (!move) return;
  event.preventDefault();
  if (event.shiftKey) moveBox([0, 0, 0], ["ArrowUp", "ArrowRight"].includes(event.key) ? 1 : -1);
  else moveBox(move);
}
