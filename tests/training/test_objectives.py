from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raysynth.case import CONDITION_COLUMNS
from raysynth.config import LatentDiffusionConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.denoiser import build_denoiser
from raysynth.training.objectives import LatentDiffusionObjective, condition_of, draw
from tests.training.conftest import DIFFUSION
from tests.training.tiny import MODEL, ArrayStream, tiny_objective

CPU = torch.device("cpu")


def diffusion_batch(count: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return {
        "position": np.arange(100, 100 + count),
        "latents": random.normal(size=(count, 2, 8, 8)).astype(np.float16),
        "layout": random.integers(0, 6, (count, 16, 16)).astype(np.uint8),
        "box": np.tile(np.array([2, 3, 8, 9], np.int16), (count, 1)),
        "ratings": random.integers(1, 6, (count, 4, 9)).astype(np.uint8),
    }


@pytest.fixture(scope="module")
def diffusion() -> LatentDiffusionObjective:
    config = LatentDiffusionConfig.model_validate(DIFFUSION | {"condition_drop": 0.5})
    torch.manual_seed(0)
    denoiser = build_denoiser(config, 2, 8)
    for parameter in denoiser.parameters():  # the last layers start at zero: nothing would show
        torch.nn.init.normal_(parameter, std=0.05)
    return LatentDiffusionObjective(denoiser, build_autoencoder(MODEL), 0.7, config=config, seed=3)


def test_draws_belong_to_the_position_alone() -> None:
    positions = np.array([5, 0, 10**12])
    together = draw(1, positions, 2, (2, 8, 8))
    for row, position in enumerate(positions):
        alone = draw(1, np.array([position]), 2, (2, 8, 8))
        assert torch.equal(alone.uniform[0], together.uniform[row])
        assert torch.equal(alone.noise[0], together.noise[row])
    assert not torch.equal(draw(2, positions, 2, (2, 8, 8)).noise, together.noise)
    many = draw(0, np.arange(4000), 1, (16,))
    assert abs(many.uniform.mean() - 0.5) < 0.02
    assert abs(many.noise.std() - 1) < 0.01


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_a_batch_has_the_mean_loss_of_its_parts(
    kind: str, diffusion: LatentDiffusionObjective
) -> None:
    objective: Any = diffusion if kind == "diffusion" else tiny_objective()
    batch = diffusion_batch(8) if kind == "diffusion" else next(ArrayStream(8).batches(3))
    with torch.no_grad():
        whole = objective.loss(objective.module, batch, CPU)["loss"]
        parts = [
            objective.loss(objective.module, {k: v[i::4] for k, v in batch.items()}, CPU)["loss"]
            for i in range(4)
        ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_gradients_reach_the_denoiser_and_never_the_autoencoder(
    diffusion: LatentDiffusionObjective,
) -> None:
    diffusion.loss(diffusion.module, diffusion_batch(8), CPU)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in diffusion.module.parameters())
    assert all(p.grad is None for p in diffusion.autoencoder.parameters())


def test_pictures_are_pictures(diffusion: LatentDiffusionObjective) -> None:
    with torch.no_grad():
        pictures = [
            diffusion.preview(diffusion.module, diffusion_batch(6), CPU),
            tiny_objective().preview(tiny_objective().module, next(ArrayStream(6).batches()), CPU),
        ]
    for picture in pictures:
        assert picture.shape == (1, 2 * 16, 4 * 16)
        assert 0 <= picture.min() < picture.max() <= 1


def test_one_reader_who_is_there_gives_all_scores() -> None:
    count = 3000
    batch = diffusion_batch(count)
    batch["ratings"][:, 1] = 0  # this reader did not mark the nodules
    batch["ratings"][-1] = 0  # and this sample shows none
    reader = np.random.default_rng(1).random(count).astype(np.float32)
    chosen = condition_of(batch, reader).attributes.numpy()
    assert not chosen[-1].any()
    rows = batch["ratings"][:-1][:, :, CONDITION_COLUMNS]
    matches = (rows == chosen[:-1, None]).all(axis=2)
    assert matches.any(axis=1).all()
    assert not matches[:, 1].any()
    only = matches.sum(axis=1) == 1
    shares = matches[only].mean(axis=0)
    np.testing.assert_allclose(shares, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.04)
