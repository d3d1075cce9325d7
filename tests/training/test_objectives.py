from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raysynth.case import ATTRIBUTES, CONDITION_COLUMNS, Label
from raysynth.config import (
    ExtractorConfig,
    InpaintingConfig,
    LatentDiffusionConfig,
    SemanticDiffusionConfig,
)
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.denoiser import build_denoiser
from raysynth.models.encoder import SelfTaughtEncoder
from raysynth.models.space import LatentSpace, PixelSpace
from raysynth.prompt import NO_NODULE, WORDS
from raysynth.training.objectives import (
    DiffusionObjective,
    SelfTaughtObjective,
    condition_of,
    draw,
    prompts_of,
    with_holes,
)
from tests.training.conftest import DIFFUSION, EXTRACTOR
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
    space = LatentSpace(build_autoencoder(MODEL).eval(), 0.7, (-1000, 400))
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


@pytest.mark.parametrize(
    ("change", "ratio"),
    [
        # A fresh network predicts zero, so its loss is that of the target: noise, or noise - x_0.
        ({"loss": "l1"}, (2 / np.pi) ** 0.5),
        ({"snr_gamma": 1e9}, 1.0),
        ({"snr_gamma": 5.0}, None),
        ({"schedule": "rectified_flow", "prediction_type": "flow"}, 1.0),
    ],
)
def test_the_configured_loss_is_minimised(change: dict[str, Any], ratio: float | None) -> None:
    config = LatentDiffusionConfig.model_validate(DIFFUSION | change)
    space = LatentSpace(build_autoencoder(MODEL).eval(), 0.7, (-1000, 400))
    objective = DiffusionObjective(build_denoiser(config, 2, 8), space, config=config, seed=3)
    batch = diffusion_batch(64)
    if config.prediction_type == "flow":
        batch["latents"] = np.zeros_like(batch["latents"])
    with torch.no_grad():
        loss = objective.loss(objective.module, batch, CPU)["loss"]
    if ratio is None:  # the mean weight of the timesteps that are drawn
        uniform = draw(3, batch["position"], 3, (2, 8, 8)).uniform
        timestep = (uniform[:, 2] * config.num_train_timesteps).long()
        snr = (objective.schedule.alphas / objective.schedule.sigmas).square()[timestep]
        ratio = (snr.clamp(max=5) / snr).mean().item()
        assert ratio < 0.9
    assert loss.item() == pytest.approx(ratio, rel=0.05)


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


def _self_taught() -> SelfTaughtObjective:
    torch.manual_seed(0)
    network = SelfTaughtEncoder(ExtractorConfig.model_validate(EXTRACTOR))
    return SelfTaughtObjective(network, (-1000.0, 400.0), seed=3)


def _slices_to_learn(count: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Waves of another direction, length and level each, no two alike."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    ky, kx, phase = random.normal(size=(3, count, 1, 1)) * [[[[0.5]]], [[[0.5]]], [[[3.0]]]]
    level = random.uniform(-600, 0, (count, 1, 1))
    hu = level + 300 * np.sin(ky * y + kx * x + phase)
    box = np.tile(np.array([12, 12, 20, 20], np.int16), (count, 1))
    return {"position": np.arange(count), "hu": hu.astype(np.int16), "box": box}


def test_self_taught_features_are_learned() -> None:
    objective = _self_taught()
    optimizer = torch.optim.Adam(objective.module.parameters(), 3e-3)
    losses, degradation = [], []
    for step in range(60):
        batch = _slices_to_learn(16, seed=step % 4)
        batch["position"] += 16 * step
        terms = objective.loss(objective.module, batch, CPU)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(terms["loss"].detach()))
        degradation.append(float(terms["degradation"].detach()))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert np.mean(degradation[-10:]) < 0.8 * np.mean(degradation[:10])


def test_a_self_taught_loss_follows_the_positions() -> None:
    objective, batch = _self_taught(), _slices_to_learn(8)
    first, again = (objective.loss(objective.module, batch, CPU)["loss"] for _ in range(2))
    assert torch.equal(first, again)
    batch["position"] = batch["position"] + 100
    assert not torch.equal(objective.loss(objective.module, batch, CPU)["loss"], first)


def test_the_picture_of_an_encoder_shows_the_nearest_slices() -> None:
    objective, batch = _self_taught(), _slices_to_learn(6)
    batch["hu"][4] = batch["hu"][0]  # twins are nearest to each other
    objective.module.eval()
    with torch.no_grad():
        picture = objective.preview(objective.module, batch, CPU)
    assert picture.shape == (1, 2 * 32, 4 * 32)
    assert torch.equal(picture[:, :32, :32], picture[:, 32:, :32])
    assert not torch.equal(picture[:, :32, 32:64], picture[:, 32:, 32:64])


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


def test_prompts_say_what_one_reader_saw_in_words_of_the_position() -> None:
    batch = diffusion_batch(400)
    batch["diameter_mm"] = np.full(400, 12.4, np.float32)
    batch["box"][:100] = -1
    batch["layout"][:] = Label.LEFT_LUNG
    # The second reader is the only one, and all texture that is said is theirs.
    batch["ratings"][:, (0, 2, 3)] = 0
    readers = np.random.default_rng(2).uniform(size=400).astype(np.float32)
    prompts = prompts_of(batch, readers, seed=3)
    assert set(prompts[:100]) == {NO_NODULE}
    for row, prompt in enumerate(prompts[100:], 100):
        scores = batch["ratings"][row, 1]
        for name in ("margin", "lobulation", "spiculation", "sphericity"):
            said = [
                level
                for level, synonyms in enumerate(WORDS[name], 1)
                if any(words in prompt.split(", ") for words in synonyms)
            ]
            assert said in ([], [scores[ATTRIBUTES.index(name)]])
    for clause in ("12 mm", "left lung"):
        assert 0.75 < np.mean([clause in prompt for prompt in prompts[100:]]) < 0.95
    # The words follow from the position: not from the mates, and anew at another.
    part = {name: values[200:210] for name, values in batch.items()}
    assert prompts_of(part, readers[200:210], seed=3) == prompts[200:210]
    part["position"] = part["position"] + 1000
    assert prompts_of(part, readers[200:210], seed=3) != prompts[200:210]
