"""The terms of VICReg against closed forms."""

from __future__ import annotations

import pytest
import torch

from raysynth.models.vicreg import EPSILON, covariance, invariance, variance


def test_only_views_that_differ_cost() -> None:
    z = torch.randn(8, 5)
    assert invariance(z, z) == 0
    assert invariance(z, z + 2) == pytest.approx(4, rel=1e-5)


def test_spread_costs_nothing_from_one_on() -> None:
    around = torch.tensor([[-1.0, -3.0], [1.0, 3.0]]) / 2**0.5  # standard deviations 1 and 3
    assert variance(around) == 0
    halved = variance(around / 2)  # 0.5 and 1.5
    assert halved == pytest.approx((1 - (0.25 + EPSILON) ** 0.5) / 2, rel=1e-5)
    assert variance(torch.ones(6, 4)) == pytest.approx(1 - EPSILON**0.5, rel=1e-5)


def test_a_collapse_has_a_finite_gradient() -> None:
    z = torch.ones(6, 4, requires_grad=True)
    variance(z).backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_covariances_cost_off_the_diagonal_alone() -> None:
    x = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    y = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert covariance(torch.stack([5 * x, 3 * y], dim=1) + 7) == pytest.approx(0, abs=1e-10)
    # The covariance of x with x is 4 / 3; it stands twice beside the diagonal, of 2 dimensions.
    assert covariance(torch.stack([x, x], dim=1)) == pytest.approx((4 / 3) ** 2, rel=1e-5)
    z = torch.randn(9, 6)
    matrix = torch.cov(z.T)
    expected = (matrix - matrix.diagonal().diag()).square().sum() / 6
    assert covariance(z) == pytest.approx(float(expected), rel=1e-4)
