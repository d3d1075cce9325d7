"""Distances of synthetic samples to real ones, beside their floor and their controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raysynth.evaluation.intervals import (
    MIN_PATIENTS,
    Arm,
    Features,
    Figure,
    Interval,
    Metrics,
    patient_splits,
    subsample_intervals,
)
from raysynth.evaluation.measure import HISTOGRAMS, Place, measured_by
from raysynth.metrics.frechet import frechet_distance_of, frechet_limit
from raysynth.metrics.histogram import histogram_distance
from raysynth.metrics.kernel import cubic_mmd2, gaussian_mmd2, kernel_distance, median_distance
from raysynth.metrics.manifold import NUM_NEIGHBOURS, manifold_overlap
from raysynth.metrics.nodule import RADIOMIC_NAMES, RADIOMICS, radiomic_distances
from raysynth.seeding import seed_of

MIN_SAMPLES = 8
"""Fewer samples on a side give no distance."""

MAX_KERNEL_SAMPLES = 4096
"""Kernel distances of more would need several gigabytes: they are drawn down to this."""

NUM_SPLITS = 40
"""Random patient splits behind a floor."""


@dataclass(frozen=True)
class Arms:
    """All that is compared at one place.

    Attributes:
        real: every real sample, of all splits: the floor comes from them.
        reference: the real samples that others are judged by, the test split.
        judged: `synthetic`, and what stands beside it where there is any: the controls `untrained`,
            `shuffled` and `constant`, and real slices with another patient's nodule pasted in,
            `copy_paste`.
        neighbours: some of the reference, and the slices next to them: how near real slices come
            that show almost the same; None: no slice has its neighbour in the set.
    """

    real: Arm
    reference: Arm
    judged: dict[str, Arm]
    neighbours: tuple[Arm, Arm] | None = None


@dataclass(frozen=True)
class MetricResult:
    """One metric. Intervals are (low, high) at 95 %; None: there was nothing to compute it from.

    Attributes:
        value: of the synthetic samples.
        interval: of the value.
        n: samples on either side, for every column alike.
        dim: length of a feature vector.
        columns: what stands beside the value, by name. `floor`: the mean over patient-disjoint
            splits of the real samples; its interval is their spread, None for too few patients to
            tell. `neighbour`: of the slices next to the reference's own. `copy_paste`: of real
            slices with another patient's nodule pasted in, edge and all. `untrained`: of samples of
            an untrained model. `shuffled`: of samples drawn under each other's conditions.
            `constant`: of holes filled with the mean of each tissue, without any model.
        disjoint: for each column with an interval, whether it and the value's do not overlap.
        resampled: what the value's interval draws of the reference, `patients` or `samples`.
        reference_patients: patients of the reference.
        limit: FID at infinitely many samples (FID_inf).
        subset_std: KID's standard deviation over its subsets.
    """

    value: float
    interval: Interval
    n: int
    dim: int
    columns: dict[str, Figure]
    disjoint: dict[str, bool]
    resampled: str
    reference_patients: int
    limit: float | None = None
    subset_std: float | None = None


PASTED = "copy_paste"
"""The column of `Arms.judged` that may be too small for the size of all others."""

OF_NEIGHBOURS = ("fid", "kid")
"""What is computed once more where neighbouring slices are fewer than all else."""

DISTANCES = ("fid", "kid", "mmd2", "mmd2_fixed", "overlap")
"""All that are computed of features."""

BY_EXTRACTOR = {
    HISTOGRAMS: ("hu_w1",),
    **dict.fromkeys(RADIOMICS.values(), ("fid", "radiomics")),
}
"""Of these extractors, other ones."""

OVERLAP = ("precision", "recall", "density", "coverage")
"""What `overlap` stands for: four figures of one computation. Higher is better."""

GROUPS = {"overlap": OVERLAP, "radiomics": tuple(f"w1_{name}" for name in RADIOMIC_NAMES)}
"""Figures that come from one computation; of any other distance it is itself."""

MAX_OVERLAP_SAMPLES = 2048


def judge(
    place: Place,
    arms: Arms,
    num_draws: int,
    seed: int,
    distances: Sequence[str] = DISTANCES,
    space: str = "slice",
) -> dict[str, MetricResult]:
    """All metrics at one region by one extractor, by key.

    Every column of a metric has the same number of samples N on both sides. Where controls, or
    slices with a neighbour, are fewer than the run, the run is judged at their size, too.

    Args:
        place: region and extractor.
        arms: what is compared.
        num_draws: sub-samples behind each interval.
        seed: of every drawing.
        distances: which, if not all.
        space: `slice` or `volume`, what samples are.

    Returns:
        Key `metric/space/region/extractor@version/N` -> result; none for too few samples.
    """
    seed = seed_of("judge", seed, *place)
    patients = len(np.unique(arms.reference.patients))
    splits = list(patient_splits(arms.real.patients, patients, NUM_SPLITS, seed))
    largest = min(len(arms.reference), len(arms.judged["synthetic"]))
    if splits:
        # The split sides vary with their patients; half of the splits shall be large enough, unless
        # that leaves nothing to judge by: better no floor than no figure.
        sides = sorted(_smaller_side(split) for split in splits)
        middle = sides[len(sides) // 2]
        if middle >= MIN_SAMPLES:
            largest = min(largest, middle)
    common = min(largest, *(len(arm) for name, arm in arms.judged.items() if name != PASTED))
    pairs = 0 if arms.neighbours is None else len(arms.neighbours[0])
    results: dict[str, MetricResult] = {}
    for size in sorted({common, largest, min(pairs, common)}):
        if size < MIN_SAMPLES:
            continue
        beside = {name: arm for name, arm in arms.judged.items() if len(arm) >= size}
        asked = distances
        if size < common:  # for the neighbours' sake: what else is known has a larger N
            beside = {"synthetic": arms.judged["synthetic"]}
            asked = [name for name in distances if name in OF_NEIGHBOURS]
        at_size = Arms(arms.real, arms.reference, beside, arms.neighbours)
        # Of two results at the same drawn-down size, the one with controls stays.
        at_place = _judge_at((space, *place), size, at_size, splits, num_draws, seed, asked)
        results = at_place | results
    return results


def _judge_at(
    place: tuple[str, str, str],
    size: int,
    arms: Arms,
    splits: list[NDArray[np.bool_]],
    num_draws: int,
    seed: int,
    distances: Sequence[str],
) -> dict[str, MetricResult]:
    extractor = place[-1]
    largest = {"fid": size, "hu_w1": size, "overlap": min(size, MAX_OVERLAP_SAMPLES)}
    results: dict[str, MetricResult] = {}
    for name in BY_EXTRACTOR.get(measured_by(extractor), distances):
        n = largest.get(name, min(size, MAX_KERNEL_SAMPLES))
        found = _results(name, n, arms, splits, num_draws, seed)
        results |= {"/".join((metric, *place, f"{n}")): result for metric, result in found.items()}
    return results


def _results(
    name: str, n: int, arms: Arms, splits: list[NDArray[np.bool_]], num_draws: int, seed: int
) -> dict[str, MetricResult]:
    """One distance, or the four figures of overlap, at N samples a side."""
    reference = arms.reference.draw(n, np.random.default_rng(seed))
    metric = distance_of(name, reference.features)

    def figures(real: Arm, other: Arm) -> list[Figure]:
        values = metric(real.features, other.features)
        intervals = subsample_intervals(metric, real, other, values, num_draws, seed)
        return [Figure(*one) for one in zip(values, intervals, strict=True)]

    drawn = {
        column: arm.draw(n, np.random.default_rng(seed)) for column, arm in arms.judged.items()
    }
    synthetic = drawn["synthetic"]
    columns = {column: figures(reference, arm) for column, arm in drawn.items()}
    if arms.neighbours is not None and len(arms.neighbours[0]) >= n:
        # Both sides are drawn alike: who is drawn, is drawn with the slice beside it.
        columns["neighbour"] = figures(
            *(side.draw(n, np.random.default_rng(seed)) for side in arms.neighbours)
        )
    if floor := _floor(metric, n, arms.real, splits, seed):
        columns["floor"] = floor
    limit = subset_std = None
    if name == "fid" and n > MIN_SAMPLES:
        limit = frechet_limit(reference.features, synthetic.features, seed).value
    if name == "kid":
        kid = kernel_distance(reference.features, synthetic.features)
        columns["synthetic"] = [replace(columns["synthetic"][0], value=kid.mean)]
        subset_std = kid.std
    results = {}
    for number, metric_name in enumerate(GROUPS.get(name, (name,))):
        beside = {column: of_column[number] for column, of_column in columns.items()}
        beside = {column: one for column, one in beside.items() if _is_finite(one)}
        own = beside.pop("synthetic", None)
        if own is None:  # a feature that no real sample varies in
            continue
        assert own.interval is not None
        results[metric_name] = MetricResult(
            value=own.value,
            interval=own.interval,
            n=n,
            dim=reference.features.shape[1],
            columns=beside,
            disjoint={
                column: disjoint(own.interval, one.interval)
                for column, one in beside.items()
                if one.interval is not None
            },
            resampled=reference.resampled,
            reference_patients=len(np.unique(reference.patients)),
            limit=limit,
            subset_std=subset_std,
        )
    return results


def _floor(
    metric: Metrics, n: int, real: Arm, splits: list[NDArray[np.bool_]], seed: int
) -> list[Figure]:
    """Figures of real samples against those of other patients; none for too few of them."""
    rng = np.random.default_rng(seed)
    floors = [
        metric(real.take(split).draw(n, rng).features, real.take(~split).draw(n, rng).features)
        for split in splits
        if _smaller_side(split) >= n
    ]
    if not floors:
        return []
    means = np.mean(floors, axis=0).tolist()
    if len(np.unique(real.patients)) < MIN_PATIENTS:  # too few ways to split
        return [Figure(mean, None) for mean in means]
    ends = np.quantile(floors, (0.025, 0.975), axis=0).T.tolist()
    return [Figure(mean, (low, high)) for mean, (low, high) in zip(means, ends, strict=True)]


def distance_of(name: str, reference: Features) -> Metrics:
    """A distance, or one of the `GROUPS`, as figures of one reference are computed."""
    if name == "overlap":
        return _overlap
    if name == "radiomics":
        return lambda real, other: list(radiomic_distances(real, other).values())
    one = _distance_of(name, reference)
    return lambda real, other: (one(real, other),)


def _overlap(real: Features, other: Features) -> Sequence[float]:
    """No numbers where halves of few samples have too few neighbours."""
    if min(len(real), len(other)) <= NUM_NEIGHBOURS:
        return (np.nan,) * len(OVERLAP)
    return astuple(manifold_overlap(real, other))


def _distance_of(name: str, reference: Features) -> Callable[[Features, Features], float]:
    match name:
        case "fid":
            return frechet_distance_of
        case "kid":
            # KID itself is a mean over subsets and estimates this, at a hundred times the price.
            return cubic_mmd2
        case "mmd2":
            return gaussian_mmd2
        case "mmd2_fixed":
            # One bandwidth for every column and every model judged by this reference.
            bandwidth = median_distance(reference)
            return lambda real, other: gaussian_mmd2(real, other, bandwidth)
        case _:
            assert name == "hu_w1", name
            return histogram_distance


def _is_finite(figure: Figure) -> bool:
    return bool(np.isfinite([figure.value, *(figure.interval or ())]).all())


def _smaller_side(split: NDArray[np.bool_]) -> int:
    inside = int(np.count_nonzero(split))
    return min(inside, len(split) - inside)


def disjoint(one: Interval, other: Interval) -> bool:
    """Whether two intervals have nothing in common."""
    return one[1] < other[0] or other[1] < one[0]
