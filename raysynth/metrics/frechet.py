"""The Fréchet distance of two sets of features (FID) from float64 statistics that merge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class FeatureMoments:
    """Running mean and covariance of features in float64.

    Workers update their own and merge them: any order and any grouping give the same result up to
    rounding (about 1e-12 relative).

    Args:
        dim: length of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean: Array = np.zeros(dim)
        self.scatter: Array = np.zeros((dim, dim))
        """Sum of outer products of deviations from the mean."""

    def update(self, features: NDArray[np.floating]) -> None:
        """Adds a batch of features, shape (n, dim)."""
        if not len(features):
            return
        batch = FeatureMoments(len(self.mean))
        values = np.asarray(features, dtype=np.float64)
        batch.count = len(values)
        batch.mean = values.mean(axis=0)
        deviations = values - batch.mean
        batch.scatter = deviations.T @ deviations
        self.merge(batch)

    def merge(self, other: FeatureMoments) -> None:
        """Adds what another worker saw (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        if not count:
            return
        shift = other.mean - self.mean
        self.scatter = (
            self.scatter
            + other.scatter
            + np.outer(shift, shift) * (self.count * other.count / count)
        )
        self.mean = self.mean + shift * (other.count / count)
        self.count = count

    def compute(self) -> tuple[Array, Array]:
        """The mean (dim,) and the unbiased covariance (dim, dim).

        Raises:
            ValueError: fewer than two features were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.mean, self.scatter / (self.count - 1)


def frechet_distance(real: FeatureMoments, synthetic: FeatureMoments) -> float:
    """The squared Fréchet distance of the Gaussians fitted to two sets of features.

    `|mu_r - mu_s|^2 + Tr(S_r + S_s - 2 (S_r S_s)^(1/2))`, Heusel et al. 2017, eq. 6.
    """
    mean_r, covariance_r = real.compute()
    mean_s, covariance_s = synthetic.compute()
    return _distance(mean_r - mean_s, _root(covariance_r), _root(covariance_s))


def frechet_distance_of(real: NDArray[np.floating], synthetic: NDArray[np.floating]) -> float:
    """`frechet_distance` of features at hand, shapes (n, dim) and (m, dim).

    Needs no dim x dim covariance, so it is much faster and exact where n or m is below dim.
    """
    mean_r, factor_r = _factor(real)
    mean_s, factor_s = _factor(synthetic)
    return _distance(mean_r - mean_s, factor_r, factor_s)


def _distance(shift: Array, factor_r: Array, factor_s: Array) -> float:
    """The distance of covariances `factor.T @ factor`.

    The eigenvalues of S_r S_s are the squared singular values of `factor_r @ factor_s.T`, so the
    trace of the root is their sum: real and finite whatever the rank.
    """
    trace = np.sum(factor_r**2) + np.sum(factor_s**2)
    root_trace = np.linalg.svd(factor_r @ factor_s.T, compute_uv=False).sum()
    return float(shift @ shift + trace - 2 * root_trace)


def _factor(features: NDArray[np.floating]) -> tuple[Array, Array]:
    """The mean of features and a factor of their unbiased covariance."""
    values = np.asarray(features, dtype=np.float64)
    count, dim = values.shape
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, not {count}")
    mean = values.mean(axis=0)
    deviations = (values - mean) / np.sqrt(count - 1)
    if count <= dim:
        return mean, deviations
    triangle: Array = np.asarray(np.linalg.qr(deviations, mode="r"))
    return mean, triangle


def _root(covariance: Array) -> Array:
    """A factor of a covariance whose rank may be short."""
    values, vectors = np.linalg.eigh(covariance)
    values[values < values.max() * len(values) * np.finfo(np.float64).eps] = 0.0
    return np.sqrt(values)[:, None] * vectors.T


@dataclass(frozen=True)
class FrechetLimit:
    """FID extrapolated to infinitely many samples.

    Attributes:
        value: intercept of the fit.
        slope: FID's dependence on 1/N, its small-sample bias.
    """

    value: float
    slope: float


def frechet_limit(
    real: NDArray[np.floating],
    synthetic: NDArray[np.floating],
    seed: int,
    *,
    num_sizes: int = 6,
    num_draws: int = 8,
) -> FrechetLimit:
    """FID_inf: a line through FID against 1/N, at N from half of the samples to all of them.

    Chong and Forsyth 2020, section 4. Both sets shrink together, so both biases vanish. At each N
    `num_draws` random subsets are averaged.
    """
    rng = np.random.default_rng(seed)
    total = min(len(real), len(synthetic))
    sizes = np.unique(np.linspace(max(2, total // 2), total, num_sizes).astype(int))
    if len(sizes) < 2:
        raise ValueError(f"FID_inf needs more than {total} samples a side")

    def drawn(size: int) -> float:
        x, y = (side[rng.permutation(len(side))[:size]] for side in (real, synthetic))
        return frechet_distance_of(x, y)

    distances = [np.mean([drawn(size) for _ in range(num_draws)]) for size in sizes]
    slope, intercept = np.polyfit(1.0 / sizes, distances, 1)
    return FrechetLimit(float(intercept), float(slope))
