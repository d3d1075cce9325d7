// Streams of the metrics service, as they come: values with intervals and floors, and their course.

import { events, getJson } from "./api.js";
import { $, make } from "./dom.js";

const NAMES = { fid: "FID", kid: "KID", mmd2: "MMD²" };
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [300, 84];

let stop = null;
let course = []; // {count, metrics}

export async function openMetrics() {
  const streams = await getJson("/v1/metrics");
  const before = $("stream").value;
  $("stream").replaceChildren(...streams.map(({ name, reference }) =>
    make("option", { value: name }, `${name} (against ${reference === "store" ? "the store's test patients" : "samples that were sent"})`)));
  $("stream").onchange = follow;
  if (streams.some(({ name }) => name === before)) $("stream").value = before;
  $("metrics-error").textContent = "";
  if (streams.length) follow();
  else {
    $("metrics-counts").textContent = "";
    $("metrics-values").replaceChildren(make("p", { className: "hint" },
      "There is no stream. Start the service with serving.metrics=true to compare all that is drawn, or open one at /v1/metrics/NAME."));
  }
}

export function closeMetrics() {
  stop?.abort();
  stop = null;
}

async function follow() {
  closeMetrics();
  course = [];
  const own = (stop = new AbortController());
  $("metrics-values").replaceChildren();
  try {
    for await (const { data } of events(`/v1/metrics/${$("stream").value}/events`, own.signal)) show(data);
  } catch (error) {
    if (error.name !== "AbortError") $("metrics-error").textContent = error.message;
  }
}

function show({ counts, metrics }) {
  course.push({ count: counts.synthetic, metrics });
  $("metrics-counts").textContent = `${counts.synthetic.toLocaleString("en")} synthetic and ${counts.real.toLocaleString("en")} real samples`;
  const keys = Object.keys(metrics).sort();
  if (!keys.length) {
    $("metrics-values").replaceChildren(make("p", { className: "hint" }, "Too few samples for a value so far: they appear here as more come."));
    return;
  }
  $("metrics-values").replaceChildren(...keys.map((key) => card(key, metrics[key])));
}

function card(key, value) {
  const [metric, space, region, extractor] = key.split("/");
  const interval = value.low === null ? "too few samples for an interval" : `95 %: ${short(value.low)} to ${short(value.high)}`;
  const floor = value.floor === null ? "no floor: one patient" : `floor ${short(value.floor)}`;
  return make("article", { className: "metric" },
    make("h3", {}, `${NAMES[metric] ?? metric} · ${region}`),
    make("p", { className: "value number" }, short(value.value)),
    make("p", { className: "hint number" }, `${interval} · ${floor}`),
    chart(key),
    make("p", { className: "hint number" }, `${extractor} · ${space} · ${value.n} against ${value.n_reference}`));
}

const short = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString());

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// The value over the samples counted, its interval as a band, its floor dashed.
function chart(key) {
  const points = course.map(({ count, metrics }) => ({ count, ...metrics[key] })).filter((one) => one.value !== undefined);
  const levels = points.flatMap((one) => [one.value, one.low, one.high, one.floor]).filter((one) => one !== null && one !== undefined);
  const [low, high] = [Math.min(...levels), Math.max(...levels)];
  const [from, to] = [points[0].count, points.at(-1).count];
  const x = (count) => 4 + ((count - from) / Math.max(1, to - from)) * (WIDTH - 8);
  const y = (level) => HEIGHT - 6 - ((level - low) / Math.max(1e-12, high - low)) * (HEIGHT - 12);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `course of ${key} over ${points.length} readings` });
  const banded = points.filter((one) => one.low !== null);
  if (banded.length > 1) {
    const edge = [...banded.map((one) => [one.count, one.high]), ...banded.reverse().map((one) => [one.count, one.low])];
    svg.append(shape("polygon", { class: "band", points: edge.map(([count, level]) => `${x(count)},${y(level)}`).join(" ") }));
  }
  const { floor } = points.at(-1);
  if (floor !== null) svg.append(shape("line", { class: "floor", x1: 4, x2: WIDTH - 4, y1: y(floor), y2: y(floor) }));
  svg.append(shape("polyline", { class: "course", points: points.map((one) => `${x(one.count)},${y(one.value)}`).join(" ") }));
  svg.append(shape("circle", { class: "now", cx: points.length > 1 ? x(to) : 4, cy: y(points.at(-1).value), r: 3 }));
  return svg;
}
