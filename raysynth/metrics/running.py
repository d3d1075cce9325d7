"""Features and kernel distances of samples that come one after another, in bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysynth.metrics.frechet import FeatureMoments
from raysynth.metrics.samples import Features

Rows = NDArray[np.int64]
Array = NDArray[np.float64]

KERNEL_ROWS = 256
"""Rows of a kernel matrix made at once, 8 MB of it."""


class RunningFeatures:
    """Features of the samples shown at one place: moments of all, and a random part as they are.

    Kept are the `max_kept` samples whose numbers have the smallest hashes, so neither the order nor
    the grouping in which they came decides who is among them.

    Attributes:
        moments: of every sample.
        rows: numbers of the samples kept, ascending (n,).
        features: of these (n, dim).
    """

    def __init__(self, dim: int, max_kept: int) -> None:
        self.moments = FeatureMoments(dim)
        self.max_kept = max_kept
        self.rows: Rows = np.zeros(0, np.int64)
        self.features: Features = np.zeros((0, dim), np.float32)

    @property
    def are_all_kept(self) -> bool:
        """Whether the features at hand are those of every sample."""
        return len(self.rows) == self.moments.count

    def update(self, rows: Rows, features: Features) -> None:
        """Adds features (n, dim) of samples that were not added before."""
        self.moments.update(features)
        self._keep(rows, features)

    def merge(self, other: RunningFeatures) -> None:
        """Adds what another worker saw."""
        self.moments.merge(other.moments)
        self._keep(other.rows, other.features)

    def _keep(self, rows: Rows, features: Features) -> None:
        rows = np.concatenate([self.rows, rows])
        order = np.argsort(rows)
        if len(rows) > self.max_kept:
            order = np.sort(np.argsort(_hashes(rows))[: self.max_kept])
            order = order[np.argsort(rows[order])]
        self.rows = rows[order]
        self.features = np.concatenate([self.features, features])[order]


def _hashes(rows: Rows) -> NDArray[np.uint64]:
    """Numbers mixed so that their order says nothing (splitmix64); no two have the same one."""
    mixed = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class RunningKernel:
    """The cubic MMD of KID between fixed real features and others that change little by little.

    A new sample costs its kernel with those that are there; nothing else is computed again.

    Args:
        real: features (m, dim).
    """

    def __init__(self, real: Features) -> None:
        self._real = real
        self._within_real = _mean_of_pairs(real)
        self._rows: Rows = np.zeros(0, np.int64)
        self._features: Features = np.zeros((0, real.shape[1]), np.float32)
        self._to_real: Array = np.zeros(0)
        """Of each other sample, the mean of its kernel with all real ones."""
        self._to_others: Array = np.zeros(0)
        """Of each other sample, the sum of its kernel with all others but itself."""

    def follow(self, rows: Rows, features: Features) -> None:
        """Makes these samples (n,), with their features (n, dim), the others."""
        stays = np.isin(self._rows, rows)
        if not stays.all():
            self._remove(~stays)
        for part in _blocks(np.flatnonzero(~np.isin(rows, self._rows))):
            self._add(rows[part], features[part])

    def distance(self) -> tuple[float, float]:
        """The unbiased squared MMD, and its standard error.

        The error is that of drawing other synthetic samples (the first term of the U-statistic's
        variance, Hoeffding 1948); the real ones stay.
        """
        count = len(self._rows)
        near = self._to_others / (count - 1) - self._to_real
        value = self._to_others.sum() / (count * (count - 1)) - 2 * self._to_real.mean()
        return float(value + self._within_real), float(2 * near.std(ddof=1) / count**0.5)

    def _add(self, rows: Rows, features: Features) -> None:
        count = len(self._rows)
        self._rows = np.concatenate([self._rows, rows])
        self._features = np.concatenate([self._features, features])
        kernel = _cubic(self._features, features)  # (all, new)
        itself = np.diagonal(kernel[count:])
        self._to_others = np.concatenate(
            [self._to_others + kernel[:count].sum(axis=1), kernel.sum(axis=0) - itself]
        )
        to_real = _cubic(self._real, features).mean(axis=0)
        self._to_real = np.concatenate([self._to_real, to_real])

    def _remove(self, gone: NDArray[np.bool_]) -> None:
        leaving = self._features[gone]
        self._rows, self._features = self._rows[~gone], self._features[~gone]
        self._to_real, self._to_others = self._to_real[~gone], self._to_others[~gone]
        for part in _blocks(np.arange(len(leaving))):
            self._to_others = self._to_others - _cubic(self._features, leaving[part]).sum(axis=1)


def _cubic(x: Features, y: Features) -> Array:
    """KID's kernel (x.y/dim + 1)^3 of all pairs, (n, m); multiplied, as powers take far longer."""
    kernel = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
    return kernel * kernel * kernel


def _mean_of_pairs(features: Features) -> float:
    """The mean kernel of a set with itself, self-pairs left out."""
    total = 0.0
    for part in _blocks(np.arange(len(features))):
        kernel = _cubic(features, features[part])
        total += float(kernel.sum() - kernel[part, np.arange(len(part))].sum())
    return total / (len(features) * (len(features) - 1))


def _blocks(places: Rows) -> list[Rows]:
    return [places[start : start + KERNEL_ROWS] for start in range(0, len(places), KERNEL_ROWS)]
