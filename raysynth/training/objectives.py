"""What a training step optimises, one class a kind of model.

Everything random is drawn from each sample's own seed, (recipe seed, position in the global order):
so a loss does not depend on the number of workers, on micro batches, or on where a run was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysynth.case import CONDITION_COLUMNS
from raysynth.config.model import LatentDiffusionConfig
from raysynth.diffusion.losses import diffusion_loss
from raysynth.diffusion.schedule import NoiseSchedule, build_schedule, predicted_x_0, q_sample
from raysynth.models.autoencoder import Autoencoder
from raysynth.models.conditioner import ConditionBatch
from raysynth.models.denoiser import LatentDenoiser
from raysynth.preprocess.window import normalize
from raysynth.seeding import seed_of

Batch = dict[str, NDArray[Any]]

NUM_PREVIEWED = 4


class Objective(Protocol):
    """What the loop needs to know of a model."""

    @property
    def module(self) -> nn.Module:
        """The network that is trained."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What a batch must hold, besides `position`."""

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Scalar terms of the mean loss of a batch; `loss` is the one that is minimised.

        Args:
            module: `self.module`, wrapped for the engine.
            batch: the columns and `position`, each (B, ...).
            device: where the module is.
        """

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Tensor:
        """A picture of how far the model is, (1, height, width) in [0, 1]."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch.

    Attributes:
        uniform: numbers in [0, 1), (B, k).
        noise: standard normal, (B, *shape).
    """

    uniform: Tensor
    noise: Tensor


def draw(
    seed: int, positions: NDArray[np.int64], num_uniform: int, shape: tuple[int, ...]
) -> Draws:
    """Draws for samples at `positions` of a run's global order, each from its own seed."""
    generator = torch.Generator()
    uniform = torch.empty(len(positions), num_uniform)
    noise = torch.empty(len(positions), *shape)
    for row, position in enumerate(positions.tolist()):
        generator.manual_seed(seed_of("train", seed, position))
        torch.rand(num_uniform, generator=generator, out=uniform[row])
        torch.randn(shape, generator=generator, out=noise[row])
    return Draws(uniform, noise)


