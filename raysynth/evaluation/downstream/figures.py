"""Figures of all arms of a task: folds, differences with intervals, and tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raysynth.evaluation.downstream.tables import Table, Weights, join
from raysynth.evaluation.intervals import LEVEL, Interval
from raysynth.evaluation.statistics import Test, holm, rank_sum, signed_rank

Measure = Callable[[Table, Weights], dict[str, float]]

Runs = Sequence[Sequence[Table]]
"""Tables of one arm, by seed and fold."""

ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """One arm minus the arm that it is compared with.

    Attributes:
        value: of the pooled predictions of all folds.
        interval: at 95 %, over patients drawn with replacement, the same for both arms; None where
            there was nothing to compute it from.
        rank_sum: on the folds' values, as published; `signed_rank`: the same, in pairs.
        rank_sum_p: its p after Holm, over the arms that are compared with the same one; and so
            `signed_rank_p`.
    """

    value: float | None
    interval: Interval | None
    rank_sum: Test
    signed_rank: Test
    rank_sum_p: float
    signed_rank_p: float

    @property
    def sign(self) -> int:
        """1 better, -1 worse, 0 not certain.

        Certain is what the interval says and the folds in pairs do not contradict: patients alone
        know nothing of the chance in training, which moves an arm as a whole.
        """
        if self.interval is None or self.signed_rank_p >= ALPHA:
            return 0
        low, high = self.interval
        return int(low > 0) - int(high < 0)


@dataclass(frozen=True)
class Metric:
    """One metric of one arm.

    Attributes:
        mean: over the folds.
        sd: over the folds, of a sample.
        folds: value of each, mean over the seeds; None where a fold has nothing to measure.
        difference: to the arm that this one is compared with; None for that arm itself, and where
            no fold has values of both.
    """

    mean: float | None
    sd: float | None
    folds: list[float | None]
    difference: Difference | None = None


Figures = dict[str, Metric]


def figures_of(
    arms: Mapping[str, Runs], measure: Measure, num_draws: int, seed: int
) -> dict[str, Figures]:
    """Metrics of every arm by its name; all are compared with the first.

    Args:
        arms: tables by arm, seed and fold; their column `patient` has keys.
        measure: figures of a table.
        num_draws: of patients, behind each interval.
        seed: of the drawing.
    """
    base, *others = arms
    folds = {name: _of_folds(runs, measure) for name, runs in arms.items()}
    pooled = _of_pooled(arms, measure, num_draws, seed)
    figures = {
        name: {key: _metric(values[key]) for key in values} for name, values in folds.items()
    }
    for key in figures[base]:
        compared = {
            name: _difference(
                folds[name][key], folds[base][key], pooled[name][key] - pooled[base][key]
            )
            for name in others
        }
        found = {name: one for name, one in compared.items() if one is not None}
        for name, one in _adjusted(found).items():
            figures[name][key] = replace(figures[name][key], difference=one)
    return figures


def _of_folds(runs: Runs, measure: Measure) -> dict[str, NDArray[np.float64]]:
    """Values (folds,), mean over the seeds; NaN where there is nothing to measure."""
    values = [[_measured(fold, measure) for fold in of_seed] for of_seed in runs]
    keys = next((one for of_seed in values for one in of_seed if one), {})
    return {
        key: np.array([[one.get(key, np.nan) for one in of_seed] for of_seed in values]).mean(
            axis=0
        )
        for key in keys
    }


def _measured(table: Table, measure: Measure) -> dict[str, float]:
    count = len(table["patient"])
    if not count:
        return {}
    return measure(_numbered(table, np.unique(table["patient"])), np.ones(count))


def _numbered(table: Table, patients: NDArray[np.str_]) -> Table:
    """With numbers for the patients' keys."""
    return table | {"patient": np.searchsorted(patients, table["patient"])}


def _of_pooled(
    arms: Mapping[str, Runs], measure: Measure, num_draws: int, seed: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Values (1 + draws,) of all folds' predictions together: as they are, then by drawn patients.

    Every arm is judged on the same patients in the same draw.
    """
    joined = {name: [join(folds) for folds in runs] for name, runs in arms.items()}
    # Where a network draws no box in a patient, its table need not name them.
    named = [table["patient"] for of_seeds in joined.values() for table in of_seeds]
    patients = np.unique(np.concatenate(named))
    count = len(patients)
    tables = {
        name: [_numbered(table, patients) for table in of_seeds]
        for name, of_seeds in joined.items()
    }
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), num_draws)
    times = np.concatenate([np.ones((1, count)), drawn])
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, of_seeds in tables.items():
        found = [[measure(table, one[table["patient"]]) for one in times] for table in of_seeds]
        values[name] = {
            key: np.array([[one[key] for one in of_seed] for of_seed in found]).mean(axis=0)
            for key in found[0][0]
        }
    return values


def _metric(values: NDArray[np.float64]) -> Metric:
    known = values[np.isfinite(values)]
    return Metric(
        mean=float(known.mean()) if len(known) else None,
        sd=float(known.std(ddof=1)) if len(known) > 1 else None,
        folds=[float(value) if np.isfinite(value) else None for value in values],
    )


def _difference(
    one: NDArray[np.float64], base: NDArray[np.float64], pooled: NDArray[np.float64]
) -> Difference | None:
    both = np.isfinite(one) & np.isfinite(base)
    if not both.any():
        return None
    sum_test, sign_test = rank_sum(one[both], base[both]), signed_rank(one[both], base[both])
    value, draws = pooled[0], pooled[1:][np.isfinite(pooled[1:])]
    interval = None
    if len(draws):
        low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        interval = float(low), float(high)
    return Difference(
        value=float(value) if np.isfinite(value) else None,
        interval=interval,
        rank_sum=sum_test,
        signed_rank=sign_test,
        rank_sum_p=sum_test.p,
        signed_rank_p=sign_test.p,
    )


def _adjusted(compared: Mapping[str, Difference]) -> dict[str, Difference]:
    sums = holm([one.rank_sum.p for one in compared.values()])
    signs = holm([one.signed_rank.p for one in compared.values()])
    return {
        name: replace(one, rank_sum_p=by_sum, signed_rank_p=by_sign)
        for (name, one), by_sum, by_sign in zip(compared.items(), sums, signs, strict=True)
    }
