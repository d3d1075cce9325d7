"""Step-level batching: samples share network calls whatever their sampler, steps and position.

A sample is its seed. Every slot draws its noise from its own generator, and the network always runs
at one batch shape, with idle slots padded, so a sample's bits depend on its request and that shape
alone: not on its mates, its slot or its turn.

Where a condition keeps part of an image, that part replaces the network's estimate of x_0 before
each update. All samplers here are linear in x_t and x_0 and reproduce x_t's noise level when x_0 is
right, so the kept part follows alpha_t x + sigma_t noise by itself.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raysynth.condition import Condition
from raysynth.config.model import PredictionType
from raysynth.config.sampling import SamplerName
from raysynth.diffusion.samplers import NUM_WEIGHTS, StepTable, sampler_step, step_table
from raysynth.diffusion.schedule import NoiseSchedule, x_0_weights
from raysynth.errors import InputError
from raysynth.models.conditioner import ConditionBatch, EncodedCondition, collate
from raysynth.models.space import Space

if TYPE_CHECKING:
    from raysynth.models.denoiser import Denoiser


@dataclass(frozen=True)
class SampleRequest:
    """One sample to draw.

    Attributes:
        sample_id: handed back with the result.
        seed: all its noise follows from it (on one kind of device).
        condition: what it should show.
        sampler: which sampler.
        num_inference_steps: network calls.
        guidance_scale: 1 follows the condition as trained; more needs a guided engine.
    """

    sample_id: str
    seed: int
    condition: Condition
    sampler: SamplerName
    num_inference_steps: int
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what is no scale.

        Raises:
            InputError: the guidance scale is no finite number of 0 or more.
        """
        scale = self.guidance_scale
        is_number = isinstance(scale, int | float | np.number) and not isinstance(scale, bool)
        if not is_number or not 0 <= scale < math.inf:
            raise InputError(
                f"guidance_scale {scale!r} of sample {self.sample_id}: give a number of 0 or more; "
                "1 follows the condition as trained"
            )


class FinishedSample(NamedTuple):
    """A result.

    Attributes:
        sample_id: as in the request.
        x_0: scaled latents, or an image (c, *spatial), on the engine's device.
        batch_shape: rows of the network calls that made it; its bits are fixed at this shape.
    """

    sample_id: str
    x_0: Tensor
    batch_shape: int


@dataclass
class _Course:
    """What the host knows of a busy slot; the device keeps the rest."""

    sample_id: str
    generator: torch.Generator
    is_stochastic: bool
    steps_left: int


