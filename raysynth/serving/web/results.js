// Reader studies of their owner: made here, followed, and evaluated.

import { askToken, forgetToken, getJson, postJson, readFragment, request, writeFragment } from "./api.js";
import { $, ask, make, save } from "./dom.js";

const MATCHED = {
  has_nodule: "has a nodule", sphericity: "sphericity", margin: "margin",
  lobulation: "lobulation", spiculation: "spiculation", texture: "texture",
};
const VERDICTS = {
  equivalent: ["Equivalent", "equivalent"],
  different: ["Different", "different"],
  "not shown": ["Not shown either way", "open"],
};
const ANSWERS_FOR_POWER = 214; // independent ones, at delta .10: four times in five
const SVG = "http://www.w3.org/2000/svg";

let current = null; // id of the study in sight

// As the command line writes them: a tie goes to the even digit.
const writer = (digits) => {
  const format = new Intl.NumberFormat("en", {
    minimumFractionDigits: digits, maximumFractionDigits: digits, roundingMode: "halfEven", useGrouping: false,
  });
  return (value) => format.format(value).replace("-", "−");
};
const [whole, one, two, share] = [0, 1, 2, 3].map(writer);
const signed = (value) => `${value < 0 ? "−" : "+"}${share(Math.abs(value))}`;
const range = ([low, high], write = share) => `${write(low)} to ${write(high)}`;
const when = (seconds) => new Date(1000 * seconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
const day = (seconds) => new Date(1000 * seconds).toLocaleDateString(undefined, { dateStyle: "medium" });
const percent = (progress) => {
  const [answered, total] = ["answered", "total"].map((name) => progress.reduce((sum, one) => sum + one[name], 0));
  return Math.floor((100 * answered) / total);
};
const tell = (words) => ($("told").textContent = words);

async function attempt(place, act) {
  $(place).textContent = "";
  try {
    await act();
  } catch (error) {
    $(place).textContent = error.message;
  }
}

// The list.

async function loadList() {
  const studies = await getJson("/v1/studies");
  $("names").replaceChildren(...studies.map((study) => {
    const button = make("button", { type: "button", onclick: () => attempt("list-error", () => open(study.id)) },
      make("span", {}, study.wanted.title),
      make("span", { className: "hint" }, `${day(study.made_at)} · ${percent(study.progress)} % answered`));
    if (study.id === current) button.setAttribute("aria-current", "true");
    return make("li", {}, button);
  }));
  $("list-words").textContent = studies.length ? "" : "There are no studies of yours yet.";
  return studies;
}

async function open(id) {
  const results = await getJson(`/v1/studies/${id}`);
  current = id;
  writeFragment({ study: id });
  $("study").replaceChildren(...shown(results));
  await loadList();
  tell(`${results.study.wanted.title}: ${results.found ? VERDICTS[results.found.verdict][0] : "no results yet"}`);
}

// One study.

function shown({ study, found, choice_delta, rating_delta }) {
  const { wanted } = study;
  const matched = wanted.match.length ? `, matched by ${wanted.match.map((name) => MATCHED[name]).join(", ")}` : "";
  const heading = make("div", { className: "row" },
    make("div", { className: "grow" },
      make("h2", {}, wanted.title),
      make("p", { className: "hint" },
        `${wanted.per_kind} real samples (${wanted.split}) and ${wanted.per_kind} of run ${wanted.run}${matched}; seed ${wanted.seed}; ${when(study.made_at)}`)),
    make("button", { type: "button", id: "refresh", onclick: () => attempt("study-error", () => open(study.id)) }, "Refresh"),
    make("button", { type: "button", id: "download", onclick: () => attempt("study-error", () => download(study)) }, "Answers as CSV"),
    make("button", { type: "button", id: "remove", onclick: () => attempt("study-error", () => remove(study)) }, "Remove"));
  const parts = [heading, make("p", { id: "study-error", className: "bad", role: "alert" })];
  if (found) parts.push(verdict(found), limits(found), facts(found, choice_delta));
  else parts.push(make("div", { className: "verdict" }, make("strong", {}, "No results yet"),
    make("p", {}, "There are no answers yet on both real and synthetic images, calibration left out."),
    make("p", { className: "hint" }, `What counts was fixed beforehand: choices are equivalent within ±${choice_delta} of chance, ratings within ±${rating_delta}.`)));
  parts.push(readers(study, found));
  return parts;
}

function verdict(found) {
  const [words, kind] = VERDICTS[found.verdict];
  const [first, ...others] = found.sentences;
  return make("div", { className: `verdict ${kind}`, id: "verdict" },
    make("strong", {}, words),
    make("div", { className: "sentences" },
      make("p", {}, first.replace(/^[^:.]*[:.] /, "").replace(/^./, (letter) => letter.toUpperCase())),
      ...others.map((sentence) => make("p", { className: "quiet" }, sentence))));
}

function limits(found) {
  const parts = [limit("Right answers against chance", found.choice)];
  if (found.rating) {
    parts.push(limit("Ratings of synthetic against real images", found.rating,
      ` Rank-sum test of the images' means: p ${found.ratings.p.toPrecision(2)} (${found.ratings.method}).`));
  }
  return make("div", { className: "limits" }, ...parts);
}

// The estimate with its intervals, and the zone in which a difference does not matter.
function limit(title, { estimate, interval90, interval95, delta, verdict: words }, more = "") {
  const reach = 1.15 * Math.max(2 * delta, ...interval95.map(Math.abs), Math.abs(estimate));
  const x = (value) => 200 + (190 * value) / reach;
  const line = (name, from, to, y, y2 = y) => draw("line", { class: name, x1: x(from), x2: x(to), y1: y, y2 });
  const write = (value, y) => {
    const text = draw("text", { x: x(value), y, "text-anchor": "middle" });
    text.textContent = signed(value).replace(/0$/, "").replace("+0.00", "0");
    return text;
  };
  const picture = draw("svg", { viewBox: "0 0 400 74", role: "img", "aria-label": `${title}: ${signed(estimate)}, 90 % interval ${range(interval90, signed)}, limits ±${delta}` },
    draw("rect", { class: "zone", x: x(-delta), width: x(delta) - x(-delta), y: 4, height: 50 }),
    line("zero", 0, 0, 4, 54),
    line("wide-reach", ...interval95, 29), line("reach", ...interval90, 29),
    draw("circle", { class: "value", cx: x(estimate), cy: 29, r: 5 }),
    write(-delta, 69), write(0, 69), write(delta, 69));
  return make("figure", {}, make("h3", {}, title), picture,
    make("figcaption", { className: "number" }, `${signed(estimate)}; 90 % interval ${range(interval90, signed)}, 95 % ${range(interval95, signed)}. `,
      make("strong", {}, VERDICTS[words][0]), ` within ±${delta}, fixed beforehand.${more}`));
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function facts(found, delta) {
  const { pooled } = found;
  const rows = [
    ["Right answers, all readers", `${one(100 * pooled.share)} %`, `${pooled.right} of ${pooled.answers}; 95 % ${range(pooled.interval)}`],
    ["Sensitivity d′", two(pooled.d_prime.value), `95 % ${range(pooled.d_prime.interval, two)}; 0: they look alike`],
    ["Readers’ agreement", found.between_readers === null ? "–" : two(found.between_readers), "Fleiss’ kappa; 0: by chance alone, 1: full"],
    ["Power for equivalence", `${whole(100 * found.power)} %`, `of ${pooled.answers} independent answers, within ±${delta}, if readers guess; ${ANSWERS_FOR_POWER} give 80 %`],
  ];
  return make("div", { className: "facts" }, ...rows.map(([name, value, words]) => make("div", {},
    make("h3", {}, name), make("p", { className: "value number" }, value), make("p", { className: "hint" }, words))));
}

function readers(study, found) {
  const row = (name, progress, given, again, last, kind = "") => make("tr", { className: kind },
    make("th", { scope: "row" }, name), ...[
      progress,
      given ? `${share(given.share)} (${given.right} of ${given.answers})` : "–",
      given ? range(given.interval) : "–",
      given ? `${two(given.d_prime.value)} (${range(given.d_prime.interval, two)})` : "–",
      again ? `${share(again.agreed)} of ${again.items}` : "–",
      again ? two(again.kappa) : "–",
      last,
    ].map((content) => make("td", { className: "number" }, content)));
  const rows = study.progress.map((one) => row(one.reader, `${one.answered} of ${one.total}`,
    found?.readers[one.reader], found?.within_reader[one.reader],
    make("button", { type: "button", "aria-label": `New link for ${one.reader}`, onclick: () => attempt("study-error", () => newLink(study, one.reader)) }, "New link")));
  if (found && rows.length > 1) rows.push(row("All readers", `${percent(study.progress)} %`, found.pooled, null, "", "all"));
  const names = ["Reader", "Answered", "Right", "95 % interval", "d′ (95 %)", "Same on repeats", "Kappa", "Link"];
  return make("div", {}, make("h3", {}, "Readers"), make("table", { id: "readers" },
    make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows)));
}

// What can be done with it.

async function download(study) {
  const answer = await request("GET", `/v1/studies/${study.id}/answers`, { accept: "text/csv" });
  save(await answer.arrayBuffer(), "text/csv", `reader-study-${study.id.slice(0, 8)}.csv`);
}

async function newLink(study, reader) {
  const sure = make("dialog", { "aria-labelledby": "sure-title" }, make("form", { method: "dialog" },
    make("h2", { id: "sure-title" }, `A new link for ${reader}?`),
    make("p", {}, "The old one ends at once. Answers stay, and the reader goes on where they were."),
    make("div", { className: "row end" }, make("button", { value: "" }, "Cancel"), make("button", { className: "primary", value: "yes" }, "Make it"))));
  if ((await ask(sure)) === "yes") await showLinks([await postJson(`/v1/studies/${study.id}/links`, { reader })]);
}

async function remove(study) {
  const sure = make("dialog", { "aria-labelledby": "sure-title" }, make("form", { method: "dialog" },
    make("h2", { id: "sure-title" }, `Remove “${study.wanted.title}”?`),
    make("p", {}, "Its images, links and all answers are deleted, for good. Download the answers first."),
    make("div", { className: "row end" }, make("button", { className: "primary", value: "" }, "Keep it"), make("button", { value: "yes" }, "Remove"))));
  if ((await ask(sure)) !== "yes") return;
  await request("DELETE", `/v1/studies/${study.id}`);
  current = null;
  writeFragment({});
  $("study").replaceChildren(make("p", { className: "quiet" }, "Choose a study, or make one."));
  await loadList();
}

function showLinks(links) {
  const rows = links.map(({ reader, link }) => {
    const field = make("input", { readOnly: true, value: location.origin + link, onfocus: (event) => event.target.select() });
    const copy = make("button", { type: "button", "aria-label": `Copy the link of ${reader}`, onclick: async () => {
      field.select();
      await navigator.clipboard.writeText(field.value);
      copy.textContent = "Copied";
    } }, "Copy");
    return make("div", { className: "row" }, make("label", {}, reader, field), copy);
  });
  return ask(make("dialog", { className: "links", "aria-labelledby": "links-title" }, make("form", { method: "dialog" },
    make("h2", { id: "links-title" }, links.length > 1 ? "The readers' links" : "The reader's link"),
    make("p", {}, "They are shown this once. Send each reader theirs alone: whoever has it answers as that reader, and sees real images of the store."),
    ...rows,
    make("div", { className: "row end" }, make("button", { className: "primary" }, "I have kept them")))));
}

// The form.

const form = () => $("make-form").elements;

async function openForm() {
  $("make-error").textContent = "";
  $("make").showModal();
  sayLength();
  // A token that may not see the store's runs can still name one.
  const runs = await getJson("/v1/runs").catch(() => []);
  $("runs").replaceChildren(...runs.map((run) => make("option", { value: run.name }, `${run.num_samples} samples`)));
  if (!form().run.value && runs.length) form().run.value = runs[0].name;
}

function wanted() {
  const fields = form();
  return {
    title: fields.title.value.trim(),
    run: fields.run.value.trim(),
    readers: fields.readers.value.split(",").map((name) => name.trim()).filter(Boolean),
    per_kind: Number(fields.per_kind.value),
    calibration: Number(fields.calibration.value),
    repeat_share: Number(fields.repeat_share.value) / 100,
    task: fields.task.value,
    split: fields.split.value,
    seed: Number(fields.seed.value),
    match: [...document.querySelectorAll("#match input:checked")].map((box) => box.value),
    tell_share: fields.tell_share.checked,
  };
}

function sayLength() {
  const { per_kind, calibration, repeat_share, readers: names } = wanted();
  const shown = 2 * per_kind + 2 * calibration + Math.floor(2 * per_kind * repeat_share);
  const counted = 2 * per_kind * names.length;
  $("make-hint").textContent = `Each reader sees ${shown} images; ${counted} answers count. About ${ANSWERS_FOR_POWER} independent ones show equivalence four times in five, of readers on the same images two to three times as many.`;
}

async function submit(event) {
  event.preventDefault();
  $("make-submit").disabled = true;
  for (const field of $("make-form").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  try {
    const made = await postJson("/v1/studies", wanted());
    $("make").close();
    await showLinks(made.links);
    await open(made.id);
  } catch (error) {
    $("make-error").textContent = error.message;
    const field = form()[(error.field ?? "").split(".")[0]];
    if (field?.setAttribute) {
      field.setAttribute("aria-invalid", "true");
      field.focus();
    }
  } finally {
    $("make-submit").disabled = false;
  }
}

async function start() {
  const id = readFragment().get("study");
  $("match").replaceChildren(...Object.entries(MATCHED).map(([name, words]) => make("label", { className: "beside" },
    make("input", { type: "checkbox", value: name }), words)));
  $("new-study").addEventListener("click", openForm);
  $("make-form").addEventListener("submit", submit);
  $("make-form").addEventListener("input", sayLength);
  $("make-cancel").addEventListener("click", () => $("make").close());
  $("change-token").addEventListener("click", async () => {
    forgetToken();
    await askToken("Give the token that shall be used from now on.").catch(() => {});
    location.reload();
  });
  await attempt("list-error", async () => {
    const studies = await loadList();
    const first = studies.find((study) => study.id === id) ?? studies[0];
    if (first) await open(first.id);
  });
  document.body.dataset.ready = "yes";
}

start();
