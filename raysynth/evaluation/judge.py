"""Distances of synthetic samples to real ones, beside their floor and their controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.evaluation.intervals import (
    MIN_PATIENTS,
    Arm,
    Features,
    Interval,
    Metric,
    patient_splits,
    subsample_interval,
)
from raysynth.evaluation.measure import HISTOGRAMS, Place
from raysynth.metrics.frechet import frechet_distance_of, frechet_limit
from raysynth.metrics.histogram import histogram_distance
from raysynth.metrics.kernel import cubic_mmd2, gaussian_mmd2, kernel_distance, median_distance
from raysynth.seeding import seed_of

MIN_SAMPLES = 8
"""Fewer samples on a side give no distance."""

MAX_KERNEL_SAMPLES = 4096
"""Kernel distances of more would need several gigabytes: they are drawn down to this."""

NUM_SPLITS = 40
"""Random patient splits behind a floor."""

Column = tuple[float, Interval]
NO_COLUMN = (None, None)


@dataclass(frozen=True)
class Arms:
    """All that is compared at one place.

    Attributes:
        real: every real sample, of all splits: the floor comes from them.
        reference: the real samples that others are judged by, the test split.
        judged: `synthetic`, the controls `untrained` and `shuffled` where there are any, and for
            models that fill holes the control `constant` and the real `neighbour`s of the
            reference.
    """

    real: Arm
    reference: Arm
    judged: dict[str, Arm]


@dataclass(frozen=True)
class MetricResult:
    """One metric. Intervals are (low, high) at 95 %; None: there was nothing to compute it from.

    Attributes:
        value: of the synthetic samples.
        n: samples on either side, for every column alike.
        dim: length of a feature vector.
        floor: mean over patient-disjoint splits of the real samples; its interval is their spread,
            None for too few patients to tell.
        untrained: of samples of an untrained model.
        shuffled: of samples drawn under each other's conditions.
        constant: of holes filled with the mean of each tissue, without any model.
        neighbour: of the slices next to the reference's own: how near real slices come to them.
        disjoint: for each other column, whether its interval and the value's do not overlap.
        resampled: what the value's interval draws of the reference, `patients` or `samples`.
        reference_patients: patients of the reference.
        limit: FID at infinitely many samples (FID_inf).
        subset_std: KID's standard deviation over its subsets.
    """

    value: float
    interval: Interval
    n: int
    dim: int
    floor: float | None
    floor_interval: Interval | None
    untrained: float | None
    untrained_interval: Interval | None
    shuffled: float | None
    shuffled_interval: Interval | None
    disjoint: dict[str, bool]
    resampled: str
    reference_patients: int
    constant: float | None = None
    constant_interval: Interval | None = None
    neighbour: float | None = None
    neighbour_interval: Interval | None = None
    limit: float | None = None
    subset_std: float | None = None


DISTANCES = ("fid", "kid", "mmd2", "mmd2_fixed")
"""All that are computed of features; of histograms it is `hu_w1` alone."""


def judge(
    place: Place, arms: Arms, num_draws: int, seed: int, distances: Sequence[str] = DISTANCES
) -> dict[str, MetricResult]:
    """All metrics at one region by one extractor, by key.

    Every column of a metric has the same number of samples N on both sides. Where controls have
    fewer samples than the run, the run is judged at both sizes, and the larger has no controls.

    Args:
        place: region and extractor.
        arms: what is compared.
        num_draws: sub-samples behind each interval.
        seed: of every drawing.
        distances: which, if not all.

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
    common = min(largest, *(len(arm) for arm in arms.judged.values()))
    results: dict[str, MetricResult] = {}
    for size in sorted({common, largest}):
        names = [name for name, arm in arms.judged.items() if len(arm) >= size]
        judged = {name: arms.judged[name] for name in names}
        if size >= MIN_SAMPLES:
            # Of two results at the same drawn-down size, the one with controls stays.
            at_size = Arms(arms.real, arms.reference, judged)
            found = _judge_at(place, size, at_size, splits, num_draws, seed, distances)
            results = found | results
    return results


def _judge_at(
    place: Place,
    size: int,
    arms: Arms,
    splits: list[NDArray[np.bool_]],
    num_draws: int,
    seed: int,
    distances: Sequence[str],
) -> dict[str, MetricResult]:
    region, extractor = place
    results = {}
    for name in ("hu_w1",) if extractor == HISTOGRAMS else distances:
        n = size if name in ("fid", "hu_w1") else min(size, MAX_KERNEL_SAMPLES)
        results[f"{name}/slice/{region}/{extractor}/{n}"] = _result(
            name, n, arms, splits, num_draws, seed
        )
    return results


def _result(
    name: str, n: int, arms: Arms, splits: list[NDArray[np.bool_]], num_draws: int, seed: int
) -> MetricResult:
    """One metric at N samples a side."""
    reference = arms.reference.draw(n, np.random.default_rng(seed))
    metric = _metric(name, reference.features)
    columns: dict[str, Column] = {}
    for column, arm in arms.judged.items():
        drawn = arm.draw(n, np.random.default_rng(seed))
        value = metric(reference.features, drawn.features)
        interval = subsample_interval(metric, reference, drawn, value, num_draws, seed)
        columns[column] = value, interval
    rng = np.random.default_rng(seed)
    floors = [
        metric(
            arms.real.take(split).draw(n, rng).features,
            arms.real.take(~split).draw(n, rng).features,
        )
        for split in splits
        if _smaller_side(split) >= n
    ]
    floor = float(np.mean(floors)) if floors else None
    floor_interval = None
    if floors and len(np.unique(arms.real.patients)) >= MIN_PATIENTS:  # else few ways to split
        low, high = np.quantile(floors, (0.025, 0.975))
        floor_interval = float(low), float(high)
        columns["floor"] = float(np.mean(floors)), floor_interval
    value, interval = columns.pop("synthetic")
    synthetic = arms.judged["synthetic"].draw(n, np.random.default_rng(seed)).features
    limit = subset_std = None
    if name == "fid" and n > MIN_SAMPLES:
        limit = frechet_limit(reference.features, synthetic, seed).value
    if name == "kid":
        kid = kernel_distance(reference.features, synthetic)
        value, subset_std = kid.mean, kid.std
    untrained, untrained_interval = columns.get("untrained", NO_COLUMN)
    shuffled, shuffled_interval = columns.get("shuffled", NO_COLUMN)
    constant, constant_interval = columns.get("constant", NO_COLUMN)
    neighbour, neighbour_interval = columns.get("neighbour", NO_COLUMN)
    return MetricResult(
        value=value,
        interval=interval,
        n=n,
        dim=reference.features.shape[1],
        floor=floor,
        floor_interval=floor_interval,
        untrained=untrained,
        untrained_interval=untrained_interval,
        shuffled=shuffled,
        shuffled_interval=shuffled_interval,
        constant=constant,
        constant_interval=constant_interval,
        neighbour=neighbour,
        neighbour_interval=neighbour_interval,
        disjoint={column: _disjoint(interval, other) for column, (_, other) in columns.items()},
        resampled=reference.resampled,
        reference_patients=len(np.unique(reference.patients)),
        limit=limit,
        subset_std=subset_std,
    )


def _metric(name: str, reference: Features) -> Metric:
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


def _smaller_side(split: NDArray[np.bool_]) -> int:
    inside = int(np.count_nonzero(split))
    return min(inside, len(split) - inside)


def _disjoint(one: Interval, other: Interval) -> bool:
    return one[1] < other[0] or other[1] < one[0]
