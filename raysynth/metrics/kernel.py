"""Kernel distances of two sets of features: KID and the MMD of HA-GAN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError
from raysynth.metrics.samples import Features, checked_features, checked_pair

Array = NDArray[np.float64]

MIN_KERNEL_SAMPLES = 2
"""Fewer form no pair within a set."""


class FeatureTable:
    """Features by sample number: what kernel distances need, since no smaller statistic does.

    Workers update their own and merge them. `compute` sorts by number, so that the order in which
    they arrive does not matter. Memory is `4 * dim` bytes a sample: 50,000 samples of 2,048
    features take 0.4 GB.
    """

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int64]] = []
        self._features: list[NDArray[np.float32]] = []

    def update(self, rows: NDArray[np.integer], features: NDArray[np.float32]) -> None:
        """Adds features (n, dim) of the samples with these numbers (n,)."""
        assert len(rows) == len(features)
        if len(rows):
            self._rows.append(np.asarray(rows, dtype=np.int64))
            self._features.append(features)

    def merge(self, other: FeatureTable) -> None:
        """Adds what another worker saw."""
        self._rows += other._rows
        self._features += other._features

    def compute(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sample numbers (n,), ascending, and their features (n, dim)."""
        if not self._rows:
            return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
        rows = np.concatenate(self._rows)
        order = np.argsort(rows)
        assert len(np.unique(rows)) == len(rows), "a sample was counted twice"
        return rows[order], np.concatenate(self._features)[order]


@dataclass(frozen=True)
class KernelDistance:
    """KID over subsets.

    Attributes:
        mean: of the subsets; lower is better.
        std: their standard deviation.
    """

    mean: float
    std: float


def kernel_distance(
    real: Features,
    synthetic: Features,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """KID: the unbiased squared MMD with the kernel `(x.y/dim + 1)^3`, over random subsets.

    Bińkowski et al. 2018, section 4. The defaults are torch-fidelity's, and so are the subsets.
    A set no larger than `subset_size` is used whole; where both are, the spread is 0 and says
    nothing.

    Range and direction: no unit, about 0 to infinity; lower is better. It is unbiased, so that of
    equal distributions it scatters around 0, below too, and does not depend on N.

    Args:
        real: features (n, dim).
        synthetic: features (m, dim).
        num_subsets: that the mean is taken over.
        subset_size: samples of a side in each, drawn without replacement.
        seed: of the drawing.

    Raises:
        InputError: fewer than two samples on a side, or some are not finite.
    """
    real, synthetic = checked_pair(real, synthetic, "KID", MIN_KERNEL_SAMPLES)
    size = min(subset_size, len(real), len(synthetic))
    if size == len(real) == len(synthetic):
        num_subsets = 1
    # The legacy generator's stream is frozen, and torch-fidelity draws its subsets by it.
    rng = np.random.RandomState(seed)
    distances = []
    for _ in range(num_subsets):
        x = real[rng.choice(len(real), size, replace=False)]
        y = synthetic[rng.choice(len(synthetic), size, replace=False)]
        distances.append(cubic_mmd2(x, y))
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def cubic_mmd2(x: Features, y: Features) -> float:
    """The unbiased squared MMD of two whole sets with KID's kernel, `(x.y/dim + 1)^3`.

    Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, section 4. Range and direction as KID's:
    about 0 to infinity, lower is better; small negative values are legitimate.

    Args:
        x: features (n, dim) of one set.
        y: features (m, dim) of the other.

    Raises:
        InputError: fewer than two samples on a side, or some are not finite.
    """
    x, y = checked_pair(x, y, "KID", MIN_KERNEL_SAMPLES)
    dim = x.shape[1]
    return _unbiased(*((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))))


def gaussian_mmd2(x: Features, y: Features, bandwidth: float | None = None) -> float:
    """The unbiased squared MMD with the kernel `exp(-|a - b|^2 / bandwidth^2)`.

    Gretton et al. 2012, eq. 3, as published for HA-GAN (Sun et al. 2022, their code): no root is
    taken, the kernel has no factor 2, and small negative values are legitimate.

    Range and direction: no unit, about 0 to 2; lower is better, and equal distributions scatter
    around 0.

    Args:
        x: features (n, dim) of one set.
        y: features (m, dim) of the other.
        bandwidth: None: `median_distance` of both sets together, as published. That changes with
            the data, so give `median_distance(real)` to compare models.

    Raises:
        InputError: fewer than two samples on a side, some not finite, or no bandwidth.
    """
    x, y = checked_pair(x, y, "the MMD", MIN_KERNEL_SAMPLES)
    squared = _squared_distances(np.concatenate([x, y]))
    if bandwidth is None:
        bandwidth = _lower_median(squared) ** 0.5
    if bandwidth <= 0:
        raise InputError(
            f"the MMD's bandwidth is {bandwidth:g}: it must be above 0; more than half of the "
            "features are alike"
        )
    kernel = np.exp(squared / -(bandwidth**2))
    n = len(x)
    return _unbiased(kernel[:n, :n], kernel[n:, n:], kernel[:n, n:])


def median_distance(features: Features) -> float:
    """The lower median of the full matrix of Euclidean distances, zero diagonal included.

    A bandwidth for `gaussian_mmd2`, in units of the features (n, dim); no figure to judge by.
    """
    features = checked_features(features, "the MMD", MIN_KERNEL_SAMPLES)
    return float(_lower_median(_squared_distances(features)) ** 0.5)


def _squared_distances(features: Array) -> Array:
    """All squared Euclidean distances (n, n), by one matrix product in float64."""
    values = features - features.mean(axis=0)  # near the origin less is lost in the difference
    gram = values @ values.T
    norms = np.diagonal(gram)
    squared: Array = np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)
    np.fill_diagonal(squared, 0)
    return squared


def _lower_median(values: Array) -> float:
    middle = (values.size - 1) // 2
    return float(np.partition(values.ravel(), middle)[middle])


def _unbiased(k_xx: Array, k_yy: Array, k_xy: Array) -> float:
    """Squared MMD from kernel matrices, self-pairs left out (Gretton et al. 2012, eq. 3)."""
    n, m = k_xy.shape
    within_x = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within_x + within_y - 2 * k_xy.mean())
