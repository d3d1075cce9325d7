"""Can the scores that were asked for be read off the images? A judge learns them from real ones.

Ridge regression from the features of a nodule's crop to the mean score of its readers, cut into the
scores 1 to 5 where they get the shares that they have among the readers. Trained on training
patients; what it makes of held-out nodules, and how far two readers agree, stand beside what it
makes of synthetic ones (methods, F.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from raysynth.case import CONDITION_ATTRIBUTES, CONDITION_COLUMNS
from raysynth.evaluation.intervals import LEVEL, Interval
from raysynth.formats.lidc import nodule_records

SCORES = np.arange(1, 6)
RIDGES = 10.0 ** np.arange(-2, 5)
"""Penalties tried, in units of the features' mean variance; the best by leaving one out is kept."""

MIN_NODULES = 20
"""With fewer training nodules no judge is trained."""

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """How the judge's scores agree with those that were given or asked for.

    Attributes:
        n: nodules compared.
        accuracy: share of equal scores.
        within_one: share of scores that differ by one at most.
        kappa: quadratic weighted kappa (Cohen 1968); 0 is chance.
        interval: of kappa, 95 %, over nodules drawn with replacement.
    """

    n: int
    accuracy: float
    within_one: float
    kappa: float
    interval: Interval


class ScoreJudge:
    """Reads one score off features."""

    def __init__(self, features: Features, scores: NDArray[np.floating]) -> None:
        """Learns it.

        Args:
            features: of real nodules (n, dim).
            scores: mean of each one's readers (n,).
        """
        self.mean = features.mean(axis=0)
        self.scale = features.std(axis=0) + 1e-6
        self.offset = scores.mean()
        x, y = (features - self.mean) / self.scale, scores - self.offset
        u, singular, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        best = np.inf
        for penalty in RIDGES * (singular**2).mean():
            kept = singular**2 / (singular**2 + penalty)
            fitted = u @ (kept * (u.T @ y))
            leverage = ((u**2) * kept).sum(axis=1) + 1 / len(y)  # of the mean, too
            left_out = (y - fitted) / (1 - np.minimum(leverage, 0.999))
            if (error := float((left_out**2).mean())) < best:
                best = error
                self.weights = vt.T @ (kept / singular.clip(min=1e-12) * (u.T @ y))
                guesses = y - left_out
        shares = np.cumsum([np.mean(rounded(scores) == score) for score in SCORES[:-1]])
        self.cuts = np.quantile(guesses + self.offset, np.minimum(shares, 1.0))

    def __call__(self, features: Features) -> NDArray[np.int64]:
        """Scores (n,) of features (n, dim)."""
        guesses = (features - self.mean) / self.scale @ self.weights + self.offset
        judged: NDArray[np.int64] = 1 + np.searchsorted(self.cuts, guesses, side="left")
        return judged


def train_judges(features: Features, ratings: NDArray[np.uint8]) -> dict[str, ScoreJudge]:
    """A judge for every score that guides models and that varies among these nodules.

    Args:
        features: of real training nodules (n, dim).
        ratings: by all their readers (n, readers, 9); 0 = absent.
    """
    judges = {}
    for name, scores in mean_scores(ratings).items():
        given = np.isfinite(scores)
        if np.count_nonzero(given) >= MIN_NODULES and len(np.unique(rounded(scores[given]))) > 1:
            judges[name] = ScoreJudge(features[given], scores[given])
    return judges


def of_readers(
    judges: dict[str, ScoreJudge], features: Features, ratings: NDArray[np.uint8], seed: int
) -> dict[str, Agreement]:
    """The judges beside the readers of other real nodules: what they can do at best."""
    means = mean_scores(ratings)
    return _compared(
        judges,
        features,
        {name: np.where(np.isfinite(m), rounded(m), 0).astype(int) for name, m in means.items()},
        seed,
    )


def of_requests(
    judges: dict[str, ScoreJudge], features: Features, attributes: NDArray[np.uint8], seed: int
) -> dict[str, Agreement]:
    """The judges beside what synthetic nodules were asked to show.

    Args:
        judges: from `train_judges`.
        features: of the synthetic nodules (n, dim).
        attributes: requested scores (n, 5); 0 = not given.
        seed: of the intervals.
    """
    asked = dict(zip(CONDITION_ATTRIBUTES, attributes.astype(int).T, strict=True))
    return _compared(judges, features, asked, seed)