class SamplingEngine:
    """Advances up to `max_slots` samples together, one network call a step.

    A guided engine evaluates the condition and the null condition of each slot in the same call of
    2 * max_slots rows. Nothing in `step` waits for the device.
    """

    _x_t: Tensor  # (slots, c, h, w), like the three below
    _x_0: Tensor
    _x_0_prev: Tensor
    _noise: Tensor
    _guidance: Tensor  # (slots, 1, 1, 1)
    _timesteps: Tensor  # (slots, num_train_timesteps + 1)
    _weights: Tensor  # (slots, num_train_timesteps + 1, 2 + NUM_WEIGHTS, 1, 1, 1)
    _slots: Tensor  # (slots,), like the two below
    _position: Tensor
    _stride: Tensor
    _encoded: EncodedCondition  # (batch_shape, ...)
    _known: Tensor | None = None  # (slots, c, h, w): what is kept; None while no sample keeps any
    _keep: Tensor  # (slots, 1, h, w): how much of it

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        latent_shape: tuple[int, ...],
        sample_size: int,
        max_slots: int,
        *,
        space: Space | None = None,
        feather_px: int = 0,
        guided: bool = False,
        compiled: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Makes an engine with all slots idle.

        Args:
            denoiser: the network; moved to `device` and put into evaluation mode.
            schedule: noise levels the network was trained on.
            prediction_type: what the network predicts.
            latent_shape: (c, *latent) of what is denoised: latents, or the image itself.
            sample_size: pixels along a decoded sample's side, the grid of conditions.
            max_slots: samples a call; fixes the batch shape.
            space: where the network works; needed by requests that know a part of their image.
            feather_px: over how many pixels inside a hole what is known fades.
            guided: whether requests may ask for a guidance_scale other than 1.
            compiled: compile the network for its one batch shape, at the first step.
            device: where to compute.

        Raises:
            InputError: it shall be compiled for a CPU, and there is no C++ compiler.
        """
        self.spatial_dims = len(latent_shape) - 1
        # Convolutions read images with their channels last without reordering them first.
        self.memory_format = (
            torch.channels_last if self.spatial_dims == 2 else torch.channels_last_3d
        )
        self.denoiser: Denoiser = denoiser.to(  # type: ignore[call-overload]
            device, memory_format=self.memory_format
        ).eval()
        self._network: Callable[..., Tensor] = self.denoiser.predict
        if compiled:
            _check_compiler(device)
            self._network = torch.compile(self.denoiser.predict, dynamic=False)
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.sample_size = sample_size
        self.space, self.feather_px = space, feather_px
        self.max_slots = max_slots
        self.guided = guided
        self.device = torch.device(device)
        self._courses: list[_Course | None] = [None] * max_slots
        self._finished: list[FinishedSample] = []
        with torch.inference_mode():
            self._allocate(latent_shape)

    @property
    def batch_shape(self) -> int:
        """Rows of every network call."""
        return self.max_slots * (2 if self.guided else 1)

    @property
    def num_busy(self) -> int:
        """Slots that hold an unfinished sample."""
        return sum(course is not None for course in self._courses)

    @torch.inference_mode()
    def admit(self, request: SampleRequest) -> bool:
        """Starts a sample in a free slot; False if there is none.

        Raises:
            InputError: its condition, steps or guidance do not fit this model or engine.
        """
        if None not in self._courses:
            return False
        if request.guidance_scale != 1 and not self.guided:
            raise InputError(
                f"guidance_scale {request.guidance_scale} of sample {request.sample_id}: this "
                "engine runs without guidance; make it with guided=True"
            )
        table = step_table(request.sampler, self.schedule, request.num_inference_steps)
        condition = self._collate([request.condition])
        if request.condition.known_mask is not None and self.space is None:
            raise InputError(
                f"sample {request.sample_id} knows a part of its image: give the engine a space"
            )
        encoded = self.denoiser.encode(condition)
        slot = self._courses.index(None)
        generator = torch.Generator(self.device).manual_seed(request.seed)
        self._courses[slot] = _Course(
            request.sample_id, generator, table.is_stochastic, request.num_inference_steps
        )
        self._put_condition(slot, encoded)
        self._put_table(slot, table)
        self._guidance[slot] = request.guidance_scale
        self._x_t[slot] = self._noise[slot].normal_(generator=generator)
        self._put_known(slot, condition, table)
        self._x_0[slot] = 0
        self._x_0_prev[slot] = 0
        return True

    @torch.inference_mode()
    def step(self) -> None:
        """Advances every busy slot by one network call; finished ones wait for `retire`."""
        for slot, course in enumerate(self._courses):
            if course is not None and course.is_stochastic:
                self._noise[slot].normal_(generator=course.generator)
        timestep = self._timesteps[self._slots, self._position]
        p, q, *weights = self._weights[self._slots, self._position].unbind(1)
        x_0 = torch.addcmul(p * self._x_t, q, self._predict(timestep))
        if self._known is not None:
            # What is known takes part in the update, so that its noise stays that of its step.
            x_0 = torch.lerp(x_0, self._known, self._keep)
        self._x_t = sampler_step(weights, self._x_t, x_0, self._x_0, self._x_0_prev, self._noise)
        self._x_0, self._x_0_prev = x_0, self._x_0
        self._position += self._stride
        self._collect()

    @torch.inference_mode()
    def abandon(self, sample_id: str) -> bool:
        """Frees the slot of an unfinished sample; False if it has none."""
        for slot, course in enumerate(self._courses):
            if course is not None and course.sample_id == sample_id:
                self._free(slot)
                return True
        return False

    def retire(self) -> list[FinishedSample]:
        """Hands back the samples that have finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def estimates(self) -> Tensor:
        """Each slot's estimate of x_0 after its last step, (slots, c, *latent): for previews."""
        return self._x_0

    def progress(self) -> dict[str, tuple[int, int]]:
        """By unfinished sample, its slot and how many of its steps are left."""
        busy = enumerate(self._courses)
        return {one.sample_id: (slot, one.steps_left) for slot, one in busy if one is not None}

    def run(self, requests: Iterable[SampleRequest]) -> Iterator[FinishedSample]:
        """Draws all requests, in order of completion, with the slots kept full.

        Give requests of many steps first: at the end they would leave most slots idle.
        """
        waiting = iter(requests)
        request = next(waiting, None)
        while request is not None or self.num_busy:
            while request is not None and self.admit(request):
                request = next(waiting, None)
            self.step()
            yield from self.retire()

    def _collate(self, conditions: Sequence[Condition]) -> ConditionBatch:
        return collate(conditions, self.sample_size, self.spatial_dims).to(self.device)

    def _allocate(self, latent_shape: tuple[int, ...]) -> None:
        """The slots' state on the device. The row after the last step is the idle one: all zero."""
        slots, rows = self.max_slots, self.schedule.num_train_timesteps + 1
        axes = (1,) * len(latent_shape)
        # Generators fill memory in its order: noise stays contiguous, so that seeds mean the same.
        self._noise = torch.zeros(slots, *latent_shape, device=self.device)
        self._x_t = self._noise.to(memory_format=self.memory_format, copy=True)
        self._x_0 = self._x_t.clone()
        self._x_0_prev = self._x_t.clone()
        self._guidance = torch.ones(slots, *axes, device=self.device)
        self._timesteps = torch.zeros(slots, rows, dtype=torch.int64, device=self.device)
        self._weights = torch.zeros(slots, rows, 2 + NUM_WEIGHTS, *axes, device=self.device)
        self._slots = torch.arange(slots, device=self.device)
        self._position = torch.full((slots,), rows - 1, device=self.device)
        self._stride = torch.zeros_like(self._position)
        encoded = self.denoiser.encode(self._collate([Condition()] * self.batch_shape))
        self._encoded = EncodedCondition._make(
            None if part is None else part.clone() for part in encoded
        )

    def _put_condition(self, slot: int, encoded: EncodedCondition) -> None:
        """Fills a slot's conditional row; the null rows of a guided engine never change."""
        for mine, given in zip(self._encoded, encoded, strict=True):
            if mine is not None and given is not None:
                mine[slot] = given[0]

    def _put_known(self, slot: int, condition: ConditionBatch, table: StepTable) -> None:
        """What is kept of a new sample; its pure noise becomes that of the first level there."""
        if condition.known_mask is None:
            if self._known is not None:
                self._keep[slot] = 0
            return
        assert self.space is not None
        known, keep = self.space.known(condition, self.feather_px)
        if self._known is None:
            self._known, self._keep = (
                torch.zeros_like(self._x_t),
                torch.zeros_like(self._x_t[:, :1]),
            )
        self._known[slot], self._keep[slot] = known[0], keep[0]
        alpha, sigma = self.schedule.at(table.timesteps[0])
        noisy = alpha * self._known[slot] + sigma * self._noise[slot]
        self._x_t[slot] = torch.lerp(self._noise[slot], noisy.float(), self._keep[slot])

    def _put_table(self, slot: int, table: StepTable) -> None:
        """Writes a slot's course, with the weights that turn predictions into x_0 before a-e."""
        steps = len(table.timesteps)
        to_x_0 = x_0_weights(self.prediction_type, *self.schedule.at(table.timesteps))
        weights = torch.cat([torch.stack(to_x_0, dim=1), table.weights], dim=1)
        self._timesteps[slot, :steps] = table.timesteps.to(self.device)
        axes = (1,) * (self.spatial_dims + 1)
        self._weights[slot, :steps] = weights.float().to(self.device).view(steps, -1, *axes)
        self._position[slot] = 0
        self._stride[slot] = 1

    def _predict(self, timestep: Tensor) -> Tensor:
        """The network's prediction, guided where asked for (Ho & Salimans 2022, eq. 6)."""
        if not self.guided:
            return self._network(self._x_t, timestep, self._encoded)
        prediction = self._network(
            torch.cat([self._x_t, self._x_t]), torch.cat([timestep, timestep]), self._encoded
        )
        conditional, null = prediction.chunk(2)
        return torch.addcmul(null, self._guidance, conditional - null)

    def _collect(self) -> None:
        """Takes the samples that have made their last step out of their slots."""
        for slot, course in enumerate(self._courses):
            if course is None:
                continue
            course.steps_left -= 1
            if course.steps_left == 0:
                x_0 = self._x_t[slot].clone()
                self._finished.append(FinishedSample(course.sample_id, x_0, self.batch_shape))
                self._free(slot)

    def _free(self, slot: int) -> None:
        """Leaves a slot idle."""
        self._courses[slot] = None
        self._position[slot] = self.schedule.num_train_timesteps
        self._stride[slot] = 0


def _check_compiler(device: torch.device | str) -> None:
    compiler = os.environ.get("CXX", "g++")
    if torch.device(device).type == "cpu" and shutil.which(compiler) is None:
        raise InputError(
            f"sampling.compile true needs a C++ compiler, and there is no {compiler}: install one, "
            "or set it to false"
        )
