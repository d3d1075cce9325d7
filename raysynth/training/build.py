"""Networks with fresh weights, and the objectives around networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from raysynth.config import Diffusion, ExperimentConfig, ExtractorConfig, Gan, StableDiffusionConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.denoiser import build_denoiser
from raysynth.models.encoder import SelfTaughtEncoder
from raysynth.models.gan import AutoencoderAdversaries, build_adversaries
from raysynth.models.pretrained import pretrained_tokenizer, with_updates
from raysynth.models.space import PixelSpace, Space
from raysynth.training.objectives import (
    AdversarialObjective,
    AutoencoderObjective,
    DiffusionObjective,
    Objective,
    SelfTaughtObjective,
)


def fresh_network(config: ExperimentConfig, latent_shape: tuple[int, ...] | None) -> nn.Module:
    """The network that a recipe trains, with new weights from torch's generator.

    Args:
        config: the recipe.
        latent_shape: (c, *latent) of what a model of latents works on.
    """
    model, spatial_dims = config.model, len(config.samples.shape)
    if isinstance(model, Gan):
        return build_adversaries(model, config.samples.size, spatial_dims)
    if isinstance(model, ExtractorConfig):
        return SelfTaughtEncoder(model)
    if isinstance(model, Diffusion):
        channels, size, *_ = latent_shape or (1, config.samples.size)
        if isinstance(model, StableDiffusionConfig):
            denoiser = build_denoiser(model, channels, size, pretrained_tokenizer(model))
            if model.tuning == "lora":
                denoiser.unet = with_updates(denoiser.unet, model.lora_rank)
            return denoiser
        return build_denoiser(model, channels, size, spatial_dims=spatial_dims)
    autoencoder = build_autoencoder(model, spatial_dims)
    if getattr(model, "adversarial_weight", 0.0):
        return AutoencoderAdversaries(autoencoder, model, spatial_dims)  # type: ignore[arg-type]
    return autoencoder


def objective_of(config: ExperimentConfig, network: Any, space: Space | None) -> Objective:
    """What minimises a recipe's loss.

    Args:
        config: the recipe.
        network: as `fresh_network` makes it, with whatever weights.
        space: where a model of latents works.
    """
    model = config.model
    if isinstance(model, Gan):
        return AdversarialObjective(network, config=model, seed=config.seed)
    if isinstance(model, ExtractorConfig):
        return SelfTaughtObjective(network, model.window_hu, config.seed)
    if isinstance(model, Diffusion):
        if space is None:
            space = PixelSpace(model.window_hu)  # type: ignore[union-attr]
        return DiffusionObjective(network, space, config=model, seed=config.seed)
    shape = (size // model.downsampling for size in config.samples.shape)
    return AutoencoderObjective(
        network, model.window_hu, (model.latent_channels, *shape), config.seed
    )
