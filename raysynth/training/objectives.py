"""What a training step optimises, one class a kind of model.

Everything random is drawn from each sample's own seed, (recipe seed, position in the global order):
so a loss does not depend on the number of workers, on micro batches, or on where a run was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysynth.case import CONDITION_COLUMNS
from raysynth.config.base import Section
from raysynth.config.model import (
    Diffusion,
    GanConfig,
    HoleFilling,
    InpaintingConfig,
    TextGuided,
)
from raysynth.diffusion.losses import diffusion_loss
from raysynth.diffusion.schedule import NoiseSchedule, build_schedule, predicted_x_0, q_sample
from raysynth.layout.holes import draw_hole, labels_of
from raysynth.models.autoencoder import Autoencoder
from raysynth.models.conditioner import ConditionBatch
from raysynth.models.denoiser import Denoiser
from raysynth.models.encoder import SelfTaughtEncoder
from raysynth.models.gan import Adversaries, AutoencoderAdversaries
from raysynth.models.space import PixelSpace, Space
from raysynth.prompt import NO_NODULE, place_of, write_prompt
from raysynth.seeding import seed_of
from raysynth.training.views import NUM_UNIFORM, draw_views
from raysynth.window import normalize

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
    """Reconstruct slices, with a discriminator beside it if the autoencoder has one."""

    columns = ("hu",)

    def __init__(
        self,
        autoencoder: Autoencoder | AutoencoderAdversaries,
        window_hu: tuple[float, float],
        latent_shape: tuple[int, ...],
        seed: int,
    ) -> None:
        """Binds a network to its window.

        Args:
            autoencoder: what is trained.
            window_hu: HU of -1 and 1.
            latent_shape: of one sample, (c, *latent).
            seed: the recipe's.
        """
        self.module = autoencoder
        self.window_hu, self.latent_shape, self.seed = window_hu, latent_shape, seed

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The terms of the module, and their sum."""
        noise = draw(self.seed, batch["position"], 0, self.latent_shape).noise
        terms = module(self._images(batch, device), noise.to(device))
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Tensor:
        """Slices above their reconstructions."""
        images = self._images(batch, device)[:NUM_PREVIEWED]
        autoencoder = getattr(module, "generator", module)
        return _grid([images, autoencoder.decode(autoencoder.encode(images))])

    def _images(self, batch: Batch, device: torch.device) -> Tensor:
        # int16 travels to the device: half the bytes.
        return normalize(torch.from_numpy(batch["hu"])[:, None].to(device), self.window_hu)


