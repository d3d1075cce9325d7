"""A bundle of random weights: what it draws shows nothing, but takes the time that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raysynth.config import Diffusion, ExperimentConfig
from raysynth.config.model import AutoencoderConfig, AutoencoderKLConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import save_bundle
from raysynth.models.denoiser import build_denoiser
from raysynth.models.facts import BundleFacts

AUTOENCODER = AutoencoderKLConfig(
    window_hu=(-1000, 2500), channels=(8, 16, 16), num_res_blocks=1, norm_num_groups=8
)
"""Small; its latents have four channels and a quarter of the pixels along a side."""


def slices_recipe(folder: Path, size: int, **sampling: Any) -> ExperimentConfig:
    """A recipe of slices, drawn by a small network of pixels.

    Args:
        folder: its work_dir.
        size: pixels along a side.
        sampling: settings.
    """
    model = {
        "family": "semantic_diffusion",
        "layout_channels": 16,
        "channels": [24, 48],
        "attention_levels": [False, False],
        "num_res_blocks": 1,
        "num_head_channels": 8,
        "norm_num_groups": 8,
    }
    return _recipe(folder, size, model, sampling)


def latents_recipe(
    folder: Path, size: int, channels: tuple[int, int], **sampling: Any
) -> ExperimentConfig:
    """A recipe of slices, drawn in the latents of `AUTOENCODER`.

    Args:
        folder: its work_dir.
        size: of the latents, along a side.
        channels: of the network's two levels.
        sampling: settings.
    """
    model = {
        "family": "latent_diffusion",
        "autoencoder": "none",
        "channels": channels,
        "attention_levels": [False, True],
        "num_res_blocks": 1,
        "num_head_channels": 16,
        "norm_num_groups": 8,
    }
    return _recipe(folder, 4 * size, model, sampling)


def _recipe(
    folder: Path, size: int, model: dict[str, Any], sampling: dict[str, Any]
) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "random",
            "work_dir": folder,
            "data": {
                "source": {"kind": "phantom", "num_patients": 4, "spacing_mm": (4.0, 2.8, 2.8)},
                "samples": {
                    "kind": "slices",
                    "name": "slices",
                    "size": size,
                    "field_of_view_mm": 5.0 * size,
                },
            },
            "model": model,
            "sampling": sampling,
            "evaluation": {"controls": False},
        }
    )


def make_bundle(
    config: ExperimentConfig, path: Path, autoencoder: AutoencoderConfig | None = None
) -> None:
    """Saves random weights of a diffusion recipe's networks as a bundle.

    Args:
        config: the recipe.
        path: of the bundle.
        autoencoder: of a model that works in latents.
    """
    assert isinstance(config.model, Diffusion)
    torch.manual_seed(0)
    facts = BundleFacts(
        model=config.model,
        autoencoder=autoencoder,
        samples=config.data.samples,
        intensity="hu",
        sources=("phantom",),
        snapshot="none",
        patients={"train": 3, "val": 0, "test": 1},
        indicative=True,
        seen_samples=0,
    )
    channels, size, *_ = facts.latent_shape
    denoiser = build_denoiser(config.model, channels, size, spatial_dims=facts.spatial_dims)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # a fresh one ends in zeros: it would hear nothing
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = None if autoencoder is None else build_autoencoder(autoencoder).state_dict()
    save_bundle(path, facts, weights, denoiser.state_dict())
