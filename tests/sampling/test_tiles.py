"""Tiles of a volume are one volume."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.models.conditioner import (
    ConditionBatch,
    EncodedCondition,
    collate,
    layout_channels,
)
from raysynth.models.denoiser import Denoiser
from raysynth.sampling.tiles import TiledDenoiser


class Pointwise(Denoiser):
    """Predicts from each cell alone: tiles can make no difference."""

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        cells = condition.layout.shape[-1] // 2
        return EncodedCondition(layout_channels(condition.layout, ("lung", "nodule"), cells))

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        lung, nodule = encoded.channels.split(1, dim=1)
        return x_t * 0.5 + lung - 3 * nodule + timestep.view(-1, 1, 1, 1, 1)


def test_tiles_of_a_pointwise_network_equal_the_whole() -> None:
    rng = np.random.default_rng(0)
    layout = rng.choice([1, 2, 4, 5], (2, 20, 20, 20)).astype(np.uint8)
    condition = collate([Condition(one) for one in layout], 20, 3)
    whole, tiled = Pointwise(), TiledDenoiser(Pointwise(), 8, 4, (10, 10, 10))
    x_t = torch.randn(2, 1, 10, 10, 10, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([3, 700])
    torch.testing.assert_close(tiled(x_t, timestep, condition), whole(x_t, timestep, condition))


def test_tiles_cover_everything_and_reach_nowhere_else() -> None:
    for size, tile in ((16, 16), (17, 16), (40, 16), (128, 64)):
        denoiser = TiledDenoiser(Pointwise(), tile * 2, tile, (size, tile, size))
        count = torch.zeros(size, tile, size)
        for window in denoiser.windows:
            assert all(part.stop - part.start == tile for part in window)
            count[window] += 1
        assert count.min() >= 1
        if size > tile:
            steps = {window[0].start for window in denoiser.windows}
            assert max(np.diff(sorted(steps))) <= tile - tile // 4 + 1


class Averaging(Denoiser):
    """Subtracts the mean of what it sees, as a network with normalisations does."""

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        return EncodedCondition(layout_channels(condition.layout, ("lung",), 8))

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        return x_t - x_t.mean(dim=(2, 3, 4), keepdim=True)


def test_where_tiles_differ_their_blend_has_no_step() -> None:
    """Means of tiles differ by 1.5, and neighbours in the blend by no more than their share."""
    condition = collate([Condition(np.full((16,) * 3, Label.LEFT_LUNG, np.uint8))], 16, 3)
    tiled = TiledDenoiser(Averaging(), 8, 8, (16, 16, 16))
    ramp = torch.linspace(0, 3, 16).view(1, 1, 16, 1, 1).expand(1, 1, 16, 16, 16)
    blended = (ramp - tiled(ramp, torch.zeros(1), condition))[0, 0, :, 0, 0]
    assert blended[-1] - blended[0] > 1
    assert blended.diff().abs().max() < 0.45
    assert blended.diff().min() > -1e-5