class DiffusionObjective:
    """Denoise latents or images under a condition."""

    def __init__(
        self,
        denoiser: Denoiser,
        space: Space,
        *,
        config: Diffusion,
        seed: int,
    ) -> None:
        """Binds a network to its noise schedule.

        Args:
            denoiser: what is trained.
            space: where it works; an autoencoder stays as it is.
            config: schedule, prediction type, loss and share of dropped conditions.
            seed: the recipe's.
        """
        self.module = denoiser
        self.space = space
        told = ("diameter_mm",) if isinstance(config, TextGuided) else ()
        self.columns = (space.column, "layout", "box", "ratings", *told)
        self.config, self.seed = config, seed
        self.schedule = build_schedule(config.schedule, config.num_train_timesteps)

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Mean error of the prediction, at a random timestep of each sample."""
        x_0 = self._x_0(batch, device)
        draws = draw(self.seed, batch["position"], 3, tuple(x_0.shape[1:]))
        reader, dropped, time = draws.uniform.unbind(1)
        condition = self._condition(batch, reader.numpy())
        condition = condition.drop(dropped < self.config.condition_drop)
        timestep = (time * self.config.num_train_timesteps).long().to(device)
        noise = draws.noise.to(device)
        schedule = self._schedule(device)
        prediction = module(
            q_sample(schedule, x_0, noise, timestep), timestep, condition.to(device)
        )
        weight = self._weight(condition.to(device))
        losses = diffusion_loss(
            schedule,
            self.config.prediction_type,
            prediction,
            x_0,
            noise,
            timestep,
            weight,
            loss=self.config.loss,
            snr_gamma=self.config.snr_gamma,
        )
        return {"loss": losses.mean()}

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Tensor:
        """Images above what the network makes of them, half-way through the noise."""
        x_0 = self._x_0(batch, device)[:NUM_PREVIEWED]
        positions = batch["position"][:NUM_PREVIEWED]
        noise = draw(self.seed, positions, 0, tuple(x_0.shape[1:])).noise.to(device)
        timestep = torch.full((len(x_0),), self.config.num_train_timesteps // 2, device=device)
        first_reader = np.zeros(len(batch["position"]), np.float32)
        condition = self._condition(batch, first_reader).to(device)
        schedule = self._schedule(device)
        x_t = q_sample(schedule, x_0, noise, timestep)
        prediction = module(x_t, timestep, condition.select(slice(len(x_0))))
        guess = predicted_x_0(schedule, self.config.prediction_type, x_t, prediction, timestep)
        return _grid([self.space.images(one) for one in (x_0, guess)])

    def _x_0(self, batch: Batch, device: torch.device) -> Tensor:
        """What is denoised, (B, c, *latent)."""
        return self.space.x_0(torch.from_numpy(batch[self.space.column]).to(device))

    def _condition(self, batch: Batch, reader: NDArray[np.float32]) -> ConditionBatch:
        """What the network is told of a batch."""
        condition = condition_of(batch, reader)
        if isinstance(self.config, TextGuided):
            return replace(condition, text=prompts_of(batch, reader, self.seed))
        return with_holes(condition, batch, self.config, self.seed)

    def _weight(self, condition: ConditionBatch) -> Tensor | None:
        """Of every pixel in the loss, (B, 1, *spatial): holes count more than what is known."""
        if not isinstance(self.config, InpaintingConfig) or condition.known_mask is None:
            return None
        outside = self.config.outside_weight
        return torch.where(condition.known_mask, outside, 1.0)[:, None]

    def _schedule(self, device: torch.device) -> NoiseSchedule:
        """The schedule where the batch is: copied once, not at every step."""
        if self.schedule.alphas.device != device:
            self.schedule = self.schedule.to(device)
        return self.schedule


class AdversarialObjective:
    """Draw images of conditions in one call, and tell them from real ones."""

    columns = ("hu", "layout", "box", "ratings")

    def __init__(self, adversaries: Adversaries, *, config: GanConfig, seed: int) -> None:
        """Binds the networks to their window.

        Args:
            adversaries: what is trained.
            config: window, and what holes are made of.
            seed: the recipe's.
        """
        self.module = adversaries
        self.config, self.seed = config, seed
        self.space = PixelSpace(config.window_hu)

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The terms of both networks, and their sum."""
        terms = module(*self._inputs(batch, device))
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Tensor:
        """Images above what is made of their conditions."""
        images, condition = self._inputs(batch, device)
        few = condition.select(slice(NUM_PREVIEWED))
        made = module.generator(module.generator.encode(few))
        return _grid([images[:NUM_PREVIEWED], made])

    def _inputs(self, batch: Batch, device: torch.device) -> tuple[Tensor, ConditionBatch]:
        # No reader is drawn: neither network hears of scores.
        condition = condition_of(batch, np.zeros(len(batch["position"]), np.float32))
        condition = with_holes(condition, batch, self.config, self.seed)
        images = self.space.x_0(torch.from_numpy(batch["hu"]).to(device))
        return images, condition.to(device)


