"""Signs that training data leaks, over whole sets of samples: what no single sample shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.evaluation.intervals import Figure
from raysynth.metrics.memorization import auc

NUM_MEANS = 50
"""Draws of patients behind a figure itself."""

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Leak:
    """How a run lies between the training set and held-out samples, in one embedding.

    Attributes:
        ratio_median: distance to the nearest training sample by that to the nearest held-out one of
            about as many; 1: no leak.
        ratio_low: 5th percentile of it.
        nearer_share: of samples that are nearer to training than to held-out ones; .5: no leak.
        auc: how well training samples can be told from held-out ones by their distance to the run;
            .5: no leak.
    """

    ratio_median: Figure
    ratio_low: Figure
    nearer_share: Figure
    auc: Figure


@dataclass(frozen=True)
class Side:
    """Distances between the run and the items of one side.

    Attributes:
        to_patient: least distance of samples to the items of each patient (n, patients).
        to_run: distance of each item to the nearest sample (items,).
        patient: of each item, a column of `to_patient`.
    """

    to_patient: Array
    to_run: Array
    patient: NDArray[np.int64]


def leak_of(train: Side, held_out: Side, num_draws: int, seed: int) -> Leak:
    """The figures of one embedding, with 95 % intervals over patients.

    Both sides are drawn patient by patient to about equally many items. Intervals of ratios and
    shares are those of halves drawn without replacement (see `intervals.subsample_interval`), of
    the AUC a bootstrap of patients.
    """
    rng = np.random.default_rng(seed)
    target = min(len(train.patient), len(held_out.patient))
    whole = np.array([_figures(train, held_out, target, rng) for _ in range(NUM_MEANS)])
    halves = np.array([_figures(train, held_out, target // 2, rng) for _ in range(num_draws)])
    values = whole.mean(axis=0)
    low, high = np.quantile(halves - halves.mean(axis=0), (0.025, 0.975), axis=0) + values
    low, high = np.maximum(low, 0), np.minimum(high, [np.inf, np.inf, 1])
    median, fifth, share = (
        Figure(float(value), (float(least), float(most)))
        for value, least, most in zip(values, low, high, strict=True)
    )
    return Leak(median, fifth, share, _auc(train, held_out, num_draws, rng))


def _figures(
    train: Side, held_out: Side, target: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Median and 5th percentile of the distances' ratio, and the share of samples nearer."""
    to_train, to_held_out = (
        side.to_patient[:, _patients(side.patient, target, rng)].min(axis=1)
        for side in (train, held_out)
    )
    ratio = (to_train + 1e-6) / (to_held_out + 1e-6)
    nearer = (to_train < to_held_out) + 0.5 * (to_train == to_held_out)
    return float(np.median(ratio)), float(np.quantile(ratio, 0.05)), float(nearer.mean())


def _patients(
    patient: NDArray[np.int64], target: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Random patients who have about so many items together; one at least."""
    items = np.bincount(patient)
    order = rng.permutation(len(items))
    return order[: 1 + int(np.argmin(np.abs(np.cumsum(items[order]) - target)))]


def _auc(train: Side, held_out: Side, num_draws: int, rng: np.random.Generator) -> Figure:
    def drawn(side: Side) -> Callable[[], Array]:
        of_patient = [side.to_run[side.patient == one] for one in range(side.patient.max() + 1)]

        def draw() -> Array:
            chosen = rng.integers(len(of_patient), size=len(of_patient))
            return np.concatenate([of_patient[one] for one in chosen])

        return draw

    inside, outside = drawn(train), drawn(held_out)
    draws = [auc(inside(), outside()) for _ in range(num_draws)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Figure(auc(train.to_run, held_out.to_run), (float(low), float(high)))
