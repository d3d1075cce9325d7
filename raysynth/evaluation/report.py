"""Gathers what a run left behind and has it shown as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr
from numpy.typing import NDArray

from raysynth import __version__
from raysynth.case import Label, Nodule
from raysynth.condition import Box, Condition
from raysynth.config import ExperimentConfig, Gan, HoleFilling, LayoutGuided, OfLatents
from raysynth.config.model import Window
from raysynth.evaluation.findings import write_findings
from raysynth.evaluation.limits import detail, limits
from raysynth.evaluation.scorecard import card_table, figure_text, headline, scorecard
from raysynth.evaluation.sets import space_of
from raysynth.evaluation.sweep_report import sweep_section
from raysynth.evaluation.volume_pictures import compared_tiles, planes_tile, scrolls
from raysynth.layout.holes import layout_hole
from raysynth.models.bundle import read_facts
from raysynth.models.facts import ATTRIBUTION, BundleFacts
from raysynth.progress import stage_seconds
from raysynth.report.html import Estimate, Losses, MetricRow, ReportData, Tile, write_report
from raysynth.report.pictures import DISPLAY_WINDOW_HU
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.hosts import plan_inpainting
from raysynth.sampling.planner import PlannedSample
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet, VolumeAttrs, case_attrs, open_group
from raysynth.store.repository import open_root
from raysynth.store.shards import ShardedArray
from raysynth.training.history import HISTORY_FILE, read_history
from raysynth.volume import RELATIVE_RANGE
from storage_schema.v1 import SPLITS

GALLERY_SIZE = 12
"""Samples of either kind side by side."""

NUM_FRAMES = 6
"""Pictures of one sample's denoising."""

MAX_STEPS = 50
"""DDIM steps of that sample."""

MAX_NODULES = 12
NODULE_VIEW_MM = 60.0
"""Side of the native-resolution pictures of real nodules."""

COLUMNS = {
    "floor": "floor",
    "neighbour": "neighbouring slices",
    "copy_paste": "pasted nodules",
    "shuffled": "shuffled conditions",
    "constant": "tissue means",
    "untrained": "untrained",
}
"""What stands beside a metric, in this order, and how it is called."""

SHOWN_METRICS = ("fid", "kid")
"""Metrics with a chart; the table has all."""

NAMES = {
    "synthetic": "synthetic, where asked for",
    "synthetic_stray": "synthetic, boxes of other samples (chance)",
    "shuffled": "drawn under another's request",
    "untrained": "untrained network",
    "real": "{}, where readers marked a nodule",
    "real_stray": "{}, boxes of other samples (chance)",
}


def report(config: ExperimentConfig) -> Path:
    """Writes `work_dir`/evaluation/`name`.html from the store, the bundles and the figures.

    The scorecard goes into the figures' JSON file, too: what is known of usefulness and privacy by
    now stands on it.
    """
    path = config.work_dir / "evaluation" / f"{config.name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    card = scorecard(found, path.parent)
    found["scorecard"] = [asdict(line) for line in card]
    write_findings(path, found)
    root = open_root(config.store_url, found["snapshot"])
    real = SampleSet(open_group(root, f"samples/{config.samples.name}"))
    synthetic = SampleSet(open_group(root, f"synthetic/{config.name}"))
    seconds, losses = _seconds(config), _losses(config)
    frames = _denoising_tiles(config, real, synthetic)
    bundle = read_facts(config.bundle_path)
    phantoms = bundle.sources == ("phantom",)
    reference = "phantom" if phantoms else "real"
    page = path.with_suffix(".html")
    space = space_of(real)
    volumes = space == "volume"
    write_report(
        ReportData(
            title=f"Synthetic lung CT beside {reference} patients",
            reference=reference,
            facts=_facts(root, found, reference, real, synthetic),
            notices=found["notices"],
            nodules=_nodule_tiles(root, real.attrs["cases"]),
            real=real_tiles(real),
            synthetic=synthetic_tiles(synthetic),
            denoising=frames,
            headline=headline(card),
            scorecard=card_table(card),
            metrics=[
                metric_row(key, result, found["standing"][key])
                for key, result in found["metrics"].items()
            ],
            strata=strata_table(found),
            sensitivity=sensitivity_table(found),
            shown_metrics=SHOWN_METRICS,
            adherence={
                text.format(reference): found_share(found["adherence"], name)
                for name, text in NAMES.items()
                if found["adherence"]["synthetic"]["n"]
            }
            | _diameters(found)
            | _counts(found, reference)
            | _cohort(found),
            requested_mm=np.array(found["sizes"]["synthetic"]["requested_mm"]),
            measured_mm=np.array(found["sizes"]["synthetic"]["measured_mm"]),
            attribute_names=list(found["coverage"]),
            requested_scores=_coverage(found, "requested"),
            reference_scores=_coverage(found, "reference"),
            consistency=_consistency(found, reference),
            fills=_fills(found),
            diversity=diversity_table(found),
            sweep=sweep_section(found, config.sampling.guidance_scale),
            losses=losses,
            seconds=seconds,
            recipe=yaml.safe_dump(config.shareable(), sort_keys=False),
            attribution=_attribution(config),
            limits=limits(
                found,
                (detail(real) or 0.0, detail(synthetic)),
                frames,
                losses,
                bundle.intensity,
                space,
            ),
            window_hu=display_window(bundle),
            space=space,
            scrolls=scrolls(real, synthetic, reference) if volumes else (),
            compared=compared_tiles(real, synthetic, reference, display_window(bundle))
            if volumes and isinstance(config.model, LayoutGuided)
            else (),
        ),
        page,
    )
    return page


