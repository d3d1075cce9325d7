"""How alike two samples of one request are, beside real nodules that could have been the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig
from raysynth.config.evaluation import LpipsConfig
from raysynth.config.model import hears_scores
from raysynth.errors import InputError
from raysynth.evaluation.consistency import mean_scores
from raysynth.evaluation.intervals import Figure, Z
from raysynth.evaluation.measure import ADHERENCE_COLUMNS, Measures
from raysynth.evaluation.regions import SMALL_IMAGE, cut_crops
from raysynth.evaluation.sets import check_drawn_by, patients_of, space_of
from raysynth.metrics.perceptual import MIN_LPIPS_SIZE, load_lpips
from raysynth.metrics.similarity import ms_ssim, num_ssim_scales
from raysynth.sampling.cohort import diameter_class
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from raysynth.window import measurable

PAIR_WINDOW_HU = (-1000.0, 400.0)
"""The same for all models, so that values compare."""

MAX_PAIRS = 1000
PAIRS_AT_ONCE = 32
PIXELS_AT_ONCE = 2**23
"""Of either side of the pairs: fewer pairs of volumes are compared at once."""

MAX_SCORE_GAP = 1.0
"""By which scores of real nodules may differ and still count as the same request: two readers of
one nodule differ by no more in 78 to 90 % of cases."""

Pairs = NDArray[np.int64]
"""Rows of two samples of one set that share a request, (n, 2)."""


Likeness = dict[str, dict[str, Figure]]
"""Mean over pairs, by metric key and set; `patients`: of real nodules that are alike."""


def diversity(
    config: ExperimentConfig, root: zarr.Group, real: SampleSet, measured: Measures
) -> Likeness:
    """How alike the samples of the recipe's `evaluation.num_pairs` are; nothing if it has none.

    Needs a Ray session.

    Args:
        config: the recipe.
        root: of the store.
        real: the real sample set.
        measured: what was measured of it.

    Raises:
        InputError: the pairs were not drawn, or by another bundle or settings.
    """
    if not config.evaluation.num_pairs:
        return {}
    group = root.get(f"synthetic/{config.pairs_name}")
    if not isinstance(group, zarr.Group):
        raise InputError(
            f"evaluation.num_pairs {config.evaluation.num_pairs}, and the store has no synthetic/"
            f"{config.pairs_name}: run synthesize again, or set it to 0"
        )
    drawn = SampleSet(group)
    check_drawn_by(config, drawn, config.pairs_name)
    patients = patients_of(root, {"real": real})["real"]
    return likeness(config, {"synthetic": drawn}, real, measured, patients)


def likeness(
    config: ExperimentConfig,
    sets: Mapping[str, SampleSet],
    real: SampleSet,
    measured: Measures,
    patients: NDArray[np.int64],
) -> Likeness:
    """MS-SSIM of pairs of one request, and LPIPS by the recipe's backbone.

    LPIPS is left out where crops of nodules are too small for it.
    """
    import ray

    pairs = {name: _twins(drawn) for name, drawn in sets.items()}
    count = min(MAX_PAIRS, *map(len, pairs.values()))
    region, size = "all", real.shape[-1]
    drawn = next(iter(sets.values()))
    if (drawn.index["box"][:, 0] >= 0).any():
        size = 32 if size >= SMALL_IMAGE else 16
        region = f"nodule{size}"
        rows, table = measured.adherence.compute()
        diameter_mm = table[:, ADHERENCE_COLUMNS.index("requested_mm")]
        pairs["patients"] = _real_pairs(config, real, rows, diameter_mm, patients)
    lpips = config.evaluation.lpips if size >= MIN_LPIPS_SIZE else None
    versions = {"ms_ssim": f"{num_ssim_scales(size)}-scales@1"}
    if lpips is not None:
        versions["lpips"] = load_lpips(lpips, PAIR_WINDOW_HU).name
    task = ray.remote(num_cpus=1)(_mean_likeness)
    futures = {
        name: task.remote(sets.get(name, real), of_set[:MAX_PAIRS], size, lpips)
        for name, of_set in pairs.items()
        if len(of_set)
    }
    found = {name: ray.get(future) for name, future in futures.items()}
    return {
        f"{metric}/{space_of(real)}/{region}/{version}/{count}": {
            name: of_set[metric] for name, of_set in found.items()
        }
        for metric, version in versions.items()
    }


def match_nodules(
    scores: NDArray[np.floating],
    diameter_mm: NDArray[np.floating],
    patients: NDArray[np.int64],
    seed: int,
) -> Pairs:
    """Real nodules of different patients that could have been the same request, none twice.

    Args:
        scores: mean of the readers (n, k); NaN where nobody gave one. k = 0: sizes alone count.
        diameter_mm: of each (n,).
        patients: whose they are (n,).
        seed: of the order in which they find each other.

    Returns:
        Pairs of rows whose scores differ by `MAX_SCORE_GAP` at most, of one class of diameters.
    """
    order = np.random.default_rng(seed).permutation(len(scores))
    sizes = np.array([diameter_class(mm) for mm in diameter_mm], int)
    free = np.isfinite(scores).all(axis=1)
    pairs = []
    for one in order:
        if not free[one]:
            continue
        like = free & (patients != patients[one]) & (sizes == sizes[one])
        like &= (np.abs(scores - scores[one]) <= MAX_SCORE_GAP).all(axis=1)
        others = order[like[order]]
        if len(others):
            pairs.append((one, others[0]))
            free[[one, others[0]]] = False
    return np.array(pairs, np.int64).reshape(-1, 2)


def _twins(drawn: SampleSet) -> Pairs:
    """Each request's two samples; where any asks for a nodule, of those that do."""
    pairs = np.arange(drawn.count).reshape(-1, 2)
    boxed = drawn.index["box"][pairs[:, 0], 0] >= 0
    chosen: Pairs = pairs[boxed] if boxed.any() else pairs
    return chosen


