"""One model at several guidance scales: what each does, and which to take.

At every scale the same requests are drawn from the same noise, each of them twice. Quality is the
distance to held-out patients, diversity how alike the two samples of a request are, consistency how
far they show what was asked for (methods, B and F.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy.stats import rankdata

from raysynth.config import ExperimentConfig, HoleFilling, LayoutGuided
from raysynth.config.model import hears_scores
from raysynth.errors import InputError
from raysynth.evaluation.adherence import found_shares
from raysynth.evaluation.consistency import ScoreJudge, mean_kappa, mean_scores, rounded
from raysynth.evaluation.diversity import likeness
from raysynth.evaluation.fills import Holes, LayoutHoles
from raysynth.evaluation.intervals import Arm, Figure
from raysynth.evaluation.judge import MIN_SAMPLES, Arms, judge
from raysynth.evaluation.measure import Measures, Place, told
from raysynth.evaluation.regions import GENERATED
from raysynth.evaluation.sets import check_drawn_by, measure_sets, patients_of, space_of
from raysynth.store.reader import SampleSet
from storage_schema.v1 import SPLITS

ASPECTS = {
    "quality": ("fid", "kid"),
    "diversity": ("ms_ssim", "lpips"),
    "consistency": ("kappa", "found"),
}
"""Figures by what they say something of. FID and KID: lower is better; MS-SSIM and LPIPS: the
nearer to that of patients; kappa and the share found: higher."""

RULE = (
    "best mean rank over quality (FID and KID), diversity (how near MS-SSIM, and LPIPS if measured,"
    " are to those of patients) and consistency (kappa and share found); of equal ones the smallest"
    " scale"
)


@dataclass(frozen=True)
class SweptScale:
    """What one guidance scale does.

    Attributes:
        scale: the guidance scale.
        figures: by name, see `ASPECTS`; those that could be had.
        ranks: by aspect, 1 is best; the mean over its figures' ranks.
        mean_rank: over the aspects; None where nothing could be ranked.
    """

    scale: float
    figures: dict[str, Figure]
    ranks: dict[str, float]
    mean_rank: float | None


@dataclass(frozen=True)
class Sweep:
    """A guidance-scale sweep.

    Attributes:
        scales: in ascending order.
        patients: the same figures of real samples: floors of FID and KID, MS-SSIM of real nodules
            of like scores and size, kappa of the judge on held-out ones, share found.
        keys: metric keys, by figure.
        reference: split of the patients that FID and KID compare with.
        samples: drawn at each scale, two a request.
        chosen: by `rule`; None where nothing could be ranked.
        rule: how.
    """

    scales: list[SweptScale]
    patients: dict[str, Figure]
    keys: dict[str, str]
    reference: str
    samples: int
    chosen: float | None
    rule: str


def open_scales(config: ExperimentConfig, root: zarr.Group) -> dict[str, SampleSet]:
    """The runs at the recipe's `evaluation.guidance_scales`, by scale, in ascending order.

    Raises:
        InputError: one was not drawn, or by another bundle or settings.
    """
    scales = sorted(config.evaluation.guidance_scales)
    return {f"{scale:g}": _drawn(config, root, scale) for scale in scales}


def sweep(
    config: ExperimentConfig,
    root: zarr.Group,
    sets: Mapping[str, SampleSet],
    real: SampleSet,
    measured: Measures,
    is_reference: NDArray[np.bool_],
    judges: tuple[Place, dict[str, ScoreJudge]] | None,
    holes: Holes | LayoutHoles | None = None,
) -> Sweep:
    """Judges every scale of a recipe by the same patients.

    Needs a Ray session.

    Args:
        config: the recipe.
        root: of the store.
        sets: from `open_scales`.
        real: the real sample set.
        measured: what was measured of it.
        is_reference: samples that the run itself is judged by.
        judges: of scores, and where they look; None: too few nodules.
        holes: of models guided by layouts: what of a sample is made.
    """
    patients = patients_of(root, {"real": real, **sets})
    # Planned holes are of the run's requests; those of a sweep are others.
    layout_holes = holes if isinstance(holes, LayoutHoles) else None
    measures = measure_sets(sets, config, layout_holes)
    reference, compared = _reference(config, real, is_reference)
    found = _distances(config, sets, real, measures, measured, patients, compared)
    keys = {key.partition("/")[0]: key for of_set in found.values() for key in of_set}
    figures = {
        name: {key.partition("/")[0]: figure for key, figure in of_set.items()}
        for name, of_set in found.items()
    }
    for key, alike in likeness(config, sets, real, measured, patients["real"]).items():
        metric = key.partition("/")[0]
        keys[metric] = key
        for name, figure in alike.items():
            figures[name][metric] = figure
    for name, of_set in {**measures, "patients": measured}.items():
        share = found_shares(of_set.adherence.compute()[1], name)[name]
        if share.found is not None:
            figures[name]["found"] = Figure(share.found, share.interval)
    if judges is not None and hears_scores(config.model):
        for name, figure in _kappas(judges, sets, measures, real, measured, config.seed).items():
            figures[name]["kappa"] = figure
    of_patients = figures.pop("patients")
    swept, chosen = rank({float(name): of_set for name, of_set in figures.items()}, of_patients)
    count = next(iter(sets.values())).count
    return Sweep(swept, of_patients, keys, reference, count, chosen, RULE)


def rank(
    figures: Mapping[float, dict[str, Figure]], patients: Mapping[str, Figure]
) -> tuple[list[SweptScale], float | None]:
    """Every scale with its ranks, in ascending order, and the one with the best mean rank.

    A figure that some scale lacks, or one of diversity without that of patients, ranks nothing.
    """
    scales = sorted(figures)
    ranks: dict[str, NDArray[np.float64]] = {}
    for aspect, names in ASPECTS.items():
        of_figures = []
        for name in names:
            if not all(name in figures[scale] for scale in scales):
                continue
            values = np.array([figures[scale][name].value for scale in scales])
            if aspect == "diversity":
                if name not in patients:
                    continue
                values = np.abs(values - patients[name].value)
            of_figures.append(rankdata(values if aspect != "consistency" else -values))
        if of_figures:
            ranks[aspect] = np.mean(of_figures, axis=0)
    means = np.mean(list(ranks.values()), axis=0) if ranks else None
    swept = [
        SweptScale(
            scale,
            figures[scale],
            {aspect: float(values[row]) for aspect, values in ranks.items()},
            None if means is None else float(means[row]),
        )
        for row, scale in enumerate(scales)
    ]
    return swept, None if means is None else scales[int(np.argmin(means))]


def _drawn(config: ExperimentConfig, root: zarr.Group, scale: float) -> SampleSet:
    name = config.swept_name(scale)
    group = root.get(f"synthetic/{name}")
    if not isinstance(group, zarr.Group):
        raise InputError(
            f"evaluation.guidance_scales asks for {scale:g}, and the store has no synthetic/{name}:"
            " run synthesize again, or leave that scale out"
        )
    drawn = SampleSet(group)
    sampling = config.sampling.model_copy(update={"guidance_scale": scale})
    check_drawn_by(config.model_copy(update={"sampling": sampling}), drawn, name)
    return drawn


def _reference(
    config: ExperimentConfig, real: SampleSet, is_reference: NDArray[np.bool_]
) -> tuple[str, NDArray[np.bool_]]:
    """Patients to choose by: others than those who judge the run, where there are enough."""
    validating = real.index["split"] == SPLITS.index("val")
    # Holes are made in samples of test patients, and layouts are theirs.
    hosted = isinstance(config.model, HoleFilling | LayoutGuided)
    if hosted or np.count_nonzero(validating) < MIN_SAMPLES:
        return "test", is_reference
    return "val", validating


def _distances(
    config: ExperimentConfig,
    sets: Mapping[str, SampleSet],
    real_set: SampleSet,
    measures: Mapping[str, Measures],
    measured: Measures,
    patients: Mapping[str, NDArray[np.int64]],
    compared: NDArray[np.bool_],
) -> dict[str, dict[str, Figure]]:
    """FID and KID of whole samples by key, of every set, and their floors as those of `patients`.

    By the first extractor. Of what is mostly copied, only what was made is compared.
    """
    import ray

    region = GENERATED if any(place[0] == GENERATED for place in measured.tables) else "all"
    place = next(place for place in measured.tables if place[0] == region)
    rows, features = measured.tables[place].compute()
    real = Arm(features, patients["real"][rows])
    task = ray.remote(num_cpus=1)(judge)
    futures = {}
    for name in sets:
        rows_of_set, features = measures[name].tables[place].compute()
        owners = patients[name]
        # Who lends nothing is told apart by the request.
        owners = np.where(owners < 0, -1 - np.arange(len(owners)) // 2, owners)[rows_of_set]
        arms = Arms(real, real.take(compared[rows]), {"synthetic": Arm(features, owners)})
        draws, seed = config.evaluation.num_bootstrap, config.seed
        (shown,) = told({place: (rows, features)}, real_set.attrs["intensity"])
        asked = shown, arms, draws, seed, ASPECTS["quality"], space_of(real_set)
        futures[name] = task.remote(*asked)  # type: ignore[call-arg]  # Ray forgets the default
    found: dict[str, dict[str, Figure]] = {"patients": {}}
    for name, future in futures.items():
        results = ray.get(future)
        found[name] = {key: Figure(one.value, one.interval) for key, one in results.items()}
        found["patients"] = {
            key: one.columns["floor"] for key, one in results.items() if "floor" in one.columns
        }
    return found


def _kappas(
    judges: tuple[Place, dict[str, ScoreJudge]],
    sets: Mapping[str, SampleSet],
    measures: Mapping[str, Measures],
    real: SampleSet,
    measured: Measures,
    seed: int,
) -> dict[str, Figure]:
    """Kappa, mean over the scores, of every set and of held-out patients."""
    place, score_judges = judges
    found = {}
    for name, drawn in sets.items():
        if place in measures[name].tables:
            rows, features = measures[name].tables[place].compute()
            asked = drawn.index["attributes"][rows]
            found[name] = mean_kappa(score_judges, features, asked, rows // 2, seed)
    rows, features = measured.tables[place].compute()
    held_out = real.index["split"][rows] == SPLITS.index("test")
    rows, features = rows[held_out], features[held_out]
    scores = np.stack(list(mean_scores(real.index["ratings"][rows]).values()), axis=1)
    given = np.where(np.isfinite(scores), rounded(scores), 0).astype(np.uint8)
    found["patients"] = mean_kappa(score_judges, features, given, rows, seed)
    return {name: Figure(*kappa) for name, kappa in found.items() if kappa is not None}
