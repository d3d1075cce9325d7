"""Rank tests of two samples, and what is left of their p-values when there are many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Test:
    """A two-sided test; `effect` is rank-biserial, above 0 where the first sample is larger."""

    __test__ = False  # for pytest, which collects by name

    p: float
    effect: float
    n: int
    m: int


def rank_sum(x: ArrayLike, y: ArrayLike) -> Test:
    """Wilcoxon's rank-sum test of two independent samples."""
    first, second = np.asarray(x, float), np.asarray(y, float)
    tied = len(np.unique([*first, *second])) < len(first) + len(second)
    u, p = stats.mannwhitneyu(first, second, method="asymptotic" if tied else "exact")
    n, m = len(first), len(second)
    return Test(float(p), float(2 * u / (n * m) - 1), n, m)


def signed_rank(x: ArrayLike, y: ArrayLike) -> Test:
    """Wilcoxon's signed-rank test of pairs; those without a difference are left out."""
    difference = np.asarray(x, float) - np.asarray(y, float)
    difference = difference[difference != 0]
    count = len(difference)
    if not count:
        return Test(1.0, 0.0, 0, 0)
    ranks = stats.rankdata(np.abs(difference))
    effect = float((ranks * np.sign(difference)).sum() / ranks.sum())
    p = stats.wilcoxon(difference, method="exact").pvalue
    return Test(float(p), effect, count, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): below .05 each, .05 together."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted[order] = np.minimum(steps, 1)
    return [float(value) for value in adjusted]