class SelfTaughtObjective:
    """Learn features of slices without labels, to judge other slices by.

    The terms of a batch are not the mean of its parts': VICReg looks at the spread of all features
    that are computed together.
    """

    columns = ("hu", "box")

    def __init__(
        self, network: SelfTaughtEncoder, window_hu: tuple[float, float], seed: int
    ) -> None:
        """Binds a network to its window.

        Args:
            network: what is trained.
            window_hu: HU of -1 and 1.
            seed: the recipe's.
        """
        self.module = network
        self.space, self.seed = PixelSpace(window_hu), seed

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """The terms of the module, and their sum."""
        images = self._images(batch, device)
        draws = draw(self.seed, batch["position"], NUM_UNIFORM, tuple(images.shape[1:]))
        box = torch.from_numpy(batch["box"]).to(device)
        views = draw_views(images, box, draws.uniform.to(device), draws.noise.to(device))
        terms = module(views.view, views.other, views.degraded, views.strengths)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Tensor:
        """Slices above those of the batch whose features are the nearest."""
        images = self._images(batch, device)
        features = module.encoder(images).float()
        distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
        nearest = images[distances[:NUM_PREVIEWED].argmin(dim=1)]
        return _grid([images[:NUM_PREVIEWED], nearest])

    def _images(self, batch: Batch, device: torch.device) -> Tensor:
        return self.space.x_0(torch.from_numpy(batch["hu"]).to(device))


def with_holes(
    condition: ConditionBatch, batch: Batch, config: Section, seed: int
) -> ConditionBatch:
    """For a model that fills holes, the conditions with a hole in every sample; else as they are.

    Args:
        condition: of the batch.
        batch: `hu`, `layout` and `position`, from which each hole follows.
        config: the model's.
        seed: the recipe's.
    """
    if not isinstance(config, HoleFilling):
        return condition
    labels = labels_of(config.organs)
    holes = [
        draw_hole(layout, labels, np.random.default_rng(seed_of("hole", seed, position)))
        for layout, position in zip(batch["layout"], batch["position"].tolist(), strict=True)
    ]
    return replace(
        condition,
        known_hu=torch.from_numpy(batch["hu"]),
        known_mask=torch.from_numpy(~np.stack(holes)),
    )


def condition_of(batch: Batch, reader: NDArray[np.float32]) -> ConditionBatch:
    """The conditions of training samples, with the scores of one reader of each.

    Args:
        batch: `layout` (B, *spatial), `box` (B, 2 * spatial_dims) and `ratings` (B, 4, 9).
        reader: a number in [0, 1) a sample; it picks among the readers who are there.
    """
    return ConditionBatch(
        torch.from_numpy(batch["layout"]),
        torch.from_numpy(batch["box"]).long(),
        torch.from_numpy(_scores(batch, reader)[:, CONDITION_COLUMNS]).long(),
    )


def prompts_of(batch: Batch, reader: NDArray[np.float32], seed: int) -> tuple[str, ...]:
    """A prompt for each training sample, in the words of one of its readers.

    Args:
        batch: `layout`, `box`, `ratings`, `diameter_mm` and `position`, which draws the words.
        reader: as for `condition_of`.
        seed: the recipe's.
    """
    prompts = []
    for row, scores in enumerate(_scores(batch, reader).tolist()):
        box = batch["box"][row].tolist()
        if box[0] < 0:
            prompts.append(NO_NODULE)
            continue
        place = place_of(batch["layout"][row], box)
        rng = np.random.default_rng(seed_of("prompt", seed, int(batch["position"][row])))
        prompts.append(write_prompt(scores, float(batch["diameter_mm"][row]), place, rng=rng))
    return tuple(prompts)


def _scores(batch: Batch, reader: NDArray[np.float32]) -> NDArray[np.uint8]:
    """All nine scores of one reader of each sample, (B, 9)."""
    ratings = batch["ratings"]
    present = ratings.any(axis=2)  # (B, readers)
    nth = (reader * present.sum(axis=1)).astype(np.int64)
    chosen = present & (present.cumsum(axis=1) == nth[:, None] + 1)
    # A sample without readers picks a row of zeros: no scores.
    scores: NDArray[np.uint8] = ratings[np.arange(len(ratings)), chosen.argmax(axis=1)]
    return scores


def _grid(rows: list[Tensor]) -> Tensor:
    """Rows of images (B, 1, h, w) in [-1, 1] as one picture (1, rows * h, B * w) in [0, 1].

    Of volumes (B, 1, d, h, w) the middle planes.
    """
    planes = [images[:, :, images.shape[2] // 2] if images.ndim == 5 else images for images in rows]
    lines = [torch.cat(list(images.float().cpu()), dim=2) for images in planes]
    return ((torch.cat(lines, dim=1) + 1) / 2).clamp(0, 1)
