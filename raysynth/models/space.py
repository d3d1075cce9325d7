"""Where a diffusion model works: on the pixels themselves, or on an autoencoder's latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from raysynth.config.model import Window
from raysynth.models.autoencoder import Autoencoder
from raysynth.models.conditioner import ConditionBatch, split_known
from raysynth.window import normalize


class Space(Protocol):
    """Turns what a store holds into what a network denoises, and that into images.

    Attributes:
        column: of a sample set or its latents, that `x_0` reads.
    """

    column: ClassVar[str]

    def x_0(self, stored: Tensor) -> Tensor:
        """What the network denoises, (B, c, *latent), of stored values."""

    def images(self, x_0: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 1, *spatial), of what the network draws."""

    def known(self, condition: ConditionBatch, feather_px: int) -> tuple[Tensor, Tensor]:
        """What is kept of conditions that know a part of their image, and how much of it.

        Args:
            condition: with `known_hu` and `known_mask`.
            feather_px: over how many pixels inside a hole its border fades.

        Returns:
            Clean values (B, c, *latent), and their weights (B, 1, *latent): 1 where all of a cell
            is known, falling to 0 inside the hole.
        """


@dataclass(frozen=True)
class PixelSpace:
    """Images in their window, -1 to 1."""

    column: ClassVar[str] = "hu"
    window_hu: Window

    def x_0(self, stored: Tensor) -> Tensor:
        """Of HU (B, *spatial)."""
        return normalize(stored[:, None], self.window_hu)

    def images(self, x_0: Tensor) -> Tensor:
        """They are images."""
        return x_0

    def known(self, condition: ConditionBatch, feather_px: int) -> tuple[Tensor, Tensor]:
        """Pixels; where weights fade, the patient's own from inside the hole take part, too."""
        _, keep = split_known(condition, self.window_hu)
        assert condition.known_hu is not None
        image = normalize(condition.known_hu[:, None], self.window_hu)
        return image, feathered(keep, feather_px)


@dataclass(frozen=True)
class LatentSpace:
    """Latents of an autoencoder times `latent_scale`, which makes their standard deviation 1."""

    column: ClassVar[str] = "latents"
    autoencoder: Autoencoder
    latent_scale: float
    window_hu: Window

    def x_0(self, stored: Tensor) -> Tensor:
        """Of latents (B, c, *latent) in half precision."""
        return stored.float() * self.latent_scale

    def images(self, x_0: Tensor) -> Tensor:
        """Decoded, where the latents are."""
        return self.autoencoder.to(x_0.device).decode(x_0 / self.latent_scale)

    def known(self, condition: ConditionBatch, feather_px: int) -> tuple[Tensor, Tensor]:
        """Latents of the image with its hole full of air: what was there reaches nothing."""
        image, keep = split_known(condition, self.window_hu)
        encoder = self.autoencoder.to(image.device)
        latents = encoder.encode(image * keep + keep - 1) * self.latent_scale
        factor = keep.shape[-1] // latents.shape[-1]
        pool = functional.max_pool3d if keep.ndim == 5 else functional.max_pool2d
        whole = 1 - pool(1 - keep, factor)  # of a cell that is kept, every pixel is known
        return latents, feathered(whole, math.ceil(feather_px / factor))


def feathered(keep: Tensor, width: int) -> Tensor:
    """Weights that fall from 1 outside holes to 0 at a depth of more than `width` cells inside.

    Depth counts steps to any neighbour, diagonal ones too. Outside, weights stay exactly 1.

    Args:
        keep: 1 outside, 0 inside holes, (B, 1, *spatial).
        width: 0: the border is sharp.
    """
    pool = functional.max_pool3d if keep.ndim == 5 else functional.max_pool2d
    total, grown = keep, keep
    for _ in range(width):
        grown = pool(grown, 3, stride=1, padding=1)
        total = total + grown
    return torch.where(keep == 1, keep, total / (width + 1))
