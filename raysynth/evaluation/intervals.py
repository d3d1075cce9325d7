"""Intervals and floors: how far a metric moves when other patients or samples are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]
Metrics = Callable[[Features, Features], Sequence[float]]
"""One or several figures of real features (n, dim) and others (m, dim)."""

Interval = tuple[float, float]

LEVEL = 0.95
Z = 1.959963984540054
"""Quantile of the normal distribution for that level, both sides."""

MIN_PATIENTS = 4
"""With fewer patients their samples are drawn instead, and the interval is too narrow."""


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval, if there were enough samples for one."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Arm:
    """Features of one set of samples.

    Attributes:
        features: (n, dim).
        patients: number of each sample's patient; of a synthetic one, the patient whose layout it
            was drawn on.
    """

    features: Features
    patients: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Arm:
        """Some of the samples."""
        return Arm(self.features[rows], self.patients[rows])

    def draw(self, count: int, rng: np.random.Generator) -> Arm:
        """`count` random samples, none twice; the arm itself if it has no more."""
        if count >= len(self):
            return self
        return self.take(np.sort(rng.permutation(len(self))[:count]))

    @property
    def units(self) -> NDArray[np.int64]:
        """What is drawn together: the patient, or the sample where there are too few patients."""
        if self.resampled == "patients":
            return self.patients
        return np.arange(len(self))

    @property
    def resampled(self) -> str:
        """`patients` or `samples`."""
        return "patients" if len(np.unique(self.patients)) >= MIN_PATIENTS else "samples"

    def half(self, rng: np.random.Generator) -> Arm:
        """The samples of a random half of the units."""
        units = np.unique(self.units)
        chosen = rng.permutation(units)[: len(units) // 2]
        return self.take(np.isin(self.units, chosen))


def subsample_intervals(
    metric: Metrics, real: Arm, other: Arm, values: Sequence[float], num_draws: int, seed: int
) -> list[Interval]:
    """95 % intervals of metrics, from halves of both arms drawn without replacement.

    A bootstrap draws samples twice, which alone moves FID upwards. Halves have no duplicates; their
    metric is biased too (they are smaller), so only its spread around its own mean is used. For a
    half drawn without replacement that spread is the one of the whole: the variance of a mean of
    h of G units is (G-h)/h times that of all G, hence the factor sqrt(h/(G-h)), 1 for even G
    (delete-d jackknife, Shao and Wu 1989).

    Args:
        metric: the distances.
        real: the reference.
        other: what is judged.
        values: the metrics of the whole arms, around which the intervals lie.
        num_draws: halves drawn.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [metric(real.half(rng).features, other.half(rng).features) for _ in range(num_draws)]
    )
    units = min(len(np.unique(real.units)), len(np.unique(other.units)))
    half = units // 2
    spread = (drawn - drawn.mean(axis=0)) * np.sqrt(half / (units - half))
    lows, highs = values + np.quantile(spread, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return [(float(low), float(high)) for low, high in zip(lows, highs, strict=True)]


def patient_splits(
    patients: NDArray[np.int64], num_reference_patients: int, num_splits: int, seed: int
) -> Iterator[NDArray[np.bool_]]:
    """Random patient-disjoint splits of the real samples, the floor of every distance.

    One side has as many patients as the reference that synthetic samples are judged by, at most
    half of all; the other side has the rest. So the floor is what a perfect generator would reach
    that had seen the other patients: where the reference is one patient, no generator can be closer
    to it than real patients are to each other.

    Args:
        patients: of every real sample, of every split.
        num_reference_patients: patients of the judged reference.
        num_splits: how many; none if there are fewer than two patients.
        seed: of the drawing.

    Yields:
        Which samples stand for the reference; the others are compared with them.
    """
    rng = np.random.default_rng(seed)
    names = np.unique(patients)
    if len(names) < 2:
        return
    count = max(1, min(num_reference_patients, len(names) // 2))
    for _ in range(num_splits):
        yield np.isin(patients, rng.permutation(names)[:count])


def wilson(successes: int, count: int) -> Interval:
    """Wilson's 95 % interval of a share (Wilson 1927); samples are taken as independent."""
    if not count:
        return 0.0, 1.0
    z2 = Z**2
    share = successes / count
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def correlation(spearman: float, count: int) -> Interval:
    """A rank correlation's 95 % interval by Fisher's transformation (Bonett & Wright 2000)."""
    if count < 4:
        return -1.0, 1.0
    spread = Z * np.sqrt((1 + spearman**2 / 2) / (count - 3))
    middle = np.arctanh(np.clip(spearman, -1 + 1e-12, 1 - 1e-12))
    return float(np.tanh(middle - spread)), float(np.tanh(middle + spread))
