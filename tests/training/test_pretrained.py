"""Fine-tuning changes what it should and nothing else; a folder becomes a bundle as it is."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raysynth.config import StableDiffusionConfig, parse_recipe
from raysynth.errors import InputError
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import load_bundle
from raysynth.models.pretrained import finished_weights, pretrained_autoencoder, pretrained_denoiser
from raysynth.models.space import LatentSpace
from raysynth.training.launch import train
from raysynth.training.loop import Outcome
from raysynth.training.objectives import Batch, DiffusionObjective
from tests.models.folders import stable_diffusion_folder, vq_folder
from tests.training.conftest import recipe
from tests.training.tiny import MODEL, fit_tiny, tiny_config

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd2")
    return stable_diffusion_folder(path, prediction_type="v_prediction")


def stable(folder: Path, tuning: str) -> StableDiffusionConfig:
    model = (
        f"{{family: stable_diffusion, autoencoder: a, pretrained: '{folder}', tuning: {tuning}}}"
    )
    config = parse_recipe(f"model: {model}", name="x").model
    assert isinstance(config, StableDiffusionConfig)
    return config


class LatentStream:
    """Batches of eight samples in memory, over and over."""

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        random = np.random.default_rng(0)
        columns = {
            "latents": random.normal(size=(8, 4, 8, 8)).astype(np.float16),
            "layout": random.integers(0, 6, (8, 32, 32)).astype(np.uint8),
            "box": np.tile(np.array([2, 3, 8, 9], np.int16), (8, 1)),
            "ratings": random.integers(1, 6, (8, 4, 9)).astype(np.uint8),
            "diameter_mm": np.full(8, 12.4, np.float32),
        }
        while True:
            yield columns | {"position": np.arange(seen_samples, seen_samples + 8)}
            seen_samples += 8


def tuned(path: Path, config: StableDiffusionConfig, seen: int, **changes: Any) -> Outcome:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(MODEL.model_copy(update={"latent_channels": 4}))
    space = LatentSpace(autoencoder, 0.18, MODEL.window_hu)
    objective = DiffusionObjective(pretrained_denoiser(config), space, config=config, seed=0)
    assert objective.schedule.num_train_timesteps == config.num_train_timesteps
    training = tiny_config(max_seen_samples=seen, micro_batch_size=4, **changes)
    return fit_tiny(path, training, objective=objective, stream=LatentStream())


def moved(before: Weights, after: Weights) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}


def test_low_rank_updates_change_nothing_else(folder: Path, tmp_path: Path) -> None:
    config = stable(folder, "lora")
    outcome = tuned(tmp_path, config, 32)
    trained = {name for name in outcome.weights if "position_ids" not in name}
    assert trained
    assert all("lora_" in name for name in trained)
    torch.manual_seed(0)
    start = pretrained_denoiser(config).state_dict()
    assert all(not torch.equal(outcome.weights[name], start[name]) for name in trained)

    # Merged, they move the projections of the U-Net's attention; all else is bit-equal.
    published = finished_weights(stable(folder, "full"), {})
    changed = moved(published, finished_weights(config, outcome.weights))
    projections = {
        name
        for name in published
        if name.startswith("unet.") and name.endswith(".weight") and ".attn" in name
    }
    assert changed == projections

    # A checkpoint leaves the frozen weights out, and a run goes on from it as if never stopped.
    checkpoint = tmp_path / "checkpoints" / "seen-000000000032" / "rank-00000.safetensors"
    saved = {key.split(":", 2)[2] for key in load_file(checkpoint)}
    assert trained <= saved
    assert all("lora_" in name for name in saved)
    longer = tuned(tmp_path, config, 64)
    whole = tuned(tmp_path / "whole", config, 64)
    assert moved(longer.weights, whole.weights) == set()
    assert moved(longer.weights, outcome.weights) == trained


def test_full_tuning_changes_all_of_the_u_net(folder: Path, tmp_path: Path) -> None:
    config = stable(folder, "full")
    published = finished_weights(config, {})
    changed = moved(published, finished_weights(config, tuned(tmp_path, config, 32).weights))
    assert changed == {name for name in published if name.startswith("unet.")}


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_folder_becomes_a_bundle_without_training(
    kind: str, folder: Path, trained: Path, tmp_path: Path
) -> None:
    path = vq_folder(tmp_path / "vq") if kind == "vq" else folder / "vae"
    model = {"family": "pretrained_autoencoder", "pretrained": path, "window_hu": (-1000, 400)}
    config = recipe(trained, f"published_{kind}", model, max_seen_samples=0)
    summary = train(config)
    assert (summary.seen_samples, summary.final_loss) == (0, None)
    bundle = load_bundle(summary.bundle)
    assert bundle.facts.seen_samples == 0
    assert bundle.window_hu == (-1000, 400)
    assert bundle.autoencoder is not None
    published = pretrained_autoencoder(config.model).state_dict()
    assert moved(published, bundle.autoencoder.state_dict()) == set()
    assert train(config) == summary
    assert "pretrained" in (summary.bundle / "card.md").read_text()


def test_an_autoencoder_that_is_not_its_own_is_refused(folder: Path, trained: Path) -> None:
    model = {"family": "stable_diffusion", "pretrained": folder, "autoencoder": "bundles/ae"}
    with pytest.raises(InputError, match=r"needs its own, of 4 channels scaled by 0\.18215: train"):
        train(recipe(trained, "sd", model))


def test_weights_that_know_nothing_are_trained(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"max_seen_samples 0 with model\.family autoencoder_kl"):
        recipe(trained, max_seen_samples=0)
