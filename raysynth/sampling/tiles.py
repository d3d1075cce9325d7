"""Volumes larger than a network was trained on: it looks at overlapping tiles at every step.

What the tiles predict is blended before the sampler's update (Bar-Tal et al. 2023, MultiDiffusion),
so that all tiles are of one volume at every noise level: nothing is stitched afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from raysynth.models.conditioner import ConditionBatch, EncodedCondition
from raysynth.models.denoiser import Denoiser

OVERLAP = 4
"""Neighbouring tiles share at least a quarter of a tile."""


class TiledDenoiser(Denoiser):
    """A denoiser of larger samples; each tile is encoded as a sample of its own."""

    weight: Tensor
    tent: Tensor

    def __init__(
        self, denoiser: Denoiser, tile_size: int, tile_cells: int, shape: tuple[int, ...]
    ) -> None:
        """Wraps a denoiser.

        Args:
            denoiser: that is told of layouts.
            tile_size: pixels along a side of what it was trained on.
            tile_cells: cells along the side of its latents; of pixels as many.
            shape: cells of the whole sample along each axis.
        """
        super().__init__()
        self.denoiser = denoiser
        self.factor, self.cells = tile_size // tile_cells, tile_cells
        self.windows = list(_windows(shape, tile_cells))
        weight = torch.zeros(shape)
        for window in self.windows:
            weight[window] += _tent(tile_cells, len(shape))
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("tent", _tent(tile_cells, len(shape)), persistent=False)

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """The channels of all tiles, one tile after the other; the context is of the sample."""
        encoded = []
        for window in self.windows:
            pixels = tuple(
                slice(part.start * self.factor, part.stop * self.factor) for part in window
            )
            layout = condition.layout[:, *pixels]
            tile = replace(condition, layout=layout, known_hu=None, known_mask=None)
            encoded.append(self.denoiser.encode(tile))
        channels = torch.cat([one.channels for one in encoded], dim=1)
        return EncodedCondition(channels, encoded[0].context)

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The tiles' predictions, blended."""
        total = torch.zeros_like(x_t)
        channels = encoded.channels.chunk(len(self.windows), dim=1)
        for window, of_tile in zip(self.windows, channels, strict=True):
            place = (slice(None), slice(None), *window)
            condition = EncodedCondition(of_tile, encoded.context)
            total[place] += self.tent * self.denoiser.predict(x_t[place], timestep, condition)
        return total / self.weight


def _windows(shape: tuple[int, ...], tile: int) -> Iterator[tuple[slice, ...]]:
    """Tiles that cover a sample; the last along an axis is moved inwards."""
    starts = []
    for size in shape:
        count = -(-(size - tile) // (tile - tile // OVERLAP)) + 1
        starts.append(torch.linspace(0, size - tile, count).round().int().tolist())
    for corner in product(*starts):
        yield tuple(slice(start, start + tile) for start in corner)


def _tent(size: int, axes: int) -> Tensor:
    """Weights that rise from a tile's border to its middle, never 0, (size, ...)."""
    ramp = torch.minimum(torch.arange(1.0, size + 1), torch.arange(float(size), 0, -1))
    tent = torch.ones(())
    for _ in range(axes):
        tent = tent[..., None] * ramp
    return tent / tent.max()
