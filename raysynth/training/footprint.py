"""What one training step of a recipe costs, counted without data, weights or a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysynth.config import ExperimentConfig, ExtractorConfig, OfLatents
from raysynth.config.model import AutoencoderConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.counting import Count, Hollow
from raysynth.models.space import LatentSpace
from raysynth.training.build import fresh_network, objective_of
from raysynth.training.objectives import Batch, Objective


@dataclass(frozen=True)
class Footprint:
    """A training step, but for the optimizer's part.

    Attributes:
        num_parameters: of the network.
        num_trained: of these, those that have gradients.
        flops: of forward and backward pass, a sample; activations that are computed twice count
            twice.
        fixed_bytes: of activations and scratch at the fullest moment, whatever the micro batch; of
            the line through two counts, so it may lie below 0.
        sample_bytes: more of them for each sample of the micro batch.
    """

    num_parameters: int
    num_trained: int
    flops: float
    fixed_bytes: int
    sample_bytes: int

    def activation_bytes(self, micro_batch_size: int) -> int:
        """At the fullest moment of a step."""
        return self.fixed_bytes + micro_batch_size * self.sample_bytes


def latent_shape(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None
) -> tuple[int, ...] | None:
    """(c, *latent) of what a model of latents works on; None of others."""
    if autoencoder is None:
        return None
    shape = config.samples.shape
    return autoencoder.latent_channels, *(size // autoencoder.downsampling for size in shape)


def bare_objective(config: ExperimentConfig, autoencoder: AutoencoderConfig | None) -> Objective:
    """A recipe's objective around fresh networks: no store, bundle or folder is looked at."""
    space = None
    if isinstance(config.model, OfLatents):
        assert autoencoder is not None
        decoder = build_autoencoder(autoencoder, len(config.samples.shape))
        space = LatentSpace(decoder, 1.0, autoencoder.window_hu)
    network = fresh_network(config, latent_shape(config, autoencoder))
    return objective_of(config, network, space)


def training_footprint(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None = None
) -> Footprint:
    """Counts a training step of a recipe at two micro batches.

    Args:
        config: the recipe.
        autoencoder: of a model of latents, the autoencoder's configuration.
    """
    hollow = Hollow()
    least = 2 if isinstance(config.model, ExtractorConfig) else 1  # it looks at their spread
    shape = latent_shape(config, autoencoder)
    objective = hollow.build(lambda: bare_objective(config, autoencoder))
    counts = [_count(config, objective, hollow, shape, n) for n in (least, 2 * least)]
    small, large = counts
    sample_bytes = (large.peak_bytes - small.peak_bytes) // least
    parameters = list(objective.module.parameters())
    return Footprint(
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        flops=(large.flops - small.flops) / least,
        fixed_bytes=small.peak_bytes - least * sample_bytes,
        sample_bytes=sample_bytes,
    )


def _count(
    config: ExperimentConfig,
    objective: Any,
    hollow: Hollow,
    shape: tuple[int, ...] | None,
    micro_batch_size: int,
) -> Count:
    batch = example_batch(config, micro_batch_size, shape)
    half = config.training.precision == "bf16"

    def network(*inputs: Any) -> Any:
        return objective.module(*map(hollow.emptied, inputs))

    with hollow.count(objective.module) as count:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss: Tensor = objective.loss(network, batch, torch.device("cpu"))["loss"]
        torch.autograd.backward(loss)
    for parameter in objective.module.parameters():
        parameter.grad = None
    return count


def example_batch(
    config: ExperimentConfig, count: int, latent_shape: tuple[int, ...] | None = None
) -> Batch:
    """A batch of noise in the shapes of a recipe's samples: lungs with a nodule in a body."""
    shape = config.samples.shape
    rng = np.random.default_rng(0)
    layout = np.full((count, *shape), 4, np.uint8)
    layout[(slice(None), *(slice(size // 4, 3 * size // 4) for size in shape))] = 1
    layout[(slice(None), *(slice(size // 2, size // 2 + 4) for size in shape))] = 5
    box = [size // 2 for size in shape] + [min(size // 2 + 4, size) for size in shape]
    batch: Batch = {
        "position": np.arange(count),
        "hu": rng.integers(-1000, 400, (count, *shape), np.int16),
        "layout": layout,
        "box": np.tile(np.array(box, np.int16), (count, 1)),
        "ratings": np.full((count, 4, 9), 3, np.uint8),
        "diameter_mm": np.full(count, 8, np.float32),
    }
    if latent_shape is not None:
        batch["latents"] = rng.standard_normal((count, *latent_shape), np.float32).astype(
            np.float16
        )
    return batch