class AutoencoderObjective:
    """Reconstruct slices. The module's own training terms add up to the loss."""

    columns = ("hu",)

    def __init__(
        self,
        autoencoder: Autoencoder,
        window_hu: tuple[float, float],
        latent_shape: tuple[int, ...],
        seed: int,
    ) -> None:
        """Binds a network to its window.

        Args:
            autoencoder: what is trained.
            window_hu: HU of -1 and 1.
            latent_shape: of one sample, (c, h, w).
            seed: the recipe's.
        """
        self.module = autoencoder
        self.window_hu, self.latent_shape, self.seed = window_hu, latent_shape, seed

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The terms of `Autoencoder.training_terms`, and their sum."""
        noise = draw(self.seed, batch["position"], 0, self.latent_shape).noise
        terms = module(self._images(batch, device), noise.to(device))
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Tensor:
        """Slices above their reconstructions."""
        images = self._images(batch, device)[:NUM_PREVIEWED]
        return _grid([images, module.decode(module.encode(images))])

    def _images(self, batch: Batch, device: torch.device) -> Tensor:
        # int16 travels to the device: half the bytes.
        return normalize(torch.from_numpy(batch["hu"])[:, None].to(device), self.window_hu)


class LatentDiffusionObjective:
    """Denoise latents under a condition (system A)."""

    columns = ("latents", "layout", "box", "ratings")

    def __init__(
        self,
        denoiser: LatentDenoiser,
        autoencoder: Autoencoder,
        latent_scale: float,
        *,
        config: LatentDiffusionConfig,
        seed: int,
    ) -> None:
        """Binds a network to its noise schedule.

        Args:
            denoiser: what is trained.
            autoencoder: decodes previews; it stays as it is.
            latent_scale: the network sees stored latents times this.
            config: schedule, prediction type and share of dropped conditions.
            seed: the recipe's.
        """
        self.module = denoiser
        self.autoencoder, self.latent_scale = autoencoder.eval(), latent_scale
        self.config, self.seed = config, seed
        self.schedule = build_schedule(config.schedule, config.num_train_timesteps)

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Mean squared error of the prediction, at a random timestep of each sample."""
        x_0 = self._x_0(batch, device)
        draws = draw(self.seed, batch["position"], 3, tuple(x_0.shape[1:]))
        reader, dropped, time = draws.uniform.unbind(1)
        condition = condition_of(batch, reader.numpy()).drop(dropped < self.config.condition_drop)
        timestep = (time * self.config.num_train_timesteps).long().to(device)
        noise = draws.noise.to(device)
        schedule = self._schedule(device)
        prediction = module(
            q_sample(schedule, x_0, noise, timestep), timestep, condition.to(device)
        )
        losses = diffusion_loss(
            schedule, self.config.prediction_type, prediction, x_0, noise, timestep
        )
        return {"loss": losses.mean()}

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Tensor:
        """Decoded latents above what the network makes of them, half-way through the noise."""
        x_0 = self._x_0(batch, device)[:NUM_PREVIEWED]
        positions = batch["position"][:NUM_PREVIEWED]
        noise = draw(self.seed, positions, 0, tuple(x_0.shape[1:])).noise.to(device)
        timestep = torch.full((len(x_0),), self.config.num_train_timesteps // 2, device=device)
        condition = condition_of(batch, np.zeros(len(batch["position"]), np.float32)).to(device)
        schedule = self._schedule(device)
        x_t = q_sample(schedule, x_0, noise, timestep)
        prediction = module(x_t, timestep, condition.select(slice(len(x_0))))
        guess = predicted_x_0(schedule, self.config.prediction_type, x_t, prediction, timestep)
        decode = self.autoencoder.to(device).decode
        return _grid([decode(latents / self.latent_scale) for latents in (x_0, guess)])

    def _x_0(self, batch: Batch, device: torch.device) -> Tensor:
        """Scaled latents, (B, c, h, w)."""
        stored = torch.from_numpy(batch["latents"]).to(device, torch.float32)
        return stored * self.latent_scale

    def _schedule(self, device: torch.device) -> NoiseSchedule:
        """The schedule where the batch is: copied once, not at every step."""
        if self.schedule.betas.device != device:
            self.schedule = NoiseSchedule(
                self.schedule.betas.to(device), self.schedule.alphas_cumprod.to(device)
            )
        return self.schedule


def condition_of(batch: Batch, reader: NDArray[np.float32]) -> ConditionBatch:
    """The conditions of training samples, with the scores of one reader of each.

    Args:
        batch: `layout` (B, *spatial), `box` (B, 4) and `ratings` (B, 4, 9).
        reader: a number in [0, 1) a sample; it picks among the readers who are there.
    """
    ratings = batch["ratings"]
    present = ratings.any(axis=2)  # (B, readers)
    nth = (reader * present.sum(axis=1)).astype(np.int64)
    chosen = present & (present.cumsum(axis=1) == nth[:, None] + 1)
    # A sample without readers picks a row of zeros: no scores.
    scores = ratings[np.arange(len(ratings)), chosen.argmax(axis=1)][:, CONDITION_COLUMNS]
    return ConditionBatch(
        torch.from_numpy(batch["layout"]),
        torch.from_numpy(batch["box"]).long(),
        torch.from_numpy(scores).long(),
    )


def _grid(rows: list[Tensor]) -> Tensor:
    """Rows of images (B, 1, h, w) in [-1, 1] as one picture (1, rows * h, B * w) in [0, 1]."""
    lines = [torch.cat(list(images.float().cpu()), dim=2) for images in rows]
    return ((torch.cat(lines, dim=1) + 1) / 2).clamp(0, 1)
