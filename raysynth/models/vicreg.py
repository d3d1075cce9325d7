"""VICReg: what the embeddings of two views of an image minimise (Bardes, Ponce and LeCun 2022).

It needs neither labels nor pairs of different images, and so no large batch. A covariance is that
of one forward pass: micro batches and workers each have their own.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

EPSILON = 1e-4
"""In the root of a variance, as published: its gradient stays finite at 0."""


def invariance(z: Tensor, z_prime: Tensor) -> Tensor:
    """Mean squared difference of embeddings (n, d) of two views, eq. 5.

    The mean over dimensions too, as in the authors' code, to which the published weights belong.
    """
    return functional.mse_loss(z, z_prime)


def variance(z: Tensor) -> Tensor:
    """How far the standard deviations of embeddings (n, d) lie below 1, eqs. 1 and 2."""
    deviation = (z.var(dim=0) + EPSILON).sqrt()
    return functional.relu(1 - deviation).mean()


def covariance(z: Tensor) -> Tensor:
    """Squared covariances of different dimensions of embeddings (n, d), summed, over d, eq. 4."""
    centred = z - z.mean(dim=0)
    squares = (centred.T @ centred / (len(z) - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / z.shape[1]
