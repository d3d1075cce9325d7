"""The Fréchet distance of two sets of features (FID) from float64 statistics that merge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.linalg.blas import dsyrk

from raysynth.errors import InputError
from raysynth.metrics.samples import Features, checked_features, checked_pair

Array = NDArray[np.float64]

MIN_FRECHET_SAMPLES = 2
"""Fewer have no covariance."""

MIN_LIMIT_SAMPLES = 3
"""Fewer give no two sizes to draw a line through."""

PRECISION = 1e-6
"""Expected relative rounding of a distance above which the slower and exact way is taken."""


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
        """Sum of outer products of deviations from the mean; its upper triangle alone counts."""

    def update(self, features: Features) -> None:
        """Adds a batch of features, shape (n, dim).

        Raises:
            InputError: some are not finite.
        """
        values = checked_features(features, "the Fréchet distance", at_least=0)
        if not len(values):
            return
        count, mean = self.count + len(values), values.mean(axis=0)
        shift = mean - self.mean
        # What `merge` does with the batch's own moments, as one product: the shift is one more row.
        row = shift * np.sqrt(self.count * len(values) / count)
        deviations = np.concatenate([values - mean, row[None]])
        self.scatter = _add_products(self.scatter, deviations)
        self.mean = self.mean + shift * (len(values) / count)
        self.count = count

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
            InputError: fewer than two features were seen.
        """
        if self.count < MIN_FRECHET_SAMPLES:
            raise InputError(
                f"the Fréchet distance needs at least {MIN_FRECHET_SAMPLES} samples a side, got "
                f"{self.count}: give more"
            )
        upper = np.triu(self.scatter) / (self.count - 1)
        return self.mean, upper + np.triu(upper, 1).T


def _add_products(scatter: Array, deviations: Array) -> Array:
    """The upper triangle of `scatter + deviations.T @ deviations`, in place where that may be.

    Half the work of the whole product, and no second matrix. BLAS counts in columns: the lower
    triangle that it fills is the upper one of rows.
    """
    in_place = scatter.flags.writeable  # not if it came from another worker
    total: Array = dsyrk(
        1.0, deviations.T, beta=1.0, c=scatter.T, lower=1, overwrite_c=int(in_place)
    )
    return total.T


def frechet_distance(real: FeatureMoments, synthetic: FeatureMoments) -> float:
    """The squared Fréchet distance of the Gaussians fitted to two sets of features (FID).

    `|mu_r - mu_s|^2 + Tr(S_r + S_s - 2 (S_r S_s)^(1/2))`, Heusel et al. 2017, eq. 6 (Dowson and
    Landau 1982), with unbiased covariances.

    Range and direction: 0 to infinity, in squared units of the features; lower is better, 0 for
    equal means and covariances. It falls with N, roughly as 1/N (`frechet_limit`): compare at equal
    N and extractor alone.

    Args:
        real: moments of features of any length.
        synthetic: of features as long.

    Raises:
        InputError: fewer than two features on a side, or of different lengths.
    """
    mean_r, covariance_r = real.compute()
    mean_s, covariance_s = synthetic.compute()
    if mean_r.shape != mean_s.shape:
        raise InputError(
            f"the Fréchet distance of {len(mean_r)} and {len(mean_s)} features a sample: compare "
            "those of one extractor"
        )
    shift = mean_r - mean_s
    if min(real.count, synthetic.count) > len(shift):
        quick = _of_covariances(shift, covariance_r, covariance_s)
        if quick is not None:
            return quick
    return _of_factors(shift, _root(covariance_r), _root(covariance_s))


def frechet_distance_of(real: Features, synthetic: Features) -> float:
    """`frechet_distance` of features at hand, exact and fast where there are few of them.

    Heusel et al. 2017, eq. 6. Where n or m is below dim it needs no dim x dim covariance. Range and
    direction as there: 0 to infinity, lower is better.

    Args:
        real: features (n, dim).
        synthetic: features (m, dim).

    Raises:
        InputError: fewer than two a side, or some are not finite.
    """
    x, y = checked_pair(real, synthetic, "the Fréchet distance", MIN_FRECHET_SAMPLES)
    mean_r, mean_s = x.mean(axis=0), y.mean(axis=0)
    x, y = (x - mean_r) / np.sqrt(len(x) - 1), (y - mean_s) / np.sqrt(len(y) - 1)
    if min(len(x), len(y)) > x.shape[1]:
        quick = _of_covariances(mean_r - mean_s, x.T @ x, y.T @ y)
        if quick is not None:
            return quick
    return _of_factors(mean_r - mean_s, _triangle(x), _triangle(y))


