// What the recipe's store holds: synthetic runs and reference samples, a page at a time.

import { getBytes, getJson } from "./api.js";
import { $, ask, make } from "./dom.js";
import { takeStored } from "./form.js";
import { readNpz } from "./npz.js";
import { change, state, toBox } from "./state.js";
import { makeView, makeViewer, makeVolume, windowOf, WINDOWS } from "./viewer.js";

const PAGE = 40;
const REFERENCES = " references"; // no run bears such a name

let runs = [];
let first = 0;
let turn = 0;
let shownUrls = [];
let goTo = () => {};

export function startGallery(showView) {
  goTo = showView;
  $("earlier").addEventListener("click", () => load(Math.max(0, first - PAGE)));
  $("later").addEventListener("click", () => load(first + PAGE));
}

export async function openGallery(set) {
  if (!runs.length) await listRuns();
  if (set && [...$("set").options].some((one) => one.value === set)) $("set").value = set;
  await load(0);
}

async function listRuns() {
  runs = await getJson("/v1/runs");
  const reference = await getJson("/v1/references").catch(() => null);
  const words = state.models[0].words;
  const choice = (id, label, options) => make("label", {}, label,
    make("select", { id, onchange: () => load(0) }, ...options.map(([value, name]) => make("option", { value }, name))));
  const either = (yes, no) => [["", "any"], ["true", yes], ["false", no]];
  const own = runs.map((run) => [run.name, `${run.name}${run.control ? ` (control: ${run.control})` : ""}`]);
  const sets = [...own, ...(reference ? [[REFERENCES, `References: ${reference.name}`]] : [])];
  $("filters").replaceChildren(
    make("h2", {}, "What is shown"),
    choice("set", "Run", sets),
    choice("filter-has_nodule", "Nodule", either("asked for or annotated", "none")),
    choice("filter-found", "Found, where asked for", either("found", "not found")),
    choice("filter-flagged", "Copy of a training sample", either("flagged", "not flagged")),
    choice("filter-by", "Order", [["row", "as drawn"], ["copy_score", "likeliest copy first"]]),
    make("h3", {}, "Attributes"),
    ...Object.entries(words).map(([name, levels]) => choice(`filter-${name}`, name[0].toUpperCase() + name.slice(1),
      [["", "any"], ...levels.map((level, at) => [at + 1, `${at + 1} · ${level}`])])),
  );
  runs.push({ ...reference, name: REFERENCES, isReference: true });
}

const currentRun = () => runs.find((run) => run.name === $("set").value);

async function load(start) {
  first = start;
  turn += 1;
  const own = turn;
  $("gallery-error").textContent = "";
  const run = currentRun();
  if (!run) {
    $("gallery-count").textContent = "The store holds no synthetic run yet: `raysynth synthesize` makes one.";
    return;
  }
  for (const [name, isKnown] of [["found", !run.isReference], ["flagged", run.verdict], ["by", run.verdict]]) {
    const list = $(`filter-${name}`);
    list.disabled = !isKnown;
    if (!isKnown) list.selectedIndex = 0;
  }
  const query = new URLSearchParams({ first, count: PAGE });
  for (const list of document.querySelectorAll("#filters select[id^=filter-]")) {
    if (list.value) query.set(list.id.replace("filter-", ""), list.value);
  }
  try {
    const { num_fitting: count, samples } = await getJson(`${pathOf(run)}?${query}`);
    if (own === turn) await showPage(run, count, samples, own);
  } catch (error) {
    $("gallery-error").textContent = error.message;
  }
}

const pathOf = (run) => (run.isReference ? "/v1/references/samples" : `/v1/runs/${run.name}/samples`);

async function showPage(run, count, samples, own) {
  const last = Math.min(first + PAGE, count);
  $("gallery-count").replaceChildren(
    `${count.toLocaleString("en")} of ${run.num_samples.toLocaleString("en")} samples. `,
    run.isReference ? make("span", { className: "mark reference" }, "reference (real or uploaded)")
      : make("span", { className: "mark synthetic" }, "synthetic · research only, not for diagnosis"),
  );
  $("gallery-page").textContent = count ? `${first + 1}–${last}` : "";
  $("earlier").disabled = first === 0;
  $("later").disabled = last >= count;
  for (const url of shownUrls) URL.revokeObjectURL(url);
  shownUrls = [];
  $("thumbnails").replaceChildren(...samples.map((sample) => thumbnail(run, sample)));
  const waiting = [...document.querySelectorAll("#thumbnails img")];
  const fill = async () => {
    for (let image = waiting.shift(); image && own === turn; image = waiting.shift()) {
      const bytes = await getBytes(`${pathOf(run)}/${image.dataset.row}`, "image/png").catch(() => null);
      if (!bytes || own !== turn) continue;
      image.src = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
      shownUrls.push(image.src);
    }
  };
  await Promise.all([fill(), fill(), fill(), fill()]);
}

