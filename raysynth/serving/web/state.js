// What the studio knows, in one place. Boxes have six corners, in slices those of one plane.

import { makeView, makeVolume, WINDOWS } from "./viewer.js";

export const REGION_COLOURS = { 1: [255, 180, 84] };

export const state = {
  models: [],
  model: null,
  reference: null, // {volume, layout, box, name}
  result: null, // {job, volume, about, request}
  preview: null, // a volume while something is drawn
  layout: null, // labels on the model's grid
  region: null, // 1 where the reference is drawn anew
  box: null,
  version: 0, // of layout and region: they are painted in place
  shown: "result",
  compare: "off",
  swipe: 0.5,
  opacity: 0,
  showBox: true,
  brush: 4,
  label: 1,
  view: makeView(),
};

const listeners = new Set();

export const onChange = (listener) => listeners.add(listener);

export function change(parts = {}) {
  Object.assign(state, parts);
  for (const listener of listeners) listener(parts);
  state.view.change();
}

export const shape3 = (model) => (model.shape.length === 3 ? model.shape : [1, ...model.shape]);

export const size3 = (model) => model.shape.reduce((product, one) => product * one, 1);

export const isVolumeModel = () => state.model?.shape.length === 3;

// Air, where there is nothing to be seen yet.
let blank = null;
export function blankVolume(model) {
  if (blank?.model !== model) {
    const values = new Int16Array(size3(model)).fill(-32768);
    blank = { model, volume: makeVolume(values, model.shape, model.depth_mm, model.pixel_mm) };
  }
  return blank.volume;
}

export const isDrawing = () => state.preview !== null;

// What the main viewer shows, and what that is.
export function mainImage() {
  if (state.preview) return { volume: state.preview, kind: "preview" };
  if (state.shown === "result" && state.result) return { volume: state.result.volume, kind: "result" };
  if (state.reference) return { volume: state.reference.volume, kind: "reference" };
  if (state.result) return { volume: state.result.volume, kind: "result" };
  return state.model ? { volume: blankVolume(state.model), kind: "blank" } : null;
}

export const canCompare = () =>
  Boolean(state.result && state.reference && !state.preview
    && state.result.volume.values.length === state.reference.volume.values.length);

export function fullWindow() {
  const about = state.result?.about ?? state.model;
  return about?.window_hu ?? [-1000, 1000];
}

export function setWindow(name) {
  const [low, high] = fullWindow();
  const preset = WINDOWS[name] ?? { low, high };
  state.view.change({ window: { low: preset.low, high: preset.high }, preset: name });
}

export const middle = (volume) => volume.shape.map((one) => one >> 1);

export function toBox(corners) {
  if (!corners) return null;
  if (corners.length === 6) return [...corners];
  const [y0, x0, y1, x1] = corners;
  return [0, y0, x0, 1, y1, x1];
}

export const fromBox = (box) => (isVolumeModel() ? box : [box[1], box[2], box[4], box[5]]);
