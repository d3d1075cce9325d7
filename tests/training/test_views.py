"""What an encoder is shown: windows of the same place, and degradations of known strength."""

from __future__ import annotations

import pytest
import torch

from raysynth.training.views import (
    MAX_BLUR_PIXELS,
    MAX_NOISE,
    MAX_SHIFT,
    MIN_SHARE,
    NUM_UNIFORM,
    degrade,
    draw_views,
)

COUNT, SIZE = 200, 40
NOWHERE = torch.full((COUNT, 4), -1)


def _images() -> torch.Tensor:
    """Every pixel says where it is: y + x / 64, in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return ((y + x / 64) / SIZE * 2 - 1).expand(COUNT, 1, SIZE, SIZE)


def _place(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest y and x of windows of `_images`."""
    said = (windows.amin(dim=(1, 2, 3)) + 1) / 2 * SIZE
    y = said.add(1e-3).floor()
    return y, (said - y) * 64


def _uniform(seed: int = 0) -> torch.Tensor:
    return torch.rand(COUNT, NUM_UNIFORM, generator=torch.Generator().manual_seed(seed))


def test_the_other_view_lies_inside_the_first() -> None:
    images, noise = _images(), torch.zeros(COUNT, 1, SIZE, SIZE)
    sides = set()
    for seed in range(20):
        views = draw_views(images, NOWHERE, _uniform(seed), noise)
        side, other = views.view.shape[-1], views.other.shape[-1]
        assert 16 <= other <= side <= SIZE
        assert other >= MIN_SHARE * side - 1
        for outer, inner in zip(_place(views.view), _place(views.other), strict=True):
            assert (inner >= outer - 0.1).all()
            assert (inner + other <= outer + side + 0.1).all()
        sides.add(side)
    assert min(sides) < 20
    assert max(sides) > 34


def test_half_of_the_windows_are_mirrored_and_none_stands_on_its_head() -> None:
    views = draw_views(_images(), NOWHERE, _uniform(), torch.zeros(COUNT, 1, SIZE, SIZE))
    mirrored = views.view[:, 0, 0, 0] > views.view[:, 0, 0, -1]
    assert 0.4 < mirrored.float().mean() < 0.6
    assert (views.view[:, 0, 0] < views.view[:, 0, -1]).all()


def test_half_of_the_windows_show_the_nodule() -> None:
    box = torch.tensor([33, 1, 37, 5]).expand(COUNT, 4)
    uniform = _uniform()
    uniform[0, 0] = 0.1
    views = draw_views(_images(), box, uniform, torch.zeros(COUNT, 1, SIZE, SIZE))
    side = views.view.shape[-1]
    y, x = _place(views.view)
    shows = (y <= 35) & (y + side >= 35) & (x <= 3.1) & (x + side >= 3)
    assert shows[uniform[:, 2] < 0.5].all()
    assert 0.5 < shows.float().mean() < 0.7


def test_strengths_of_nothing_change_nothing() -> None:
    images = torch.rand(3, 1, 20, 20) - 0.5
    same = degrade(images, torch.zeros(3, 3), torch.randn(3, 1, 20, 20))
    torch.testing.assert_close(same, images)


def test_strengths_are_what_they_say() -> None:
    flat = torch.zeros(3, 1, 128, 128)
    flat[0, 0, 64, 64] = 1.0
    noise = torch.randn(3, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    blurred, noisy, shifted = degrade(flat, torch.diag(torch.tensor([0.5, 0.7, -0.6])), noise)
    sigma = 0.5 * MAX_BLUR_PIXELS
    assert blurred.sum() == pytest.approx(1, rel=1e-4)
    assert blurred.max() == pytest.approx(1 / (2 * torch.pi * sigma**2), rel=0.01)
    assert noisy.std() == pytest.approx(0.7 * MAX_NOISE, rel=0.02)
    torch.testing.assert_close(shifted, torch.full_like(shifted, -0.6 * MAX_SHIFT))


def test_views_belong_to_the_numbers_alone() -> None:
    images, noise = torch.rand(COUNT, 1, SIZE, SIZE) * 2 - 1, torch.randn(COUNT, 1, SIZE, SIZE)
    uniform = _uniform()
    views = draw_views(images, NOWHERE, uniform, noise)
    rows = slice(0, 50)  # the sizes are those of the first sample
    few = draw_views(images[rows], NOWHERE[rows], uniform[rows], noise[rows])
    assert torch.equal(few.view, views.view[rows])
    assert torch.equal(few.other, views.other[rows])
    torch.testing.assert_close(few.degraded, views.degraded[rows])
    assert views.degraded.abs().max() <= 1
    assert (views.strengths[:, :2] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
