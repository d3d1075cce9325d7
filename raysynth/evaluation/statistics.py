"""Tests, equivalence and agreement: what a difference is worth.

Exact where that is feasible. That nothing significant was found is never called equality; that is
what `tost` is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from raysynth.evaluation.intervals import Interval

MAX_EXACT_PAIRS = 2500
"""Of n times m; beyond, the normal approximation is as good and takes no time."""

MAX_EXACT_SIGNS = 300

Verdict = Literal["equivalent", "different", "not shown"]


@dataclass(frozen=True)
class Test:
    """A two-sided test of two samples.

    Attributes:
        p: two-sided p-value.
        effect: rank-biserial correlation, -1 to 1; positive: the first sample is larger.
        n: values of the first sample, or pairs that differ.
        m: values of the second sample, or pairs that differ.
        method: how p was computed.
    """

    __test__ = False  # for pytest, which collects by name

    p: float
    effect: float
    n: int
    m: int
    method: str


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests at 5 % each (Schuirmann 1987).

    Attributes:
        estimate: the difference.
        interval90: lies within plus and minus `delta` if equivalence is shown.
        interval95: leaves 0 out if a difference is shown.
        delta: largest difference that does not matter, fixed beforehand.
        verdict: `equivalent` where both are shown: the difference is there, and does not matter.
    """

    estimate: float
    interval90: Interval
    interval95: Interval
    delta: float
    verdict: Verdict


@dataclass(frozen=True)
class Sensitivity:
    """d', the distance of two judged kinds in standard deviations; 0: they look alike."""

    value: float
    interval: Interval


def rank_sum(x: ArrayLike, y: ArrayLike) -> Test:
    """Wilcoxon's rank-sum test (Mann and Whitney's U) of two independent samples.

    Exact, given the ties that there are, for up to `MAX_EXACT_PAIRS` pairs. The effect is
    1 - 2 U / (n m), U counting the pairs in which the second value is larger, and ties half.

    Raises:
        ValueError: a sample is empty or has a value that is no number.
    """
    first, second = _finite(x), _finite(y)
    n, m = len(first), len(second)
    if not n or not m:
        raise ValueError(f"a rank-sum test of {n} and {m} values needs at least one of each")
    ranks = stats.rankdata(np.concatenate([first, second]))
    u = ranks[:n].sum() - n * (n + 1) / 2
    effect = float(2 * u / (n * m) - 1)
    if n * m <= MAX_EXACT_PAIRS:
        return Test(_exact_rank_sum(ranks, n), effect, n, m, "exact rank-sum")
    p = stats.mannwhitneyu(first, second, alternative="two-sided", method="asymptotic").pvalue
    return Test(float(p), effect, n, m, "rank-sum, normal approximation")


def signed_rank(x: ArrayLike, y: ArrayLike) -> Test:
    """Wilcoxon's signed-rank test of pairs; those without a difference are left out, as he did.

    Exact, given the ties that there are, for up to `MAX_EXACT_SIGNS` pairs that differ. The effect
    is the share of ranks that speak for the first sample minus the share against it.

    Raises:
        ValueError: unequal lengths, or a value that is no number.
    """
    first, second = _finite(x), _finite(y)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    difference = first - second
    difference = difference[difference != 0]
    count = len(difference)
    if not count:
        return Test(1.0, 0.0, 0, 0, "no pair differs")
    ranks = stats.rankdata(np.abs(difference))
    effect = float((ranks * np.sign(difference)).sum() / ranks.sum())
    if count <= MAX_EXACT_SIGNS:
        return Test(
            _exact_signed_rank(ranks, difference > 0), effect, count, count, "exact signed-rank"
        )
    p = stats.wilcoxon(difference, method="approx").pvalue
    return Test(float(p), effect, count, count, "signed-rank, normal approximation")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): below .05 each, .05 together."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def tost(estimate: float, draws: ArrayLike, delta: float) -> Equivalence:
    """Equivalence of two things from bootstrap draws of their difference.

    Args:
        estimate: the difference.
        draws: of it (b,).
        delta: largest difference that does not matter, fixed beforehand.
    """
    low90, high90, low95, high95 = np.quantile(np.asarray(draws), (0.05, 0.95, 0.025, 0.975))
    return _equivalence(
        estimate, (float(low90), float(high90)), (float(low95), float(high95)), delta
    )


def tost_share(successes: int, count: int, delta: float, expected: float = 0.5) -> Equivalence:
    """Equivalence of a share of independent answers and the `expected` one, by exact intervals."""
    low90, high90 = clopper_pearson(successes, count, 0.9)
    low95, high95 = clopper_pearson(successes, count, 0.95)
    return _equivalence(
        successes / count - expected,
        (low90 - expected, high90 - expected),
        (low95 - expected, high95 - expected),
        delta,
    )


def tost_answers(delta: float, power: float = 0.8) -> int:
    """Independent answers by which a true share of .5 is shown within `delta` with that power.

    The normal approximation of both one-sided tests at 5 %; 214 for delta .10 and power .8.
    """
    z = stats.norm.ppf(0.95) + stats.norm.ppf((1 + power) / 2)
    return round(float((z / delta) ** 2 / 4))