def _facts(
    root: zarr.Group,
    found: dict[str, Any],
    reference: str,
    real: SampleSet,
    synthetic: SampleSet,
) -> dict[str, str]:
    nodules = sum(len(case_attrs(root, case).nodules) for case in real.attrs["cases"])
    facts = {
        f"{reference} patients": f"{found['patients']['real']}",
        "held-out patients": f"{found['patients']['reference']}",
        "nodules read": f"{nodules}",
        f"{reference} {space_of(real)}s": f"{real.count:,}",
        f"synthetic {space_of(real)}s": f"{synthetic.count:,}",
    }
    if found["adherence"]["synthetic"]["n"]:
        share = found_share(found["adherence"], "synthetic").partition(" ")[0]
        facts["nodule where asked"] = f"{share} %"
    return facts


def _nodule_tiles(root: zarr.Group, cases: Sequence[str]) -> list[Tile]:
    """Real nodules at native resolution with the readers' consensus: all, or evenly picked."""
    nodules = [
        (number, attributes, nodule)
        for number, attributes in enumerate(case_attrs(root, case_id) for case_id in cases)
        for nodule in attributes.nodules
    ]
    picked = np.linspace(0, len(nodules) - 1, min(len(nodules), MAX_NODULES)).astype(int)
    return [_nodule_tile(root, *nodules[index]) for index in picked]


def _nodule_tile(root: zarr.Group, number: int, case: VolumeAttrs, nodule: Nodule) -> Tile:
    """The plane of the nodule's largest area."""
    z = nodule.corner_zyx[0] + int(nodule.mask.sum(axis=(1, 2)).argmax())
    half = round(NODULE_VIEW_MM / 2 / case.spacing_mm[1])
    y, x = (round(centre) for centre in nodule.centre_zyx[1:])
    view = np.s_[0, max(0, y - half) : y + half, max(0, x - half) : x + half]
    hu, layout = (
        ShardedArray(root.store, f"volumes/{case.case_id}/{name}").read(z, z + 1)[view]
        for name in ("hu", "layout")
    )
    outline = np.where(layout == Label.NODULE, layout, np.uint8(0))
    readers = len(nodule.ratings)
    caption = f"case {number + 1}, {nodule.diameter_mm:.0f} mm, {readers} readers"
    return Tile(hu, outline, caption=caption)


def real_tiles(real: SampleSet) -> list[Tile]:
    """Held-out samples; those with a nodule first."""
    held_out = real.index["split"] == SPLITS.index("test")
    with_nodule = np.flatnonzero(held_out & (real.index["box"][:, 0] >= 0))
    others = np.flatnonzero(held_out & (real.index["box"][:, 0] < 0))
    rng = np.random.default_rng(seed_of("gallery", real.count))
    rows = np.concatenate([rng.permutation(with_nodule), rng.permutation(others)])[:GALLERY_SIZE]
    return [_tile(real, int(row), f"case {real.index['case'][row] + 1}") for row in np.sort(rows)]


