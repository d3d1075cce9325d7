"""All that was found out about a run on one card: a line for each claim, with what it rests on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from raysynth.evaluation.regions import is_generated
from raysynth.evaluation.sensitivity import EVIDENCE, PHANTOMS

MIN_FID_SAMPLES = 2000
"""With fewer, KID stands on the card: its value does not depend on N (methods, F.2)."""

CONTROLS = {
    "shuffled": "exchanged requests",
    "copy_paste": "pasted nodules",
    "untrained": "an untrained network",
    "constant": "tissue means",
}
"""Columns a run must be better than, the hardest first, and how they are called."""

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One claim.

    Attributes:
        what: is claimed of.
        compared: with what, and how many.
        measure: metric and extractor, or the test.
        figure: value and interval.
        floor: what real patients reach.
        control: what the same figure is of something that should be worse.
        verdict: in words.
        standing: what the figure is worth; see `raysynth.evaluation.sensitivity.standing`.
    """

    what: str
    compared: str
    measure: str
    figure: str
    floor: str
    control: str
    verdict: str
    standing: str


HEADING = ("", "compared", "measure", "figure", "floor", "control", "verdict", "standing")


def scorecard(found: Found, folder: Path) -> list[Line]:
    """The card of a run.

    Args:
        found: the evaluation's JSON.
        folder: where it lies, and the JSON files of the run's usefulness trial and privacy audit if
            there are any.

    Returns:
        Distances that are evidence first.
    """
    distances = sorted(_distances(found), key=lambda line: line.standing != EVIDENCE)
    measured = PHANTOMS if _on_phantoms(found) else "measured"
    lines = [*distances, *_adherence(found), *_diversity(found), *_worst(found)]
    for ending, read in (("downstream", _usefulness), ("audit", _privacy)):
        path = folder / f"{found['name']}_{ending}.json"
        if path.exists():
            lines += read(json.loads(path.read_text(encoding="utf-8")), measured)
        else:
            lines.append(_not_run(ending))
    return lines


def card_table(lines: Sequence[Line]) -> list[list[str]]:
    """Heading and rows."""
    return [list(HEADING), *(list(astuple(line)) for line in lines)]


def headline(lines: Sequence[Line]) -> str:
    """What may be said first of all."""
    evidence = [line for line in lines if line.standing == EVIDENCE]
    if not evidence:
        return (
            "No headline: no figure here is evidence of quality, see the column 'standing' of each."
        )
    return " ".join(f"{line.what}: {line.verdict}." for line in evidence)


def _on_phantoms(found: Found) -> bool:
    return PHANTOMS in found["standing"].values()


def _distances(found: Found) -> Iterator[Line]:
    best: dict[str, str] = {}
    for key in found["metrics"]:
        metric, _, region, extractor, n = key.split("/")
        wanted = "hu_w1" if extractor.startswith("histogram") else "kid"
        if wanted == "kid" and int(n) >= MIN_FID_SAMPLES:
            wanted = "fid"
        place = f"{region}/{extractor}"
        fuller = place not in best or _num_columns(found, key) > _num_columns(found, best[place])
        if metric == wanted and fuller:
            best[place] = key
    for place, key in sorted(best.items(), key=lambda one: not is_generated(one[0].split("/")[0])):
        region, extractor = place.split("/")
        metric = found["metrics"][key]
        name = next((one for one in CONTROLS if one in metric["columns"]), None)
        yield Line(
            what=region.replace("_", " "),
            compared=f"{metric['n']} synthetic with {metric['n']} of "
            f"{metric['reference_patients']} held-out patients",
            measure=f"{key.partition('/')[0]} of {extractor}",
            figure=figure_text(metric),
            floor=figure_text(metric["columns"].get("floor")),
            control="-"
            if name is None
            else f"{CONTROLS[name]}: {figure_text(metric['columns'][name])}",
            verdict=verdict(metric),
            standing=found["standing"][key],
        )


def verdict(metric: Found) -> str:
    """Where a distance stands between its floor and its controls, as far as intervals tell."""
    columns, disjoint = metric["columns"], metric["disjoint"]
    said = []
    if "floor" in disjoint:
        apart = disjoint["floor"]
        further = metric["value"] > columns["floor"]["value"]
        said.append(
            "as near as other patients are, as far as this many samples tell"
            if not apart
            else "further away than other patients are"
            if further
            else "nearer than other patients are: look for copies"
        )
    else:
        said.append("no floor, too few patients")
    for name, text in CONTROLS.items():
        if name in disjoint:
            better = metric["value"] < columns[name]["value"]
            said.append(
                f"not told from {text}"
                if not disjoint[name]
                else f"{'better' if better else 'worse'} than {text}"
            )
    return "; ".join(said)


