"""Two views of each image, and a degraded one, from which an encoder learns without labels.

Views may differ in nothing that matters for judging a CT: they are windows of one size a batch that
share most of what they show, at the pixels' own size, mirrored left to right or not. Blur, noise
and level are no such differences; they are what the encoder must learn to tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from raysynth.metrics.features import MIN_IMAGE_SIZE

NUM_UNIFORM = 12
"""Random numbers in [0, 1) that the views of a sample take."""

MIN_SHARE = 0.75
"""Of the side of a window, the least that the other one, inside it, has."""

MAX_BLUR_PIXELS, MAX_NOISE, MAX_SHIFT = 2.0, 0.1, 0.1
"""Strongest degradations: of images in [-1, 1], so 0.1 is 70 HU in the window of lungs."""


@dataclass(frozen=True)
class Views:
    """What an encoder is shown of a batch of images.

    Attributes:
        view: windows around nodules or elsewhere, (B, 1, *spatial).
        other: smaller windows inside these.
        degraded: `view`, degraded.
        strengths: of blur, noise and shift, 1 for the strongest, (B, 3).
    """

    view: Tensor
    other: Tensor
    degraded: Tensor
    strengths: Tensor


def draw_views(images: Tensor, box: Tensor, uniform: Tensor, noise: Tensor) -> Views:
    """The views of a batch.

    The first sample's numbers give the sizes, from `MIN_IMAGE_SIZE` pixels to the whole image:
    small ones as often as large ones, for metrics look at crops around nodules, too.

    Args:
        images: in [-1, 1], (B, 1, y, x).
        box: of nodules, (B, 4) as (y0, x0, y1, x1), -1 for none. Half of the windows show theirs.
        uniform: numbers in [0, 1), (B, NUM_UNIFORM).
        noise: standard normal, like `images`.
    """
    size, share, *_ = uniform[0].tolist()
    _, _, choice, mirror, other_mirror, *_ = uniform.unbind(1)
    full = min(images.shape[2:])
    side = round(MIN_IMAGE_SIZE * (full / MIN_IMAGE_SIZE) ** size)
    other_side = max(MIN_IMAGE_SIZE, round(side * (MIN_SHARE + (1 - MIN_SHARE) * share)))
    extent = torch.tensor(images.shape[2:], device=images.device)

    # Uniform over the image or, around a nodule, over the places that show its centre.
    corner = uniform[:, 5:7] * (extent - side + 1)
    centre = (box[:, :2] + box[:, 2:]) / 2
    around = torch.minimum((centre - uniform[:, 5:7] * side).clamp(min=0), extent - side)
    is_around = (box[:, 0] >= 0) & (choice < 0.5)
    corner = torch.where(is_around[:, None], around, corner).long()
    inner = corner + (uniform[:, 7:9] * (side - other_side + 1)).long()

    strengths = torch.cat([(2 * uniform[:, 9:11] - 1).relu(), 2 * uniform[:, 11:12] - 1], dim=1)
    degraded = degrade(images, strengths, noise)
    return Views(
        _mirrored(_windows(images, corner, side), mirror),
        _mirrored(_windows(images, inner, other_side), other_mirror),
        _mirrored(_windows(degraded, corner, side), mirror),
        strengths,
    )


def degrade(images: Tensor, strengths: Tensor, noise: Tensor) -> Tensor:
    """Images blurred, then made noisy, then shifted; values that leave the window are clipped.

    Args:
        images: in [-1, 1], (B, 1, y, x).
        strengths: as in `Views`.
        noise: standard normal, like `images`.
    """
    blur, spread, shift = (
        strengths * strengths.new_tensor([MAX_BLUR_PIXELS, MAX_NOISE, MAX_SHIFT])
    ).unbind(1)
    worse = _blurred(images, blur) + spread.view(-1, 1, 1, 1) * noise + shift.view(-1, 1, 1, 1)
    return worse.clamp(-1, 1)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image convolved with a Gaussian of its own sigma in pixels, (B,); 0 leaves it alone."""
    radius = 3 * int(MAX_BLUR_PIXELS)
    offset = torch.arange(-radius, radius + 1, device=images.device)
    weights = (-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]).square()).exp()
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, None]  # (B, 1, taps)
    x = functional.pad(images.transpose(0, 1), (radius,) * 4, mode="replicate")  # (1, B, y, x)
    x = functional.conv2d(x, weights[..., None], groups=len(images))
    return functional.conv2d(x, weights[:, :, None], groups=len(images)).transpose(0, 1)


def _windows(images: Tensor, corner: Tensor, side: int) -> Tensor:
    """Squares of `side` pixels from corners (B, 2) on, (B, 1, side, side)."""
    along = torch.arange(side, device=images.device)
    y, x = (corner[:, axis, None] + along for axis in (0, 1))
    row = torch.arange(len(images), device=images.device)[:, None, None]
    return images[row, 0, y[:, :, None], x[:, None, :]][:, None]


def _mirrored(images: Tensor, choice: Tensor) -> Tensor:
    """Half of the images left to right: lungs upside down are none."""
    return torch.where(choice.view(-1, 1, 1, 1) < 0.5, images.flip(3), images)