def synthetic_tiles(synthetic: SampleSet) -> list[Tile]:
    """The first samples of the run: nobody chose them."""
    tiles = []
    for row in range(min(GALLERY_SIZE, synthetic.count)):
        box = synthetic.index["box"][row, 0] >= 0
        scores = ", ".join(str(score) for score in synthetic.index["attributes"][row])
        prompt = _prompt(synthetic, row)
        seen = "found" if synthetic.index["found"][row] else "nothing found"
        copied = synthetic.index["copied_fraction"][row]
        said = prompt or f"scores {scores}"
        caption = f"{said}; {seen}" if box else prompt or "no nodule asked for"
        if copied:
            made = f"{1 - copied:.0%} of the pixels made"
            caption = f"{caption}; {made}" if box else made
        tiles.append(_tile(synthetic, row, caption))
    return tiles


def _tile(samples: SampleSet, row: int, caption: str) -> Tile:
    """A slice; of a volume, three planes."""
    hu, layout, box = _image(samples, row)
    if hu.ndim == 2:
        return Tile(hu, layout, [box] if box else (), caption)
    return planes_tile(hu, layout, box, caption)


def _image(samples: SampleSet, row: int) -> tuple[NDArray[np.int16], NDArray[np.uint8], Box | None]:
    box: Box = tuple(int(value) for value in samples.index["box"][row])
    return (
        samples.read("hu", row, row + 1)[0],
        samples.read("layout", row, row + 1)[0],
        box if box[0] >= 0 else None,
    )


def _prompt(synthetic: SampleSet, row: int) -> str | None:
    """What a text model was told."""
    return synthetic.index["prompt"][row].tobytes().rstrip(b"\0").decode() or None


def display_window(facts: BundleFacts) -> Window:
    """The window of a model's pictures: of grey values without a unit, all of them.

    A model of soft tissue is shown as it sees: in the usual window it would be all grey.
    """
    if facts.intensity != "hu":
        return RELATIVE_RANGE
    (low, high), (usual_low, usual_high) = facts.window_hu, DISPLAY_WINDOW_HU
    return facts.window_hu if usual_low <= low and high <= usual_high else DISPLAY_WINDOW_HU


def _first_of(config: ExperimentConfig, real: SampleSet, synthetic: SampleSet) -> PlannedSample:
    """What the first slice of the run was drawn from."""
    if isinstance(config.model, HoleFilling):
        one = config.sampling.model_copy(update={"num_samples": 1})
        (first,) = plan_inpainting(config.model_copy(update={"sampling": one}), real)
        return first
    _, layout, box = _image(synthetic, 0)
    prompt = _prompt(synthetic, 0)
    seed, source = (int(synthetic.index[name][0]) for name in ("seed", "source_sample"))
    scores = tuple(int(score) for score in synthetic.index["attributes"][0]) if box else None
    asked = Condition(layout, box, scores, prompt)
    if config.copies:
        assert isinstance(config.model, LayoutGuided)
        known_hu, own, _ = _image(real, source)
        made = [layout_hole(one, config.model.layout_labels) for one in (layout, own)]
        asked = replace(asked, known_hu=known_hu, known_mask=~np.logical_or(*made))
    first = PlannedSample("first", seed, asked, source)
    draws = int(synthetic.index["draws"][0])
    return first.redrawn(draws) if draws > 1 else first


def _denoising_tiles(config: ExperimentConfig, real: SampleSet, synthetic: SampleSet) -> list[Tile]:
    """The first slice of the run once more; nothing for a GAN, which has no steps.

    Nor of volumes: one core would draw one for hours.
    """
    if isinstance(config.model, Gan) or space_of(real) == "volume":
        return []
    first = _first_of(config, real, synthetic)
    # Here one core draws one slice: a thousand steps of a large network would take it hours, and a
    # compiler longer than the slice.
    sampling = config.sampling.model_copy(
        update={
            "batch_size": 1,
            "use_gpu": False,
            "compile": False,
            "sampler": "ddim",
            "num_inference_steps": min(config.sampling.num_inference_steps, MAX_STEPS),
        }
    )
    sampler = BundleSampler(config.bundle_path, sampling, config.seed, real.shape[-1])
    steps, frames = sampler.denoising(first, NUM_FRAMES)
    return [
        Tile(frame, boxes=[asked] if (asked := first.condition.box) else (), caption=f"step {step}")
        for step, frame in zip(steps, frames, strict=True)
    ]


