// Requests under way and of before: drawing one, watching it, what came of it.

import { events, getBytes, getJson, postJson, readFragment, request, writeFragment } from "./api.js";
import { $, make, save } from "./dom.js";
import { clearErrors, readRequest, sentLabels, showRefusal, writeRequest } from "./form.js";
import { readNpz } from "./npz.js";
import { change, middle, onChange, setWindow, state, toBox } from "./state.js";
import { makeVolume, WINDOWS } from "./viewer.js";

const SHOWN_JOBS = 60;
const ENDINGS = { png: "image/png", npz: "application/x-npz", "nii.gz": "application/x-nifti", "dicom.zip": "application/zip" };
const UNFINISHED = ["waiting", "drawing"];
const STATES = { waiting: "waits", drawing: "is drawn", done: "done", failed: "failed", cancelled: "cancelled" };

let watched = null; // {id, stop}
let history = [];

export function startJobs(tell) {
  $("request").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!watched) attempt(() => submit(tell));
  });
  $("cancel").addEventListener("click", () => attempt(cancel));
  onChange(() => {
    $("has-result").hidden = state.result === null;
    $("no-result").hidden = state.result !== null;
  });
  for (const button of document.querySelectorAll("[data-download]")) {
    button.addEventListener("click", () => attempt(() => download(button.dataset.download)));
  }
}

async function attempt(act) {
  clearErrors();
  try {
    await act();
  } catch (error) {
    if (error.name !== "AbortError") showRefusal(error);
  }
}

async function submit(tell) {
  $("sample").disabled = true;
  $("progress-words").textContent = "Asking …";
  try {
    const asked = await readRequest();
    const job = await postJson("/v1/jobs", asked);
    await loadHistory();
    watch(job.id, tell);
  } catch (error) {
    rest("Nothing is being drawn.");
    throw error;
  }
}

function rest(words) {
  $("sample").disabled = false;
  $("cancel").hidden = true;
  $("progress").value = 0;
  $("progress-words").textContent = words;
}

async function cancel() {
  if (watched) await request("DELETE", `/v1/jobs/${watched.id}`);
}

// Follows a job to its end, and shows what comes.
export async function watch(id, tell) {
  watched?.stop.abort();
  const own = (watched = { id, stop: new AbortController() });
  const fragment = readFragment();
  fragment.set("job", id);
  writeFragment(fragment);
  $("sample").disabled = true;
  $("cancel").hidden = false;
  $("progress").removeAttribute("value");
  $("progress-words").textContent = "Waits for its turn …";
  tell("The sample was asked for.");
  let quarter = 0;
  try {
    for await (const { name, data } of events(`/v1/jobs/${id}/events`, own.stop.signal)) {
      if (name === "step" && data.num_steps) {
        if ($("progress").position < 0) loadHistory();
        $("progress").max = data.num_steps;
        $("progress").value = data.step;
        $("progress-words").textContent = `Step ${data.step} of ${data.num_steps}`;
        const now = Math.floor((4 * data.step) / data.num_steps);
        if (now > quarter) tell(`Step ${data.step} of ${data.num_steps}`);
        quarter = Math.max(quarter, now);
      } else if (name === "preview") await showPreview(data.png);
    }
    if (watched === own) await finish(id, tell);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (watched === own) watched = null;
    change({ preview: null });
    rest("Lost sight of it: your requests on the right show how far it is.");
    showRefusal(error);
  }
}

async function finish(id, tell) {
  const job = await getJson(`/v1/jobs/${id}`);
  watched = null;
  change({ preview: null });
  if (job.state === "done") await open(job);
  const words = { done: "Done.", failed: "It failed.", cancelled: "Cancelled." }[job.state] ?? "";
  rest(words);
  if (job.state === "failed") showRefusal(new Error(job.error));
  tell(words);
  await loadHistory();
}

// A preview is a grey picture in the model's window; of a volume its middle plane.
async function showPreview(png) {
  const bytes = Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), { colorSpaceConversion: "none" });
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const [low, high] = state.model.window_hu;
  const values = Int16Array.from({ length: data.length / 4 }, (_, at) => low + (data[4 * at] / 255) * (high - low));
  if (watched) change({ preview: makeVolume(values, [bitmap.height, bitmap.width], 1, state.model.pixel_mm) });
}

// What came of a job, in the viewer and beside it.
export async function open(job) {
  const asked = await getJson(`/v1/jobs/${job.id}/request`);
  const { hu, facts } = await readNpz(await getBytes(`/v1/jobs/${job.id}/result`, ENDINGS.npz));
  const about = JSON.parse(facts.text);
  const volume = makeVolume(hu.values, hu.shape, about.depth_mm, about.pixel_mm);
  const result = { job, volume, about, box: toBox(asked.box), layout: await sentLabels(asked.layout) };
  if (String(state.view.shape) !== String(volume.shape)) {
    Object.assign(state.view, { shape: volume.shape, at: result.box && volume.isVolume ? centre(result.box) : middle(volume), zoom: 1, pan: [0, 0] });
  }
  const { tool } = state.view;
  if (["paint", "region", "box"].includes(tool)) state.view.tool = "window";
  change({ result, shown: "result" });
  if (about.intensity !== "hu" && WINDOWS[state.view.preset]) setWindow("full");
  showFacts(job, about);
  await showAdherence(job, asked, about);
}