def _of_covariances(shift: Array, covariance_r: Array, covariance_s: Array) -> float | None:
    """The distance of covariances of full rank; None where rounding could be felt in it.

    The eigenvalues of S_s S_r are those of the symmetric `L^T S_s L` where `S_r = L L^T`: a
    generalized symmetric problem, a small part of the work of singular values.
    """
    try:
        found = eigvalsh(covariance_s, covariance_r, type=2, driver="gv", check_finite=False)
    except np.linalg.LinAlgError:
        return None
    trace = np.trace(covariance_r) + np.trace(covariance_s)
    return _of_eigenvalues(shift, trace, found)


def _of_eigenvalues(shift: Array, trace: float, found: Array) -> float | None:
    """The distance from the eigenvalues of S_r S_s, ascending; None where rounding could be felt.

    Their rounding, relative to the largest one, weighs the more in a root the smaller that is.
    """
    squared: Array = np.maximum(found, 0)
    distance = float(shift @ shift + trace - 2 * np.sqrt(squared).sum())
    # Independent errors of an ulp of the largest in each eigenvalue change a root by the ulp over
    # that root, at most by the ulp's own root. Measured on spectra from flat to i^-4, errors
    # reach this only where it is above `PRECISION`, and lie far below it elsewhere.
    ulp = np.finfo(np.float64).eps * squared[-1]
    rounding = ulp * np.sqrt(np.sum(1 / np.maximum(squared, ulp)))
    return distance if rounding <= PRECISION * distance else None


def _of_factors(shift: Array, factor_r: Array, factor_s: Array) -> float:
    """The distance of covariances `factor.T @ factor`.

    The eigenvalues of S_r S_s are the squared singular values of `factor_r @ factor_s.T`, so the
    trace of the root is their sum: real and finite whatever the rank. Eigenvalues of the smaller
    square take a third of the time, where their rounding cannot be felt.
    """
    trace = np.sum(factor_r**2) + np.sum(factor_s**2)
    product = factor_r @ factor_s.T
    square = product @ product.T if len(product) <= len(product.T) else product.T @ product
    found: Array = np.asarray(np.linalg.eigvalsh(square), np.float64)
    quick = _of_eigenvalues(shift, trace, found)
    if quick is not None:
        return quick
    root_trace = np.linalg.svd(product, compute_uv=False).sum()
    # Of equal sets the difference is rounding, of either sign.
    return max(0.0, float(shift @ shift + trace - 2 * root_trace))


def _triangle(factor: Array) -> Array:
    """A factor of the same covariance with no more rows than columns."""
    if len(factor) <= factor.shape[1]:
        return factor
    triangle: Array = np.asarray(np.linalg.qr(factor, mode="r"))
    return triangle


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
    real: Features,
    synthetic: Features,
    seed: int,
    *,
    num_sizes: int = 6,
    num_draws: int = 8,
) -> FrechetLimit:
    """FID_inf: a line through FID against 1/N, at N from half of the samples to all of them.

    Chong and Forsyth 2020, section 4. Both sets shrink together, so both biases vanish. At each N
    `num_draws` random subsets are averaged.

    Range and direction: about 0 to infinity, in squared units of the features; lower is better. It
    is an extrapolation: of equal distributions it scatters around 0, below too.

    Args:
        real: features (n, dim).
        synthetic: features (m, dim).
        seed: of the subsets.
        num_sizes: different N at most.
        num_draws: subsets at each N.

    Raises:
        InputError: fewer than three samples on a side, or some are not finite.
    """
    real, synthetic = checked_pair(real, synthetic, "FID_inf", MIN_LIMIT_SAMPLES)
    rng = np.random.default_rng(seed)
    total = min(len(real), len(synthetic))
    sizes = np.unique(np.linspace(max(2, total // 2), total, num_sizes).astype(int))

    def drawn(size: int) -> float:
        x, y = (side[rng.permutation(len(side))[:size]] for side in (real, synthetic))
        return frechet_distance_of(x, y)

    distances = [np.mean([drawn(size) for _ in range(num_draws)]) for size in sizes]
    slope, intercept = np.polyfit(1.0 / sizes, distances, 1)
    return FrechetLimit(float(intercept), float(slope))