def metric_row(key: str, result: dict[str, Any], standing: str = "") -> MetricRow:
    """One metric as it stands in the evaluation's JSON, for the report."""

    def estimate(figure: dict[str, Any]) -> Estimate:
        return figure["value"], figure["interval"] and tuple(figure["interval"])

    columns = {
        text: estimate(result["columns"][name])
        for name, text in COLUMNS.items()
        if name in result["columns"]
    }
    return MetricRow(key, estimate(result), columns, standing)


def strata_table(found: dict[str, Any]) -> list[list[str]]:
    """Heading and rows, the worst kind of nodule first; nothing where there are no nodules."""
    rows = []
    for one in found["strata"]:
        distance, floor = one["distance"], None
        if distance is not None:
            floor = distance["columns"].get("floor")
        rows.append(
            [
                f"{one['factor'].replace('_', ' ')} {one['name'].replace('_', ' ')}",
                f"{one['synthetic']}",
                f"{one['reference']}",
                figure_text(distance),
                figure_text(floor),
                found_share({"": one["found"]}, ""),
            ]
        )
    heading = ["nodules", "synthetic", "real", "KID", "floor", "nodule found"]
    return [heading, *rows] if rows else []


def sensitivity_table(found: dict[str, Any]) -> list[list[str]]:
    """Heading and a row for each metric: how it grows with each degradation."""
    answers = found["sensitivity"]
    kinds = list(dict.fromkeys(kind for one in answers.values() for kind in one["curves"]))
    rows = [
        [
            key,
            f"{one['n']}",
            *(" → ".join(f"{v:.3g}" for v in one["curves"].get(kind, ())) or "-" for kind in kinds),
            ", ".join(one["blind_to"]) or "none of these",
        ]
        for key, one in answers.items()
    ]
    return [["metric", "N", *kinds, "blind to"], *rows] if rows else []


def found_share(adherence: dict[str, Any], name: str) -> str:
    """For example `83.2 % [78.1 %, 87.4 %] of 256 boxes`."""
    share = adherence.get(name)
    if share is None or share["found"] is None:
        return "-"
    low, high = share["interval"]
    return f"{share['found']:.1%} [{low:.1%}, {high:.1%}] of {share['n']} boxes".replace("%", " %")


def _diameters(found: dict[str, Any]) -> dict[str, str]:
    """How diameters follow those asked for, where enough nodules were found."""
    rows = {}
    for name, text in {"synthetic": "where asked for", "shuffled": NAMES["shuffled"]}.items():
        sizes = found["sizes"].get(name)
        if sizes is not None and sizes["spearman"] is not None:
            low, high = sizes["spearman_interval"]
            rows[f"rank correlation of diameters asked for and found, {text}"] = (
                f"{sizes['spearman']:.2f} [{low:.2f}, {high:.2f}] of {sizes['n']} nodules"
            )
    return rows


def _counts(found: dict[str, Any], reference: str) -> dict[str, str]:
    """Things that nobody asked for, and how often samples were drawn."""
    rows = {}
    for name, text in {"synthetic": "synthetic", "real": reference}.items():
        if name in found["unrequested"]:
            rows[f"compact dense things beside it in the lungs, {text} (mostly vessels)"] = (
                f"{_mean(found['unrequested'][name])} a sample"
            )
    if found["draws"]["mean"] > 1:
        rows["draws of a sample until the nodule was found"] = _mean(found["draws"])
    return rows