const centre = (box) => [0, 1, 2].map((at) => (box[at] + box[at + 3]) >> 1);

function facts(list, rows) {
  list.replaceChildren(...rows.filter(Boolean).flatMap(([name, value, mark = ""]) => [
    make("dt", {}, name), make("dd", { className: `number ${mark}` }, value),
  ]));
}

function showFacts(job, about) {
  const copied = about.copied_fraction > 0 && ["Copied", `${(100 * about.copied_fraction).toFixed(1)} % of pixels`];
  facts($("result-facts"), [
    ["Model", about.model],
    ["Seed", String(job.seed)],
    ["Batch shape", String(about.batch_shape)],
    ["Bundle", about.bundle.slice(0, 12)],
    copied,
  ]);
}

async function showAdherence(job, asked, about) {
  const isMeasured = asked.box && about.intensity === "hu";
  $("adherence").hidden = !isMeasured;
  if (!isMeasured) return;
  const found = await getJson(`/v1/jobs/${job.id}/adherence`).catch(() => null);
  $("adherence").hidden = !found;
  if (!found) return;
  const mm = (value) => (value === null ? "–" : `${value.toFixed(1)} mm`);
  facts($("adherence-facts"), [
    ["Nodule", found.found ? "found" : "not found", found.found ? "good" : "warn"],
    ["Diameter", mm(found.diameter_mm)],
    ["Asked for", mm(found.requested_diameter_mm)],
    ["Off centre", mm(found.offset_mm)],
    ["Mean", found.mean_hu === null ? "–" : `${found.mean_hu.toFixed(0)} HU`],
    ["Contrast", `${found.contrast_hu.toFixed(0)} HU`],
  ]);
}

async function download(media) {
  const { job } = state.result;
  const bytes = await getBytes(`/v1/jobs/${job.id}/result`, media);
  const ending = Object.keys(ENDINGS).find((one) => ENDINGS[one] === media);
  save(bytes, media, `synthetic_${job.model}_${job.seed}.${ending}`);
}

// The list of one's requests.

export async function loadHistory() {
  history = (await getJson("/v1/jobs")).filter((job) => job.kind === "sample").slice(0, SHOWN_JOBS);
  $("no-history").hidden = history.length > 0;
  $("history").replaceChildren(...history.map(item));
  return history;
}

function item(job) {
  const time = job.asked_at ? new Date(1000 * job.asked_at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : "";
  const isKnown = state.models.some((model) => model.name === job.model);
  const title = `${job.model}, seed ${job.seed}, ${STATES[job.state]}`;
  const line = make("button", {
    type: "button", className: "plain entry", disabled: !isKnown, "aria-label": `Open again: ${title}`,
    onclick: () => attempt(() => reopen(job)),
  },
  make("span", { className: `dot ${job.state}`, "aria-hidden": "true" }),
  make("span", { className: "grow" }, make("span", { className: "name" }, job.model), make("span", { className: "hint number" }, `seed ${job.seed}`)),
  make("span", { className: "hint number" }, job.state === "done" ? time : STATES[job.state]));
  const again = make("button", {
    type: "button", disabled: !isKnown, "aria-label": `Repeat: ${title}`, title: "Ask for the same again",
    onclick: () => attempt(() => repeat(job)),
  }, "↻");
  return make("li", { dataset: { job: job.id } }, line, again);
}

let tellAll = () => {};

export const useVoice = (tell) => (tellAll = tell);

async function reopen(job) {
  const now = await getJson(`/v1/jobs/${job.id}`);
  await writeRequest(await getJson(`/v1/jobs/${job.id}/request`)).catch((error) => showRefusal(error));
  if (UNFINISHED.includes(now.state)) watch(job.id, tellAll);
  else if (now.state === "done") await open(now);
  else {
    rest(now.state === "failed" ? "It failed." : "It was cancelled.");
    if (now.error) showRefusal(new Error(now.error));
  }
  const fragment = readFragment();
  fragment.set("job", job.id);
  writeFragment(fragment);
}

async function repeat(job) {
  const asked = await getJson(`/v1/jobs/${job.id}/request`);
  const again = await postJson("/v1/jobs", { ...asked, previews: true });
  await loadHistory();
  watch(again.id, tellAll);
}

// After a reload: the job of the address, or whatever is still under way.
export async function resume() {
  const named = readFragment().get("job");
  const job = history.find((one) => one.id === named) ?? history.find((one) => UNFINISHED.includes(one.state));
  if (job) await attempt(() => reopen(job));
}
