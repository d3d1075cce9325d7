// The images in the middle: one, two beside each other, or the three planes of a volume.

import { $, make } from "./dom.js";
import { canCompare, change, isVolumeModel, mainImage, onChange, REGION_COLOURS, setWindow, state } from "./state.js";
import { makeViewer } from "./viewer.js";

const CAPTIONS = {
  result: ["Sample", "synthetic · research only, not for diagnosis", "synthetic"],
  preview: ["What it would be by now", "synthetic · research only, not for diagnosis", "synthetic"],
  reference: ["Reference", "reference (real or uploaded)", "reference"],
  blank: ["Nothing drawn yet. Press Sample, or first draw a box, paint a layout, or take a reference.", "", ""],
};

const PAINTING_OPACITY = 0.4;

let viewers = [];
let built = "";

export function startStage() {
  onChange(refresh);
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.addEventListener("click", () => useTool(button.dataset.tool));
  }
  for (const button of document.querySelectorAll("[data-window]")) {
    button.addEventListener("click", () => setWindow(button.dataset.window));
  }
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => change({ shown: button.dataset.show, compare: "off" }));
  }
  for (const button of document.querySelectorAll("[data-compare]")) {
    button.addEventListener("click", () => change({ compare: button.dataset.compare, shown: "result" }));
  }
  $("zoom-in").addEventListener("click", () => zoomBy(1.25));
  $("zoom-out").addEventListener("click", () => zoomBy(0.8));
  $("zoom-fit").addEventListener("click", () => state.view.change({ zoom: 1, pan: [0, 0] }));
  $("opacity").addEventListener("input", (event) => change({ opacity: event.target.value / 100 }));
  $("swipe").addEventListener("input", (event) => change({ swipe: event.target.value / 100 }));
  $("show-box").addEventListener("change", (event) => change({ showBox: event.target.checked }));
  $("plane").addEventListener("input", (event) => {
    const [, y, x] = state.view.at;
    state.view.change({ at: [Number(event.target.value), y, x] });
  });
  state.view.listeners.add(showView);
}

function zoomBy(factor) {
  state.view.change({ zoom: Math.max(0.5, Math.min(20, state.view.zoom * factor)) });
}

export function useTool(tool) {
  if (document.querySelector(`[data-tool="${tool}"]`).hidden) return;
  // Whatever is drawn on lies under it: the reference, where there is one.
  const isEditing = ["box", "paint", "region"].includes(tool);
  if (isEditing && state.compare !== "off") change({ compare: "off" });
  if (tool === "region" && state.reference) change({ shown: "reference" });
  state.view.change({ tool });
  change();
}

function scene(role) {
  const main = mainImage();
  if (!main) return null;
  const isCompared = canCompare() && state.compare !== "off";
  const volume = role === "reference" ? state.reference.volume : main.volume;
  const layers = [];
  const fits = (values) => values && values.length === volume.values.length;
  const { layout, box } = overlaysOf(main.kind);
  // Images are clean unless somebody paints, or wants to see the labels.
  const opacity = state.view.tool === "paint" ? Math.max(state.opacity, PAINTING_OPACITY) : state.opacity;
  if (fits(layout) && opacity > 0 && main.kind !== "preview") {
    layers.push({ values: layout, opacity, version: state.version });
  }
  if (fits(state.region) && main.kind !== "preview" && state.view.tool === "region") {
    layers.push({ values: state.region, colours: REGION_COLOURS, opacity: 0.45, version: state.version });
  }
  const about = role === "main" && main.kind === "result" ? state.result.about : state.model;
  return {
    volume,
    layers,
    box: state.showBox && main.kind !== "preview" ? box : null,
    other: isCompared && role === "main" ? state.reference.volume : null,
    mode: state.compare,
    swipe: state.swipe,
    sharp: ["paint", "region"].includes(state.view.tool),
    unit: about?.intensity === "hu" ? "HU" : "(no unit)",
  };
}

// The form's own, which a result was asked with unless the form has changed since.
function overlaysOf(kind) {
  const isEditing = ["box", "paint", "region"].includes(state.view.tool);
  if (kind === "result" && !isEditing) return { layout: state.result.layout, box: state.result.box };
  return { layout: state.layout ?? state.reference?.layout ?? null, box: state.box };
}

