// The form on the left: what is asked for, read from it and put into it.

import { getBytes, request } from "./api.js";
import { $, ask, make } from "./dom.js";
import { boxFrom, defaultBox, ensureLayout, forgetPast } from "./edit.js";
import { readNpz, writeNpz } from "./npz.js";
import { change, fromBox, isVolumeModel, middle, onChange, shape3, size3, state, toBox } from "./state.js";
import { useTool } from "./stage.js";
import { makeVolume } from "./viewer.js";

const NPZ = "application/x-npz";
const MEDIA = { png: "image/png", npz: NPZ, nii: "application/x-nifti", gz: "application/x-nifti" };

const sentAlready = new WeakMap(); // arrays -> {version, id}

export function startForm(models) {
  for (const { name } of models) $("model").append(make("option", { value: name }, name));
  change({ models });
  chooseModel(models[0].name);
  $("model").addEventListener("change", (event) => chooseModel(event.target.value));
  $("show-card").addEventListener("click", showCard);
  for (const choice of document.querySelectorAll('[name="reference"]')) {
    choice.addEventListener("change", () => chooseReference(choice.value));
  }
  $("store-row").addEventListener("change", () => guard("reference", () => takeStored(Number($("store-row").value) - 1)));
  $("file").addEventListener("change", () => guard("reference", takeFile));
  $("has-box").addEventListener("change", (event) => change({ box: event.target.checked ? defaultBox() : null }));
  $("draw-box").addEventListener("click", () => useTool("box"));
  for (const id of ["box-z", "box-y", "box-x", "box-side"]) $(id).addEventListener("change", takeBoxFields);
  $("has-layout").addEventListener("change", (event) => {
    if (event.target.checked) ensureLayout();
    else change({ layout: null, version: state.version + 1 });
  });
  $("paint-layout").addEventListener("click", () => {
    ensureLayout();
    useTool("paint");
  });
  $("another-seed").addEventListener("click", anotherSeed);
  $("keep").addEventListener("change", () => change());
  onChange(show);
  anotherSeed();
}

