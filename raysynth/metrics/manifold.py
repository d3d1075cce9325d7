"""Fidelity and diversity apart: precision, recall, density and coverage of two sets of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.metrics.samples import Features, checked_pair

Array = NDArray[np.float64]

NUM_NEIGHBOURS = 5
"""k: balls reach to the 5th neighbour, as Naeem et al. 2020 chose."""

BLOCK_BYTES = 2**26
"""Of the distances held at once."""

ROUNDING = 1e-12
"""Relative to the squares it is the difference of, what a squared distance may be off."""


@dataclass(frozen=True)
class ManifoldOverlap:
    """How two sets of features lie in each other; range and direction stand at each.

    Attributes:
        precision: share of synthetic samples inside any real ball, 0 to 1. Higher is better: more
            of them look real. One real outlier with a large ball can raise it.
        recall: share of real samples inside any synthetic ball, 0 to 1. Higher is better: more of
            what is real can be drawn.
        density: mean number of real balls around a synthetic sample, divided by k, 0 to N / k.
            About 1 for samples of the real distribution, below for worse ones; far above 1 they
            crowd where real samples are dense, which is no better.
        coverage: share of real balls that hold a synthetic sample, 0 to 1. Higher is better;
            samples of the real distribution reach 1 - 2^-k, 0.97 for k = 5, where both sets are
            equally large.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_overlap(
    real: Features, synthetic: Features, num_neighbours: int = NUM_NEIGHBOURS
) -> ManifoldOverlap:
    """Precision and recall, and density and coverage, of synthetic features against real ones.

    Precision and recall: Kynkäänniemi et al. 2019, eq. 1 and 2; density and coverage: Naeem et al.
    2020, section 3. A ball around a sample reaches to the k-th other sample of its own set, its
    border included. Duplicates within a set shrink balls, so draw without replacement.

    Range and direction: see `ManifoldOverlap`; for precision, recall and coverage higher is better.
    All four depend on N: compare at equal N alone, beside what two real sets reach.

    Args:
        real: features (n, dim).
        synthetic: features (m, dim).
        num_neighbours: k.

    Raises:
        InputError: a side has no more than k samples, or features that are not finite.
    """
    x, y = checked_pair(real, synthetic, "precision and recall", num_neighbours + 1)
    # Near the origin less is lost in the difference of squares.
    centre = x.mean(axis=0)
    x, y = x - centre, y - centre
    radii_x, radii_y = _squared_radii(x, num_neighbours), _squared_radii(y, num_neighbours)
    inclusions = precise = 0
    covered, recalled = np.zeros(len(x), np.bool_), np.zeros(len(x), np.bool_)
    for rows, squared, slack in _squared_distances(y, x):
        in_real_ball = squared <= radii_x + slack  # (b, n)
        inclusions += int(in_real_ball.sum())
        precise += int(in_real_ball.any(axis=1).sum())
        covered |= in_real_ball.any(axis=0)
        recalled |= (squared <= radii_y[rows, None] + slack).any(axis=0)
    return ManifoldOverlap(
        precision=precise / len(y),
        recall=float(recalled.mean()),
        density=inclusions / (num_neighbours * len(y)),
        coverage=float(covered.mean()),
    )


def _squared_radii(x: Array, num_neighbours: int) -> Array:
    """Squared distance of each sample to its k-th other one in the same set (n,)."""
    radii = np.empty(len(x))
    for rows, squared, _ in _squared_distances(x, x):
        block = np.arange(len(squared))
        squared[block, block + rows.start] = np.inf  # nobody is their own neighbour
        radii[rows] = np.partition(squared, num_neighbours - 1, axis=1)[:, num_neighbours - 1]
    return radii


def _squared_distances(one: Array, other: Array) -> Iterator[tuple[slice, Array, Array]]:
    """Blocks of rows of `one`: which, their squared distances to `other`, and the rounding."""
    height = max(1, BLOCK_BYTES // (8 * len(other)))
    norms = np.einsum("ij,ij->i", other, other)
    for start in range(0, len(one), height):
        block = one[start : start + height]
        squares = np.einsum("ij,ij->i", block, block)[:, None] + norms  # (b, n)
        squared = np.maximum(squares - 2 * (block @ other.T), 0)
        yield slice(start, start + len(block)), squared, ROUNDING * squares