def _real_pairs(
    config: ExperimentConfig,
    real: SampleSet,
    rows: NDArray[np.int64],
    diameter_mm: NDArray[np.floating],
    patients: NDArray[np.int64],
) -> Pairs:
    """Pairs of rows of the real set; of each nodule its largest section."""
    if not len(rows):
        return np.zeros((0, 2), np.int64)
    order = np.argsort(-diameter_mm, kind="stable")
    rows, diameter_mm = rows[order], diameter_mm[order]
    nodules = np.stack([real.index["case"][rows], real.index["nodule"][rows]], axis=1)
    _, first = np.unique(nodules, axis=0, return_index=True)
    rows, diameter_mm = rows[first], diameter_mm[first]
    scores = np.zeros((len(rows), 0))
    if hears_scores(config.model):
        scores = np.stack(list(mean_scores(real.index["ratings"][rows]).values()), axis=1)
    seed = seed_of("like nodules", config.seed)
    pairs: Pairs = rows[match_nodules(scores, diameter_mm, patients[rows], seed)]
    return pairs


def _mean_likeness(
    samples: SampleSet, pairs: Pairs, size: int, lpips: LpipsConfig | None
) -> dict[str, Figure]:
    """Means by metric, of crops of `size` pixels around the boxes; if so large, whole samples."""
    values: dict[str, list[NDArray[np.float64]]] = {"ms_ssim": []}
    if lpips is not None:
        values["lpips"] = []
    together = min(PAIRS_AT_ONCE, max(1, PIXELS_AT_ONCE // int(np.prod(samples.shape))))
    for start in range(0, len(pairs), together):
        images = []
        for rows in pairs[start : start + together].T:
            hu = np.concatenate([samples.read("hu", int(row), int(row) + 1) for row in rows])
            hu = measurable(hu, samples.attrs["intensity"])
            box = samples.index["box"][rows]
            images.append(hu if size == hu.shape[-1] else cut_crops(hu, box, size))
        values["ms_ssim"].append(ms_ssim(images[0], images[1], PAIR_WINDOW_HU))
        if lpips is not None:
            values["lpips"].append(load_lpips(lpips, PAIR_WINDOW_HU)(images[0], images[1]))
    return {metric: _mean(np.concatenate(of_metric)) for metric, of_metric in values.items()}


def _mean(values: NDArray[np.float64]) -> Figure:
    mean = float(values.mean())
    if len(values) < 2:
        return Figure(mean, None)
    spread = Z * float(values.std(ddof=1)) / len(values) ** 0.5
    return Figure(mean, (mean - spread, mean + spread))