export function anotherSeed() {
  $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

export function chooseModel(name) {
  const model = state.models.find((one) => one.name === name) ?? state.models[0];
  const isOther = !state.model || size3(state.model) !== size3(model) || String(state.model.shape) !== String(model.shape);
  $("model").value = model.name;
  $("sampler").replaceChildren(...model.samplers.map((one) => make("option", { value: one }, one)));
  $("sampler").value = model.sampler;
  $("steps").max = model.max_steps;
  $("steps").value = Math.min(model.num_inference_steps, model.max_steps);
  $("guidance").value = model.can_guide ? model.guidance_scale : 1;
  $("guidance").disabled = !model.can_guide;
  $("scores").replaceChildren(...(model.hears.includes("attributes") ? scoreFields(model.words) : []));
  const size = model.shape.join(" × ");
  const unit = model.intensity === "hu" ? "HU" : "grey values without a unit";
  $("model-facts").textContent = `${model.shape.length === 3 ? "Volumes" : "Slices"} of ${size}, ${+model.pixel_mm.toFixed(2)} mm a pixel, in ${unit}.`;
  $("of-prompt").hidden = !model.hears.includes("prompt");
  $("of-layout").hidden = !model.hears.includes("layout");
  const parts = { model };
  if (isOther) {
    forgetPast();
    Object.assign(parts, { box: null, layout: null, region: null, reference: null, result: null, compare: "off" });
    state.view.at = middle(makeVolume(null, shape3(model)));
    document.querySelector('[name="reference"][value="none"]').checked = true;
  }
  change(parts);
  if (isOther) chooseReference("none");
}

function scoreFields(words) {
  return Object.entries(words).map(([name, levels]) => {
    const list = make("select", { id: `score-${name}`, dataset: { score: name } }, make("option", { value: "" }, "not said"));
    levels.forEach((level, at) => list.append(make("option", { value: at + 1 }, `${at + 1} · ${level}`)));
    return make("label", {}, name[0].toUpperCase() + name.slice(1), list);
  });
}

async function showCard() {
  const close = make("button", { className: "primary" }, "Close");
  const dialog = make("dialog", { className: "card", "aria-label": `Card of ${state.model.name}` },
    make("form", { method: "dialog" }, ...markdown(state.model.card), make("div", { className: "row end" }, close)));
  await ask(dialog);
}

// As much of Markdown as cards have: headings, lists, tables, bold, code.
function markdown(text) {
  const inline = (line) => line.split(/(\*\*[^*]+\*\*|`[^`]+`)/).map((part) => {
    if (part.startsWith("**")) return make("b", {}, part.slice(2, -2));
    return part.startsWith("`") ? make("code", {}, part.slice(1, -1)) : part;
  });
  return text.trim().split(/\n\n+/).flatMap((block) => {
    const lines = block.split("\n");
    if (block.startsWith("#")) {
      const level = Math.min(3, block.match(/^#+/)[0].length + 1);
      return [make(`h${level}`, {}, block.replace(/^#+ /, ""))];
    }
    if (block.startsWith("- ")) {
      const items = block.split(/\n(?=- )/).map((item) => item.slice(2).replace(/\n\s*/g, " "));
      return [make("ul", {}, ...items.map((item) => make("li", {}, ...inline(item))))];
    }
    if (block.startsWith("|")) {
      const rows = lines.filter((line) => !/^\|[-|]+$/.test(line)).map((line) => line.split("|").slice(1, -1));
      return [make("table", {}, ...rows.map((row, at) =>
        make("tr", {}, ...row.map((cell) => make(at ? "td" : "th", {}, ...inline(cell.trim()))))))];
    }
    return [make("p", {}, ...inline(lines.join(" ").replace(/\*\*(.*?)\*\*/g, "**$1**")))];
  });
}

// The reference.

export function chooseReference(kind) {
  document.querySelector(`[name="reference"][value="${kind}"]`).checked = true;
  $("of-store").hidden = kind !== "store";
  $("of-file").hidden = kind !== "file";
  showError("reference", "");
  if (kind === "store") guard("reference", () => takeStored(Number($("store-row").value) - 1));
  else {
    $("file").value = "";
    change({ reference: null, region: null, compare: "off" });
  }
}

export async function takeStored(row) {
  if (!Number.isInteger(row) || row < 0) throw new Error("give a sample's number, from 1 on");
  await takeSample(`/v1/references/samples/${row}`, `Sample ${row + 1} of the store`);
  $("store-row").value = row + 1;
  $("of-store").hidden = false;
  $("of-file").hidden = true;
  document.querySelector('[name="reference"][value="store"]').checked = true;
}

async function takeSample(path, name) {
  const { hu, layout, facts } = await readNpz(await getBytes(path, NPZ));
  const about = JSON.parse(facts.text);
  checkShape(hu.shape);
  setReference({
    volume: makeVolume(hu.values, hu.shape, about.depth_mm, about.pixel_mm),
    layout: layout?.values ?? null, box: toBox(about.box), name, isSynthetic: about.synthetic,
  });
}

async function takeFile() {
  const file = $("file").files[0];
  if (!file) return;
  change({ reference: null });
  const media = MEDIA[file.name.toLowerCase().split(".").pop()];
  if (!media) throw new Error(`${file.name} is no PNG, NPZ or NIfTI: give one of these`);
  $("reference-facts").textContent = `Sending ${file.name} …`;
  const told = await (await request("POST", "/v1/uploads", { body: file, media })).json();
  await takeUpload(told.id, file.name, media === "image/png" && told.dtype === "uint8");
}

// What was uploaded, as the service understood it. Grey of 8 bits is taken as the model's window.
export async function takeUpload(id, name, isGrey = false) {
  const { array } = await readNpz(await getBytes(`/v1/uploads/${id}`, NPZ));
  checkShape(array.shape);
  const [low, high] = state.model.window_hu;
  const values = isGrey
    ? Int16Array.from(array.values, (grey) => Math.round(low + (grey / 255) * (high - low)))
    : Int16Array.from(array.values, (value) => Math.round(Number(value)));
  if (!isGrey) sentAlready.set(values, { version: 0, id });
  setReference({ volume: makeVolume(values, array.shape, state.model.depth_mm, state.model.pixel_mm), layout: null, box: null, name, isGrey });
}

function checkShape(shape) {
  if (String(shape) === String(state.model.shape)) return;
  throw new Error(`it has ${shape.join(" × ")} pixels, and this model draws ${state.model.shape.join(" × ")}: resample or crop it`);
}

function setReference(reference) {
  change({ reference, region: null, compare: "off", shown: "reference", version: state.version + 1 });
}

// The box.

function takeBoxFields() {
  const [z, y, x, side] = ["box-z", "box-y", "box-x", "box-side"].map((id) => Math.round(Number($(id).value) || 0));
  change({ box: boxFrom(z, y, x, Math.max(1, side)) });
}

function show(parts) {
  const { box, model, reference } = state;
  if (!model) return;
  $("has-box").checked = box !== null;
  $("box-fields").hidden = box === null;
  $("box-z").parentElement.hidden = !isVolumeModel();
  if (box) {
    [["box-z", box[0]], ["box-y", box[1]], ["box-x", box[2]], ["box-side", box[5] - box[2]]]
      .forEach(([id, value]) => ($(id).value = value));
  }
  $("box-hint").hidden = !box || model.hears.includes("box");
  $("has-layout").checked = state.layout !== null;
  const painted = state.layout?.some((label) => label > 0);
  const needsLayout = model.family.startsWith("layout") && !painted;
  $("layout-facts").textContent = needsLayout ? "This model draws from a layout: paint one, or start from a reference's."
    : state.layout && !painted ? "It is empty so far: paint it, or start from a reference's." : "";
  $("of-keep").hidden = !reference;
  const millimetres = box && `${((box[5] - box[2]) * model.pixel_mm).toFixed(0)} mm`;
  $("box-size").textContent = millimetres ? `${millimetres} a side` : "";
  if ("reference" in parts) {
    const grey = reference?.isGrey ? " Its grey values were taken as the model's window." : "";
    $("reference-facts").textContent = reference ? `${reference.name}.${grey}` : "";
  }
  $("region-facts").textContent = !reference || !$("keep").checked ? "" : state.region?.some(Boolean)
    ? "The painted region is drawn anew." : model.family.startsWith("layout") && state.layout
      ? "The layout's organs are drawn anew, or a region that you paint."
      : box ? "The box is drawn anew, or a region that you paint." : "Draw a box, or paint a region, to be drawn anew.";
}

// What the form asks for, with arrays sent ahead.
export async function readRequest() {
  const { model, box, layout, region, reference } = state;
  const asked = { model: model.name, previews: true, sampler: $("sampler").value };
  const seed = $("seed").value.trim();
  if (seed) asked.seed = /^\d+$/.test(seed) ? seed : NaN;
  if (Number.isNaN(asked.seed)) throw Object.assign(new Error("give a whole number, or nothing for any seed"), { field: "seed" });
  asked.num_inference_steps = wholeOf("steps", "num_inference_steps", "give a whole number of steps");
  if (model.can_guide) asked.guidance_scale = Number($("guidance").value);
  if (box) asked.box = fromBox(box);
  const scores = [...document.querySelectorAll("[data-score]")].filter((list) => list.value);
  if (scores.length) asked.attributes = Object.fromEntries(scores.map((list) => [list.dataset.score, Number(list.value)]));
  if (model.hears.includes("prompt") && $("prompt").value.trim()) asked.prompt = $("prompt").value.trim();
  if (model.hears.includes("layout") && layout) asked.layout = await sent(layout, model.shape);
  if (reference && $("keep").checked) {
    asked.reference = await sent(reference.volume.values, model.shape, 0);
    if (region?.some(Boolean)) asked.region = await sent(region, model.shape);
  }
  return asked;
}

function wholeOf(id, field, message) {
  const value = Number($(id).value);
  if (!Number.isInteger(value) || value < 1) throw Object.assign(new Error(message), { field });
  return value;
}

async function sent(values, shape, version = state.version) {
  const known = sentAlready.get(values);
  if (known?.version === version) return known.id;
  const body = writeNpz("array", { values, shape });
  const { id } = await (await request("POST", "/v1/uploads", { body, media: NPZ })).json();
  sentAlready.set(values, { version, id });
  return id;
}

// Puts a request of before into the form.
export async function writeRequest(asked) {
  chooseModel(asked.model ?? state.models[0].name);
  $("seed").value = asked.seed ?? "";
  if (asked.sampler) $("sampler").value = asked.sampler;
  if (asked.num_inference_steps) $("steps").value = asked.num_inference_steps;
  if (asked.guidance_scale !== null && asked.guidance_scale !== undefined) $("guidance").value = asked.guidance_scale;
  $("prompt").value = asked.prompt ?? "";
  for (const list of document.querySelectorAll("[data-score]")) list.value = asked.attributes?.[list.dataset.score] ?? "";
  change({ box: toBox(asked.box), layout: await sentLabels(asked.layout) });
  if (asked.reference) {
    await takeUpload(asked.reference, "The reference of that request");
    $("keep").checked = true;
    change({ region: await sentLabels(asked.region) });
  }
  change({ version: state.version + 1 });
}

// Labels or a region that were sent once; null if none was, or if they are gone.
export async function sentLabels(id) {
  if (!id) return null;
  const packed = await getBytes(`/v1/uploads/${id}`, NPZ).catch(() => null);
  return packed && Uint8Array.from((await readNpz(packed)).array.values);
}

// What is wrong, beside the field that is to blame.

export function showError(field, message) {
  const place = $(`${field}-error`) ?? $("run-error");
  place.textContent = message;
  for (const control of document.querySelectorAll(`[aria-describedby="${field}-error"]`)) {
    if (message) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  }
}

export function clearErrors() {
  for (const place of document.querySelectorAll("#draw [role=alert]")) showError(place.id.replace(/-error$/, ""), "");
}

export function showRefusal(error, fallback = "run") {
  const field = error.field?.split(".")[0];
  const isKnown = field && $(`${field}-error`);
  const words = error.message.replace(new RegExp(`^(${isKnown ? field : "body"}|body|content-type):? `), "");
  showError(isKnown ? field : fallback, words[0].toUpperCase() + words.slice(1));
}

export async function guard(field, act) {
  showError(field, "");
  try {
    await act();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (field === "reference") $("reference-facts").textContent = "";
    showRefusal(Object.assign(error, { field: error.field === "body" || error.field === "content-type" ? field : error.field }), field);
  }
}
