"""Where a diffusion model works: on the pixels themselves, or on an autoencoder's latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from raysynth.config.model import Window
from raysynth.models.autoencoder import Autoencoder
from raysynth.window import normalize


class Space(Protocol):
    """Turns what a store holds into what a network denoises, and that into images.

    Attributes:
        column: of a sample set or its latents, that `x_0` reads.
    """

    column: ClassVar[str]

    def x_0(self, stored: Tensor) -> Tensor:
        """What the network denoises, (B, c, h, w), of stored values."""

    def images(self, x_0: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 1, y, x), of what the network draws."""


@dataclass(frozen=True)
class PixelSpace:
    """Images in their window, -1 to 1."""

    column: ClassVar[str] = "hu"
    window_hu: Window

    def x_0(self, stored: Tensor) -> Tensor:
        """Of HU (B, y, x)."""
        return normalize(stored[:, None], self.window_hu)

    def images(self, x_0: Tensor) -> Tensor:
        """They are images."""
        return x_0


@dataclass(frozen=True)
class LatentSpace:
    """Latents of an autoencoder times `latent_scale`, which makes their standard deviation 1."""

    column: ClassVar[str] = "latents"
    autoencoder: Autoencoder
    latent_scale: float

    def x_0(self, stored: Tensor) -> Tensor:
        """Of latents (B, c, h, w) in half precision."""
        return stored.float() * self.latent_scale

    def images(self, x_0: Tensor) -> Tensor:
        """Decoded, where the latents are."""
        return self.autoencoder.to(x_0.device).decode(x_0 / self.latent_scale)