def _cohort(found: dict[str, Any]) -> dict[str, str]:
    """Shares asked for, requested and found again, a line for each class."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}".replace("%", " %")

    return {
        f"cohort, {factor} {name}": f"asked {share(one['asked'])}, "
        f"requested {share(one['requested'])}, of those found {share(one['found'])}"
        for factor, classes in found["cohort"].items()
        for name, one in classes.items()
    }


def _mean(count: dict[str, Any]) -> str:
    low, high = count["interval"]
    return f"{count['mean']:.2f} [{low:.2f}, {high:.2f}]"


FILLED = {
    "synthetic": "filled as asked",
    "shuffled": "filled for another sample",
    "untrained": "untrained network",
    "constant": "filled with each tissue's mean",
}


def _fills(found: dict[str, Any]) -> list[list[str]]:
    """Heading and rows of the table of holes; nothing for models that fill none."""
    if not found["fills"]:
        return []
    lpips = list(found["fills"]["synthetic"]["lpips"])
    rows = [
        [
            text,
            _changed(found["fills"][name]),
            _seam(found["fills"][name]),
            _rmse(found["fills"][name]),
            f"{found['fills'][name]['ssim']:.3f}",
            *(f"{found['fills'][name]['lpips'][key]:.3g}" for key in lpips),
            *(_mse(found["fills"][name], part) for part in ("inside", "outside", "whole")),
        ]
        for name, text in FILLED.items()
        if name in found["fills"]
    ]
    heading = ["", "pixels changed outside the hole", "step across its border"]
    heading += ["root mean squared error in the hole", "SSIM of the whole"]
    return [[*heading, *lpips, "MSE inside", "outside", "of the whole"], *rows]


def diversity_table(found: dict[str, Any]) -> list[list[str]]:
    """Heading and a row for each metric of pairs; nothing where none were drawn."""
    rows = [
        [key, *(figure_text(of_sets.get(name)) for name in ("synthetic", "patients"))]
        for key, of_sets in found["diversity"].items()
    ]
    heading = ["", "two samples of one request", "like nodules of two patients"]
    return [heading, *rows] if rows else []


def _rmse(fill: dict[str, Any]) -> str:
    inside = fill["errors"].get("inside")
    return "-" if inside is None else f"{inside['mse_hu2'] ** 0.5:.0f} HU"


def _mse(fill: dict[str, Any], part: str) -> str:
    return f"{fill['errors'][part]['mse']:.3g}" if part in fill["errors"] else "-"


def fill_texts(fills: dict[str, Any]) -> list[str]:
    """What changed outside the holes, the step across their borders, and that of the control."""
    return [_changed(fills["synthetic"]), _seam(fills["synthetic"]), _seam(fills.get("shuffled"))]


def _changed(fill: dict[str, Any]) -> str:
    return "-" if fill["changed"] is None else f"{fill['changed']:,} of {fill['known']:,}"


def _seam(fill: dict[str, Any] | None) -> str:
    if fill is None or fill["seam"] is None:
        return "-"
    low, high = fill["seam_interval"]
    return f"{fill['seam']:.2f} [{low:.2f}, {high:.2f}] times the patient's"


def _consistency(found: dict[str, Any], reference: str) -> list[list[str]]:
    """Heading and rows of the table of scores; nothing where no judge could be trained."""
    columns = {
        "synthetic": "synthetic",
        "shuffled": "shuffled",
        "untrained": "untrained",
        "real": f"held-out {reference}",
    }
    sets = {key: name for key, name in columns.items() if key in found["consistency"]}
    if "synthetic" not in sets:
        return []

    def cell(agreement: dict[str, Any] | None) -> str:
        if agreement is None:
            return "-"
        low, high = agreement["interval"]
        equal = f"{agreement['accuracy']:.0%} equal".replace("%", " %")
        return f"{agreement['kappa']:.2f} [{low:.2f}, {high:.2f}], {equal}"

    rows = [
        [
            name,
            *(cell(found["consistency"][key].get(name)) for key in sets),
            f"{found['reader_kappa'][name]:.2f}",
        ]
        for name in found["consistency"]["synthetic"]
    ]
    return [["score", *sets.values(), "two readers"], *rows]


def _coverage(found: dict[str, Any], side: str) -> NDArray[np.float64]:
    return np.array([entry[side] for entry in found["coverage"].values()])


def _models(config: ExperimentConfig) -> list[str]:
    """The recipe's model after its autoencoder."""
    if isinstance(config.model, OfLatents):
        return [config.model.autoencoder.name, config.name]
    return [config.name]


def _losses(config: ExperimentConfig) -> Losses:
    """Curves of the recipe's model and of its autoencoder, where their histories lie here."""
    curves = {}
    for name in _models(config):
        history = read_history(config.work_dir / "logs" / name / HISTORY_FILE)
        points = [point for point in history if "loss" in point]
        if points:
            curves[name] = (
                np.array([point["seen_samples"] for point in points]),
                np.array([point["loss"] for point in points]),
            )
    return curves


def _seconds(config: ExperimentConfig) -> dict[str, float]:
    """Wall time of this recipe's stages and its autoencoder's."""
    seconds = stage_seconds(config.work_dir)
    return {stage: took for stage, took in seconds.items() if stage.split()[1] in _models(config)}


def _attribution(config: ExperimentConfig) -> list[str]:
    facts = read_facts(config.bundle_path)
    return [
        *(f"Data: {ATTRIBUTION[source]}." for source in facts.sources),
        f"Made by raysynth {__version__}; bundle trained on store snapshot {facts.snapshot}.",
    ]