function thumbnail(run, sample) {
  const kind = run.isReference ? "reference" : "synthetic";
  const words = [`No. ${sample.row + 1}`];
  if (sample.diameter_mm) words.push(`${sample.diameter_mm.toFixed(0)} mm`);
  const image = make("img", { alt: "", dataset: { row: sample.row }, width: 128, height: 128 });
  const mark = sample.flagged ? ["copy?", "bad"] : sample.found === null ? null : sample.found ? ["found", "good"] : ["not found", "warn"];
  return make("li", {}, make("button", {
    type: "button", className: "plain", "aria-label": `${kind} sample ${words.join(", ")}`, onclick: () => enlarge(run, sample),
  }, image, make("span", { className: "number" }, words.join(" · ")),
  make("span", { className: `hint ${mark ? mark[1] : ""}` }, mark ? mark[0] : kind)));
}

async function enlarge(run, sample) {
  const { hu, layout, facts } = await readNpz(await getBytes(`${pathOf(run)}/${sample.row}`, "application/x-npz"));
  const about = JSON.parse(facts.text);
  const volume = makeVolume(hu.values, hu.shape, about.depth_mm, about.pixel_mm);
  const view = makeView();
  Object.assign(view, { at: volume.shape.map((one) => one >> 1), window: windowOf(about.intensity === "hu" ? "lung" : "full", volume, about.window_hu) });
  const box = toBox(sample.box);
  const canvas = make("canvas", { role: "application", "aria-label": `sample ${sample.row + 1}, enlarged` });
  const overlay = make("input", { type: "range", min: 0, max: 100, value: 0, oninput: () => view.change() });
  const viewer = makeViewer(canvas, view, () => ({
    volume, box, unit: about.intensity === "hu" ? "HU" : "(no unit)",
    layers: overlay.value > 0 ? [{ values: layout.values, opacity: overlay.value / 100 }] : [],
  }));
  const rows = [["Box", sample.box?.join(", ") ?? "none"], ["Found", sample.found === null ? "–" : sample.found ? "yes" : "no"],
    ["Diameter", sample.diameter_mm ? `${sample.diameter_mm.toFixed(1)} mm` : "–"],
    ["Contrast", sample.contrast_hu === null ? "–" : `${sample.contrast_hu.toFixed(0)} HU`],
    ["Copied pixels", sample.copied_fraction === null ? "–" : `${(100 * sample.copied_fraction).toFixed(1)} %`],
    ["Copy score", sample.copy_score === null ? "–" : sample.copy_score.toFixed(2)],
    ...Object.entries(sample.attributes).map(([name, score]) => [name[0].toUpperCase() + name.slice(1), `${score} · ${state.models[0].words[name][score - 1]}`])];
  const mark = run.isReference ? ["reference", "reference (real or uploaded)"] : ["synthetic", "synthetic · research only, not for diagnosis"];
  const windows = make("div", { className: "group", role: "group", "aria-label": "Window" },
    ...[...Object.keys(WINDOWS), "full"].map((name) => make("button", {
      type: "button", onclick: () => view.change({ window: windowOf(name, volume, about.window_hu) }),
    }, WINDOWS[name]?.name ?? "Full")));
  const dialog = make("dialog", { className: "large", "aria-label": `Sample ${sample.row + 1} of ${run.isReference ? "the references" : run.name}` },
    make("form", { method: "dialog" },
      make("div", { className: "sides" },
        make("figure", { className: "viewer" }, canvas, make("figcaption", {}, `No. ${sample.row + 1}`, make("span", { className: `mark ${mark[0]}` }, mark[1]))),
        make("div", { className: "column" }, windows, make("label", { className: "beside" }, "Layout", overlay),
          make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", { className: "number" }, value)])))),
      make("div", { className: "row end" },
        run.isReference ? make("button", { value: "reference" }, "Use as reference") : null,
        make("button", { value: "ask" }, "Ask for the same"), make("button", { className: "primary", value: "" }, "Close"))));
  const answer = await ask(dialog);
  viewer.close();
  if (!answer) return;
  goTo("draw");
  if (answer === "reference") await takeStored(sample.row).catch((error) => ($("reference-error").textContent = error.message));
  for (const list of document.querySelectorAll("[data-score]")) list.value = sample.attributes[list.dataset.score] ?? "";
  const fits = String(state.model.shape) === String(run.shape);
  if (fits) change({ box });
}

export const referencesName = REFERENCES;
