from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raysynth.case import CONDITION_COLUMNS
from raysynth.config import InpaintingConfig, LatentDiffusionConfig, SemanticDiffusionConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.denoiser import build_denoiser
from raysynth.models.space import LatentSpace, PixelSpace
from raysynth.training.objectives import DiffusionObjective, condition_of, draw, with_holes
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
def diffusion() -> DiffusionObjective:
    config = LatentDiffusionConfig.model_validate(DIFFUSION | {"condition_drop": 0.5})
    torch.manual_seed(0)
    denoiser = build_denoiser(config, 2, 8)
    for parameter in denoiser.parameters():  # the last layers start at zero: nothing would show
        torch.nn.init.normal_(parameter, std=0.05)
    space = LatentSpace(build_autoencoder(MODEL).eval(), 0.7)
    return DiffusionObjective(denoiser, space, config=config, seed=3)


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
def test_a_batch_has_the_mean_loss_of_its_parts(kind: str, diffusion: DiffusionObjective) -> None:
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
    diffusion: DiffusionObjective,
) -> None:
    diffusion.loss(diffusion.module, diffusion_batch(8), CPU)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in diffusion.module.parameters())
    assert isinstance(diffusion.space, LatentSpace)
    assert all(p.grad is None for p in diffusion.space.autoencoder.parameters())


def test_pictures_are_pictures(diffusion: DiffusionObjective) -> None:
    with torch.no_grad():
        pictures = [
            diffusion.preview(diffusion.module, diffusion_batch(6), CPU),
            tiny_objective().preview(tiny_objective().module, next(ArrayStream(6).batches()), CPU),
        ]
    for picture in pictures:
        assert picture.shape == (1, 2 * 16, 4 * 16)
        assert 0 <= picture.min() < picture.max() <= 1


def test_pixels_are_denoised_in_their_window() -> None:
    config = SemanticDiffusionConfig.model_validate(
        {name: value for name, value in DIFFUSION.items() if name != "autoencoder"}
        | {"family": "semantic_diffusion", "layout_channels": 8, "window_hu": (-1000, 400)}
    )
    objective = DiffusionObjective(
        build_denoiser(config, 1, 16), PixelSpace((-1000, 400)), config=config, seed=3
    )
    batch = diffusion_batch(6)
    batch["hu"] = np.random.default_rng(1).integers(-1100, 500, (6, 16, 16)).astype(np.int16)
    assert objective.columns == ("hu", "layout", "box", "ratings")
    with torch.no_grad():
        # A fresh network predicts nothing: its loss is the variance of the noise.
        assert 0.8 < objective.loss(objective.module, batch, CPU)["loss"] < 1.2
        picture = objective.preview(objective.module, batch, CPU)
    shown = picture[0, :16, :16]
    expected = (batch["hu"][0].clip(-1000, 400) + 1000) / 1400
    np.testing.assert_allclose(shown.numpy(), expected, atol=1e-6)


def test_holes_follow_the_position_and_count_more() -> None:
    config = InpaintingConfig.model_validate(
        {name: value for name, value in DIFFUSION.items() if name != "autoencoder"}
        | {"family": "inpainting", "organs": ("lung",), "outside_weight": 0.25}
    )
    objective = DiffusionObjective(
        build_denoiser(config, 1, 16), PixelSpace(config.window_hu), config=config, seed=3
    )
    batch = diffusion_batch(6)
    batch["hu"] = np.full((6, 16, 16), 40, np.int16)
    reader = np.zeros(6, np.float32)
    condition = with_holes(condition_of(batch, reader), batch, config, 3)
    few = {name: rows[2:4] for name, rows in batch.items()}
    again = with_holes(condition_of(few, reader[2:4]), few, config, 3)
    assert condition.known_mask is not None
    assert again.known_mask is not None
    assert torch.equal(again.known_mask, condition.known_mask[2:4])
    assert 0 < condition.known_mask.float().mean() < 1
    weight = objective._weight(condition)
    assert weight is not None
    assert weight[:, 0][condition.known_mask].unique().tolist() == [0.25]
    assert weight[:, 0][~condition.known_mask].unique().tolist() == [1.0]
    # A dropped condition leaves nothing known: then every pixel counts the same.
    assert (objective._weight(condition.null()) == 1).all()
    with torch.no_grad():
        assert 0.8 < objective.loss(objective.module, batch, CPU)["loss"] < 1.2


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