def _num_columns(found: Found, key: str) -> tuple[int, int]:
    return len(found["metrics"][key]["columns"]), found["metrics"][key]["n"]


def figure_text(figure: Found | None) -> str:
    """A value with its interval, as it stands in a JSON file."""
    if figure is None or figure["value"] is None:
        return "-"
    text = f"{figure['value']:.3g}"
    if figure["interval"] is None:
        return f"{text} (no interval)"
    low, high = figure["interval"]
    return f"{text} [{low:.3g}, {high:.3g}]"


def _share(share: Found | None) -> str:
    if share is None or share["found"] is None:
        return "-"
    low, high = share["interval"]
    return f"{share['found']:.1%} [{low:.1%}, {high:.1%}]"


def _adherence(found: Found) -> Iterator[Line]:
    shares = found["adherence"]
    own = shares["synthetic"]
    if not own["n"]:
        return
    name, text = "shuffled", CONTROLS["shuffled"]
    if name not in shares:
        name, text = "synthetic_stray", "boxes of other slices"
    other = shares.get(name)
    heard = other is not None and other["found"] is not None
    above = heard and own["interval"][0] > other["interval"][1]
    yield Line(
        what="nodule where asked",
        compared=f"{own['n']} boxes",
        measure="share in which a nodule is found again",
        figure=_share(own),
        floor=f"annotated real ones: {_share(shares.get('real'))}",
        control=f"{text}: {_share(other)}",
        verdict="follows its requests" if above else "not shown to follow its requests",
        standing=PHANTOMS if _on_phantoms(found) else "measured in the image",
    )


def _diversity(found: Found) -> Iterator[Line]:
    keeps = found["fills"] and found["fills"]["synthetic"]["copied_fraction"] > 0
    for key, of_sets in found["diversity"].items():
        metric, _, region, version, n = key.split("/")
        own, patients = of_sets["synthetic"], of_sets.get("patients")
        yield Line(
            what="diversity",
            compared=f"{n} pairs of one request",
            measure=f"{metric} of {region} ({version}), best like patients",
            figure=figure_text(own),
            floor=f"nodules of two patients that are alike: {figure_text(patients)}",
            control="-",
            verdict=_varies(metric, own, patients)
            + ("; both samples keep their host's tissue" if keeps else ""),
            standing=PHANTOMS if _on_phantoms(found) else "measured in the image",
        )


def _varies(metric: str, own: Found, patients: Found | None) -> str:
    """Whether samples of one request differ as much as patients do."""
    if patients is None or own["interval"] is None or patients["interval"] is None:
        return "nothing to compare with, too few nodules"
    if own["interval"][0] <= patients["interval"][1] and (
        patients["interval"][0] <= own["interval"][1]
    ):
        return "as varied as patients, as far as this many pairs tell"
    more_alike = own["value"] > patients["value"]
    if metric == "lpips":  # a distance
        more_alike = not more_alike
    return "less varied than patients" if more_alike else "more varied than patients"


def _worst(found: Found) -> Iterator[Line]:
    measured = [one for one in found["strata"] if one["distance"] is not None]
    if not measured:
        return
    worst = measured[0]
    yield Line(
        what=f"worst stratum: {worst['factor']} {worst['name']}",
        compared=f"{worst['distance']['n']} synthetic nodules with as many real ones, of "
        f"{len(measured)} strata",
        measure=f"kid of {worst['key'].split('/')[3]}",
        figure=figure_text(worst["distance"]),
        floor=figure_text(worst["distance"]["columns"].get("floor")),
        control="-",
        verdict=f"nodule found in {_share(worst['found'])} of them; {verdict(worst['distance'])}",
        standing="picked as the worst of many: look at the table of strata",
    )


def _usefulness(trial: Found, measured: str) -> Iterator[Line]:
    patients = trial["patients"]
    for said in trial["verdicts"]:
        yield Line(
            what="usefulness",
            compared=f"{patients['held_out']} held-out patients of {patients['real']}",
            measure="downstream trial",
            figure="-",
            floor="-",
            control="-",
            verdict=said,
            standing="indicative: few patients" if trial["indicative"] else measured,
        )


def _privacy(audit: Found, measured: str) -> Iterator[Line]:
    yield Line(
        what="privacy",
        compared=f"{audit['samples']} synthetic samples with all training ones",
        measure="nearest training neighbours",
        figure=f"{audit['flagged']} count as copies, {audit['exact']} are the same picture",
        floor="-",
        control="-",
        verdict=f"{audit['verdict']}: {'; '.join(audit['reasons'])}",
        standing=measured,
    )


def _not_run(verb: str) -> Line:
    what = "usefulness" if verb == "downstream" else "privacy"
    return Line(what, "-", "-", "-", "-", "-", f"not known: run raysynth {verb}", "-")
