"""What drawing one sample costs, counted without weights or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysynth.condition import Condition
from raysynth.config import Diffusion, ExperimentConfig, Gan, StableDiffusionConfig
from raysynth.config.model import AutoencoderConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.conditioner import collate
from raysynth.models.counting import Hollow
from raysynth.models.denoiser import build_denoiser
from raysynth.models.gan import build_generator
from raysynth.models.pretrained import pretrained_tokenizer

SLOT_TENSORS = 6
"""Of a sample's size that the engine holds for it: x_t, two estimates, noise, what is known, and
how much of it."""


@dataclass(frozen=True)
class DrawingFootprint:
    """Drawing with the sampling engine, or with a GAN's generator.

    Attributes:
        num_parameters: of all networks that take part.
        num_calls: of the network, a sample: steps, twice where it is guided.
        call_flops: of one call, a sample.
        decoding_flops: of decoding a sample's latents; 0 of others.
        peak_bytes: on a GPU while it draws a batch, weights and slots included.
    """

    num_parameters: int
    num_calls: int
    call_flops: float
    decoding_flops: float
    peak_bytes: int


def drawing_footprint(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None = None
) -> DrawingFootprint | None:
    """Counts a network call at the recipe's batch size, and the decoding of a batch.

    Args:
        config: the recipe.
        autoencoder: of a model of latents, the autoencoder's configuration.

    Returns:
        None for models that draw nothing.
    """
    model, sampling, shape = config.model, config.sampling, config.samples.shape
    if not isinstance(model, Diffusion | Gan):
        return None
    size, dims, batch = shape[-1], len(shape), sampling.batch_size
    hollow = Hollow()
    condition = hollow.emptied(collate([Condition()] * batch, size, dims))
    if isinstance(model, Gan):
        generator = hollow.build(lambda: build_generator(model, size, dims))
        flops, peak = _counted(hollow, generator, lambda: generator(generator.encode(condition)))
        weights = _num_parameters(generator)
        return DrawingFootprint(weights, 1, flops / batch, 0.0, 4 * weights + peak)
    channels, cells = 1, size
    if autoencoder is not None:
        channels, cells = autoencoder.latent_channels, size // autoencoder.downsampling
    tokenizer = pretrained_tokenizer(model) if isinstance(model, StableDiffusionConfig) else None
    denoiser = hollow.build(lambda: build_denoiser(model, channels, cells, tokenizer, dims).eval())
    guided = sampling.guidance_scale != 1
    rows = batch * (2 if guided else 1)
    latent = (channels, *(cells,) * dims)
    condition = hollow.emptied(collate([Condition()] * rows, size, dims))
    x_t = hollow.emptied(torch.empty(rows, *latent))
    timestep = hollow.emptied(torch.zeros(rows, dtype=torch.int64))
    encoded = denoiser.encode(condition)
    flops, peak = _counted(hollow, denoiser, lambda: denoiser.predict(x_t, timestep, encoded))
    decoding, weights = 0.0, _num_parameters(denoiser)
    slots = SLOT_TENSORS * batch * x_t[0].numel() * x_t.element_size()
    if autoencoder is not None:
        decoder = hollow.build(lambda: build_autoencoder(autoencoder, dims).eval())
        latents = x_t[:batch]
        decoding, decoding_peak = _counted(hollow, decoder, lambda: decoder.decode(latents))
        weights += _num_parameters(decoder)
        peak = max(peak, decoding_peak)
    return DrawingFootprint(
        weights,
        sampling.num_inference_steps * (2 if guided else 1),
        flops / rows,
        decoding / batch,
        4 * weights + slots + peak,
    )


def _counted(hollow: Hollow, module: Any, call: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs and peak bytes of a call."""
    with hollow.count(module) as count, torch.no_grad():
        call()
    return count.flops, count.peak_bytes


def _num_parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())