def tost_power(count: int, delta: float) -> float:
    """Chance that so many independent answers show a true share of .5 within `delta`.

    The inverse of `tost_answers`.
    """
    reach = 2 * delta * count**0.5 - stats.norm.ppf(0.95)
    return max(0.0, float(2 * stats.norm.cdf(reach) - 1))


def clopper_pearson(successes: int, count: int, level: float = 0.95) -> Interval:
    """The exact interval of a share (Clopper and Pearson 1934)."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, successes, count - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, count - successes) if successes < count else 1.0
    return float(low), float(high)


def d_prime(hits: int, misses: int, false_alarms: int, correct_rejections: int) -> Sensitivity:
    """The distance z(hit rate) - z(false-alarm rate), with its 95 % interval.

    Half an answer is added to each of the four counts, so that rates of 0 and 1 have a value
    (log-linear, Hautus 1995). The variance is Gourevitch and Galanter's (1967).
    """
    value, variance = 0.0, 0.0
    for sign, yes, no in ((1, hits, misses), (-1, false_alarms, correct_rejections)):
        count = yes + no + 1
        rate = (yes + 0.5) / count
        z = stats.norm.ppf(rate)
        value += sign * z
        variance += rate * (1 - rate) / (count * stats.norm.pdf(z) ** 2)
    reach = stats.norm.ppf(0.975) * variance**0.5
    return Sensitivity(float(value), (float(value - reach), float(value + reach)))


def cohen_kappa(one: ArrayLike, other: ArrayLike) -> float:
    """Agreement of two series of answers beyond chance (Cohen 1960); 1 if all are one and same."""
    first, second = np.asarray(one), np.asarray(other)
    assert first.shape == second.shape
    answers = np.unique(np.concatenate([first, second]))
    agreed = float((first == second).mean())
    chance = float(sum((first == answer).mean() * (second == answer).mean() for answer in answers))
    return 1.0 if chance == 1 else (agreed - chance) / (1 - chance)


def fleiss_kappa(counts: ArrayLike) -> float:
    """Agreement of several readers beyond chance (Fleiss 1971); 1 if all answers are the same.

    Args:
        counts: answers of each kind (items, kinds). Items of fewer than two answers are left out;
            the numbers of answers may differ (Fleiss and Cuzick 1979, for any number of kinds).

    Raises:
        ValueError: no item has two answers.
    """
    table = np.asarray(counts, dtype=np.float64)
    answers = table.sum(axis=1)
    table, answers = table[answers >= 2], answers[answers >= 2]
    if not len(table):
        raise ValueError("agreement needs items that two readers have answered")
    share = table.sum(axis=0) / table.sum()
    chance = float((share**2).sum())
    agreeing = ((table**2).sum(axis=1) - answers) / (answers - 1)
    agreed = float(agreeing.sum() / answers.sum())
    return 1.0 if chance == 1 else (agreed - chance) / (1 - chance)


def _equivalence(
    estimate: float, interval90: Interval, interval95: Interval, delta: float
) -> Equivalence:
    verdict: Verdict = "not shown"
    if -delta < interval90[0] and interval90[1] < delta:
        verdict = "equivalent"
    elif not interval95[0] <= 0 <= interval95[1]:
        verdict = "different"
    return Equivalence(estimate, interval90, interval95, delta, verdict)


def _exact_rank_sum(ranks: NDArray[np.float64], n: int) -> float:
    """The share of all choices of n ranks whose sum is as far from its mean as that of the first.

    Counts choices by size and sum, rank by rank. Ranks are doubled: with ties they are halves.
    """
    doubled = np.rint(2 * ranks).astype(int)
    n_drawn = min(n, len(ranks) - n)  # the others' sum says the same
    drawn = doubled[:n] if n_drawn == n else doubled[n:]
    ways = np.zeros((n_drawn + 1, doubled.sum() + 1))
    ways[0, 0] = 1
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    # Sums are whole: comparing deviations times the number of ranks needs no tolerance.
    deviation = np.abs(np.arange(ways.shape[1]) * len(ranks) - n_drawn * doubled.sum())
    observed = abs(drawn.sum() * len(ranks) - n_drawn * doubled.sum())
    return _tail(ways[-1], deviation >= observed)


def _exact_signed_rank(ranks: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The share of all signs of the ranks whose positive sum is as far from its mean."""
    doubled = np.rint(2 * ranks).astype(int)
    total = int(doubled.sum())
    ways = np.zeros(total + 1)
    ways[0] = 1
    for rank in doubled:
        ways[rank:] += ways[: len(ways) - rank].copy()
    deviation = np.abs(2 * np.arange(total + 1) - total)
    return _tail(ways, deviation >= abs(2 * int(doubled[positive].sum()) - total))


def _tail(ways: NDArray[np.float64], far: NDArray[np.bool_]) -> float:
    return float(min(1.0, ways[far].sum() / ways.sum()))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not np.isfinite(given).all():
        raise ValueError("a rank test needs two lists of numbers, without gaps")
    return given