@cache
def between_readers() -> dict[str, float]:
    """Kappa of two readers of one LIDC nodule, over all ordered pairs of readers."""
    pairs = np.array(
        [
            pair
            for record in nodule_records()
            if 2 <= len(record.ratings) <= 4
            for pair in permutations(record.ratings, 2)
        ]
    )
    return {
        name: quadratic_kappa(pairs[:, 0, column], pairs[:, 1, column])
        for name, column in zip(CONDITION_ATTRIBUTES, CONDITION_COLUMNS, strict=True)
    }


def quadratic_kappa(one: NDArray[np.integer], other: NDArray[np.integer]) -> float:
    """Cohen's kappa of scores 1-5 with quadratic weights; 0 where neither side varies."""
    seen = np.zeros((len(SCORES), len(SCORES)))
    np.add.at(seen, (one - 1, other - 1), 1)
    weight = (SCORES[:, None] - SCORES) ** 2
    by_chance = np.outer(seen.sum(axis=1), seen.sum(axis=0)) / seen.sum()
    expected = float((weight * by_chance).sum())
    return 1 - float((weight * seen).sum()) / expected if expected else 0.0


def mean_kappa(
    judges: dict[str, ScoreJudge],
    features: Features,
    attributes: NDArray[np.uint8],
    requests: NDArray[np.int64],
    seed: int,
    num_draws: int = 500,
) -> tuple[float, Interval] | None:
    """Quadratic kappa of the judges, mean over the scores, with its 95 % interval.

    Args:
        judges: from `train_judges`.
        features: of nodules (n, dim).
        attributes: their scores (n, 5); 0 = not given.
        requests: number of the request that each was drawn for (n,); the interval draws requests.
        seed: of the drawing.
        num_draws: behind the interval.

    Returns:
        None where there are no scores to compare.
    """
    asked = dict(zip(CONDITION_ATTRIBUTES, attributes.astype(int).T, strict=True))
    pairs = {
        name: (judge(features), asked[name])
        for name, judge in judges.items()
        if len(features) and (asked[name] > 0).any()
    }
    if not pairs:
        return None

    def mean_over(rows: NDArray[np.int64]) -> float:
        kappas = []
        for judged, given in pairs.values():
            known = rows[given[rows] > 0]
            kappas.append(quadratic_kappa(judged[known], given[known]) if len(known) else 0.0)
        return float(np.mean(kappas))

    rng = np.random.default_rng(seed)
    _, which = np.unique(requests, return_inverse=True)
    order = np.argsort(which, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
    drawn = [
        mean_over(np.concatenate([parts[part] for part in rng.integers(0, len(parts), len(parts))]))
        for _ in range(num_draws)
    ]
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return mean_over(np.arange(len(features))), (float(low), float(high))


def _compared(
    judges: dict[str, ScoreJudge],
    features: Features,
    scores: dict[str, NDArray[np.int_]],
    seed: int,
) -> dict[str, Agreement]:
    agreements = {}
    for name, judge in judges.items():
        given = scores[name] > 0
        if given.any():
            agreements[name] = _agreement(judge(features[given]), scores[name][given], seed)
    return agreements


def _agreement(
    judged: NDArray[np.int64], asked: NDArray[np.int_], seed: int, num_draws: int = 500
) -> Agreement:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(asked), (num_draws, len(asked)))
    kappas = [quadratic_kappa(judged[rows], asked[rows]) for rows in drawn]
    low, high = np.quantile(kappas, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    apart = np.abs(judged - asked)
    return Agreement(
        n=len(asked),
        accuracy=float(np.mean(apart == 0)),
        within_one=float(np.mean(apart <= 1)),
        kappa=quadratic_kappa(judged, asked),
        interval=(float(low), float(high)),
    )


def mean_scores(ratings: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    """Mean over the readers who gave one, by the name of the score; NaN where nobody did."""
    total, readers = ratings.sum(axis=1), (ratings > 0).sum(axis=1)
    means = np.where(readers > 0, total / np.maximum(readers, 1), np.nan)
    return dict(zip(CONDITION_ATTRIBUTES, means[:, CONDITION_COLUMNS].T, strict=True))


def rounded(scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """The nearest score; halves go up."""
    whole: NDArray[np.floating] = np.floor(scores + 0.5)
    return whole