function refresh() {
  const main = mainImage();
  if (!main) return;
  const isBeside = canCompare() && state.compare === "beside";
  const planes = main.volume.isVolume && !isBeside ? 3 : 1;
  const key = [planes, isBeside].join();
  if (key !== built) build(planes, isBeside);
  built = key;
  document.querySelectorAll("#stage figure").forEach((figure) => caption(figure, main.kind));
  const isVolume = isVolumeModel();
  document.querySelector('[data-tool="cross"]').hidden = !isVolume;
  document.querySelector('[data-tool="region"]').hidden = !state.reference;
  if (!isVolume && state.view.tool === "cross") state.view.tool = "window";
  if (!state.reference && state.view.tool === "region") state.view.tool = "window";
  $("of-plane").hidden = !main.volume.isVolume;
  $("plane").max = main.volume.shape[0] - 1;
  $("of-swipe").hidden = !(canCompare() && state.compare === "swipe");
  $("comparison").hidden = !canCompare();
  $("of-show").hidden = !(state.result && state.reference) || main.kind === "preview";
  $("brushes").hidden = !["paint", "region"].includes(state.view.tool);
  $("labels").hidden = state.view.tool !== "paint";
  press("[data-compare]", "compare", canCompare() ? state.compare : "off");
  press("[data-show]", "show", main.kind === "reference" ? "reference" : "result");
  showView();
}

function showView() {
  press("[data-tool]", "tool", state.view.tool);
  press("[data-window]", "window", state.view.preset);
  $("plane").value = state.view.at[0];
  const main = mainImage();
  if (main?.volume.isVolume) $("plane").setAttribute("aria-valuetext", `axial plane ${state.view.at[0] + 1} of ${main.volume.shape[0]}`);
}

function press(selector, name, value) {
  for (const button of document.querySelectorAll(selector)) {
    button.setAttribute("aria-pressed", String(button.dataset[name] === value));
  }
}

function build(planes, isBeside) {
  for (const viewer of viewers) viewer.close();
  state.view.cross = planes === 3;
  const roles = isBeside ? [["main", 0], ["reference", 0]] : [["main", 0], ["main", 1], ["main", 2]].slice(0, planes);
  const figures = roles.map(([role, axis]) => {
    const canvas = make("canvas", { "aria-label": "", role: "application" });
    const figure = make("figure", { className: "viewer", dataset: { role, axis } }, canvas, make("figcaption"));
    return { figure, canvas, role, axis };
  });
  $("stage").dataset.arrangement = isBeside ? "beside" : planes === 3 ? "planes" : "one";
  $("stage").replaceChildren(...figures.map(({ figure }) => figure));
  viewers = figures.map(({ canvas, role, axis }) => makeViewer(canvas, state.view, () => scene(role), axis));
}

function caption(figure, kind) {
  const { role, axis } = figure.dataset;
  const own = role === "reference" ? "reference" : kind;
  let [name, words, mark] = CAPTIONS[own];
  if (state.compare === "swipe" && canCompare()) [name, words] = ["Reference | sample", "left: reference · right: synthetic, not for diagnosis"];
  if (state.compare === "difference" && canCompare()) {
    [name, words] = ["Sample − reference", "orange: denser · blue: less dense · synthetic, not for diagnosis"];
  }
  const plane = ["Axial", "Coronal", "Sagittal"][axis];
  const isVolume = built.startsWith("3");
  if (role === "main" && state.compare === "beside" && canCompare()) words = "synthetic · not for diagnosis";
  const short = isVolume && axis !== "0" && own !== "blank" ? (own === "reference" ? "reference" : "synthetic") : words;
  figure.lastChild.replaceChildren(
    make("span", {}, isVolume ? (axis === "0" ? `${plane} · ${name.toLowerCase()}` : plane) : name),
    make("span", { className: `mark ${mark}` }, short),
  );
  figure.firstChild.setAttribute("aria-label", `${plane} plane, ${name.toLowerCase()}${words ? `: ${words}` : ""}`);
}
