"""A bundle ready to draw slices or volumes: requests in, HU and measurements out. No Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raysynth.condition import Condition, check_condition
from raysynth.config import Diffusion, LayoutGuided, SamplingConfig
from raysynth.config.sampling import SamplerName
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError
from raysynth.layout.holes import layout_hole
from raysynth.models.bundle import Bundle, load_bundle, read_facts
from raysynth.models.conditioner import collate
from raysynth.models.denoiser import Denoiser, build_denoiser
from raysynth.models.facts import BundleFacts
from raysynth.models.gan import Generator, build_generator
from raysynth.sampling.adherence import (
    NODULE_LUNG_LABELS,
    Measurement,
    count_unrequested,
    find_nodule,
)
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.sampling.planner import PlannedSample
from raysynth.sampling.tiles import TiledDenoiser
from raysynth.seeding import seed_of
from raysynth.window import denormalize, measurable

MAX_DECODED = 8
"""Samples that a GPU decodes at a time."""


class BundleSampler:
    """Draws planned samples with one bundle under one set of sampling settings.

    Networks and decoder run at one batch shape each, so that a sample's bits follow from its plan
    alone.
    """

    def __init__(
        self, bundle_path: Path, sampling: SamplingConfig, seed: int, size: int | None = None
    ) -> None:
        """Reads what the bundle says; its networks are loaded when something is drawn.

        Args:
            bundle_path: the bundle of a diffusion model or a GAN.
            sampling: sampler, steps, guidance and slots.
            seed: of the recipe; an untrained network's weights follow from it.
            size: pixels along a sample's side; None: as those that the model was trained on.
                Larger ones are drawn in tiles, see `check_size`.

        Raises:
            InputError: no bundle there, or one of an autoencoder or extractor, or a size that its
                model cannot draw.
        """
        self.sampling = sampling
        self.seed = seed
        self.device = torch.device("cuda" if sampling.use_gpu else "cpu")
        if not sampling.use_gpu:
            torch.set_num_threads(sampling.threads_per_actor)
        self.bundle_path = bundle_path
        self.facts = read_facts(bundle_path)
        if not self.facts.draws:
            raise InputError(
                f"bundle {bundle_path} is a {self.facts.model.family}, which draws nothing by "
                "itself: give that of a diffusion model or a GAN"
            )
        self.size = self.facts.samples.size if size is None else size
        check_size(self.facts, self.size)
        self._engines: dict[tuple[bool, bool], SamplingEngine] = {}
        self._generators: dict[bool, Generator] = {}

    @cached_property
    def bundle(self) -> Bundle:
        """The bundle with its networks."""
        return load_bundle(self.bundle_path)

    def with_slots(self, count: int) -> BundleSampler:
        """The same bundle, its networks shared, at another batch shape."""
        if count == self.sampling.batch_size:
            return self
        sampling = self.sampling.model_copy(update={"batch_size": count})
        other = BundleSampler(self.bundle_path, sampling, self.seed, self.size)
        other.bundle = self.bundle
        return other

    def batch_shape(self, guidance_scale: float) -> int:
        """Rows of every network call at that scale, by which a sample is reproducible."""
        if self.bundle.generator is not None:
            return self.sampling.batch_size
        return self.engine(guidance_scale).batch_shape

    def draw(
        self,
        planned: Sequence[PlannedSample],
        *,
        untrained: bool = False,
        guidance_scale: float | None = None,
    ) -> NDArray[np.int16]:
        """HU of planned samples, (n, *spatial), in their order.

        Args:
            planned: what to draw.
            untrained: draw with fresh weights instead, as a control.
            guidance_scale: instead of the one of the sampling settings.

        Raises:
            InputError: a request or the scale makes no sense; nothing has been loaded then.
        """
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        requests = self.requests(planned, scale)
        if self.bundle.generator is not None:
            hu = self._generate(planned, untrained)
        else:
            row = {one.sample_id: number for number, one in enumerate(planned)}
            drawn: list[torch.Tensor] = [torch.empty(0)] * len(planned)
            for finished in self.engine(scale, untrained).run(requests):
                drawn[row[finished.sample_id]] = finished.x_0
            hu = self.decode(torch.stack(drawn))
        for image, one in zip(hu, planned, strict=True):
            paste_known(image, one.condition)
        return hu

    def draw_until_found(
        self, planned: Sequence[PlannedSample]
    ) -> tuple[NDArray[np.int16], list[Measurement], NDArray[np.uint8]]:
        """Draws samples, and those without the nodule asked for again, with other noise.

        None is drawn more than `sampling.max_draws` times; the last draw stays.

        Returns:
            HU (n, *spatial), what was measured, and how often each was drawn.
        """
        hu = self.draw(planned)
        measured = self.measure(hu, planned)
        draws = np.ones(len(planned), np.uint8)
        for count in range(2, self.sampling.max_draws + 1):
            missed = [
                row
                for row, (one, found) in enumerate(zip(planned, measured, strict=True))
                if one.condition.box is not None and not found.found
            ]
            if not missed:
                break
            again = [planned[row].redrawn(count) for row in missed]
            images = self.draw(again)
            hu[missed], draws[missed] = images, count
            for row, found in zip(missed, self.measure(images, again), strict=True):
                measured[row] = found
        return hu, measured, draws

    def count_unrequested(
        self, hu: NDArray[np.int16], layout: NDArray[np.uint8], asked: Sequence[PlannedSample]
    ) -> NDArray[np.uint8]:
        """Compact dense things in the lungs of every sample that were not asked for, (n,)."""
        shown = measurable(hu, self.bundle.intensity)
        counts = [
            count_unrequested(image, labels, one.condition.box, self.bundle.samples.pixel_mm)
            for image, labels, one in zip(shown, layout, asked, strict=True)
        ]
        return np.minimum(counts, 255).astype(np.uint8)

    def denoising(
        self, planned: PlannedSample, num_frames: int
    ) -> tuple[list[int], NDArray[np.int16]]:
        """How one sample emerges.

        Returns:
            Evenly spread steps, and the estimates of the finished sample after them, (frames,
            *spatial).
        """
        scale = self.sampling.guidance_scale
        (request,) = self.requests([planned], scale)
        engine = self.engine(scale)
        steps = self.sampling.num_inference_steps
        shown = np.linspace(1, steps, min(num_frames, steps)).round().astype(int).tolist()
        engine.admit(request)
        frames = []
        for step in range(1, steps + 1):
            engine.step()
            if step in shown:
                frames.append(engine.estimates()[0].clone())
        engine.retire()
        hu = self.decode(torch.stack(frames))
        for image in hu:
            paste_known(image, planned.condition)
        return shown, hu

    def measure(self, hu: NDArray[np.int16], asked: Sequence[PlannedSample]) -> list[Measurement]:
        """Looks in every sample for the nodule that was asked for; without one, for nothing.

        Of images without Hounsfield units no contrast is told.
        """
        pixel_mm, intensity = self.bundle.samples.pixel_mm, self.bundle.intensity
        measurements = []
        for image, one in zip(measurable(hu, intensity), asked, strict=True):
            layout, box = one.condition.layout, one.condition.box
            if box is None:
                measurements.append(Measurement(False, np.nan, np.nan, np.nan))
                continue
            lung = None if layout is None else np.isin(layout, NODULE_LUNG_LABELS)
            found = find_nodule(image, lung, box, pixel_mm)
            measurements.append(
                found if intensity == "hu" else replace(found, contrast_hu=float("nan"))
            )
        return measurements

    def requests(
        self,
        planned: Iterable[PlannedSample],
        guidance_scale: float,
        num_inference_steps: int | None = None,
        sampler: SamplerName | None = None,
    ) -> list[SampleRequest]:
        """Requests to the engine, checked before anything is loaded.

        Args:
            planned: what to draw.
            guidance_scale: of all.
            num_inference_steps: of all; None: the sampling settings'.
            sampler: likewise.

        Raises:
            InputError: one makes no sense, or not to this model.
        """
        model = self.facts.model
        requests = []
        for one in planned:
            annotated = one.lent is not None and one.lent.keeps_nodules
            inside_lung = self.sampling.prior == "joint" and not annotated
            check_condition(
                one.condition, self.size, self.facts.spatial_dims, inside_lung=inside_lung
            )
            if isinstance(model, LayoutGuided):
                _check_layout(one, model.layout_labels)
            requests.append(
                SampleRequest(
                    one.sample_id,
                    one.seed,
                    one.condition,
                    sampler or self.sampling.sampler,
                    num_inference_steps or self.sampling.num_inference_steps,
                    guidance_scale,
                )
            )
        return requests

    @torch.inference_mode()
    def _generate(self, planned: Sequence[PlannedSample], untrained: bool) -> NDArray[np.int16]:
        """One call of a GAN's generator for each batch, padded to its fixed shape."""
        bundle, size = self.bundle, self.sampling.batch_size
        generator = self._generator(untrained)
        images = []
        for start in range(0, len(planned), size):
            conditions = [one.condition for one in planned[start : start + size]]
            idle = [Condition()] * (size - len(conditions))
            batch = collate(
                [*conditions, *idle], bundle.samples.size, bundle.facts.spatial_dims
            ).to(self.device)
            made = generator(generator.encode(batch))
            images.append(made[: len(conditions), 0].float().cpu().numpy())
        return denormalize(np.concatenate(images), bundle.window_hu)

    @torch.inference_mode()
    def decode(self, x_0: torch.Tensor) -> NDArray[np.int16]:
        """HU (n, *spatial) of what an engine has drawn, at one batch shape.

        One image fills a core, so that nothing is gained by several; idle rows cost what others do.
        """
        size = 1 if self.device.type == "cpu" else min(self.sampling.batch_size, MAX_DECODED)
        images = []
        for start in range(0, len(x_0), size):
            batch = x_0[start : start + size]
            padded = torch.zeros(size, *batch.shape[1:], device=self.device)
            padded[: len(batch)] = batch
            decoded = self.bundle.space.images(padded)
            images.append(decoded[: len(batch), 0].float().cpu().numpy())
        return denormalize(np.concatenate(images), self.bundle.window_hu)

    def _generator(self, untrained: bool) -> Generator:
        if untrained not in self._generators:
            bundle = self.bundle
            made = _fresh_generator(bundle, self.seed) if untrained else bundle.generator
            assert made is not None
            self._generators[untrained] = made.to(self.device).eval()
        return self._generators[untrained]

    def engine(self, guidance_scale: float, untrained: bool = False) -> SamplingEngine:
        """The engine that draws at a scale: guided but at 1.

        Args:
            guidance_scale: of its requests.
            untrained: with fresh weights instead, as a control.
        """
        guided = guidance_scale != 1  # at 1 the null condition has no say
        if (guided, untrained) not in self._engines:
            self._engines[guided, untrained] = self._make_engine(guided, untrained)
        return self._engines[guided, untrained]

    def _make_engine(self, guided: bool, untrained: bool) -> SamplingEngine:
        bundle = self.bundle
        denoiser = _fresh(bundle, self.seed) if untrained else bundle.denoiser
        assert denoiser is not None
        config, latent_shape = bundle.diffusion, bundle.latent_shape
        if self.size != bundle.samples.size:
            channels, cells, *_ = latent_shape
            count = cells * self.size // bundle.samples.size
            latent_shape = (channels, *(count,) * self.facts.spatial_dims)
            denoiser = TiledDenoiser(denoiser, bundle.samples.size, cells, latent_shape[1:])
        return SamplingEngine(
            denoiser,
            NoiseSchedule.from_config(config),
            config.prediction_type,
            latent_shape,
            self.size,
            self.sampling.batch_size,
            space=bundle.space,
            feather_px=self.sampling.feather_px,
            guided=guided,
            compiled=self.sampling.compile,
            device=self.device,
        )


def check_size(facts: BundleFacts, size: int) -> None:
    """Refuses samples of a size that a bundle cannot draw.

    Models that are told of layouts draw larger ones than they were trained on, tile by tile.

    Raises:
        InputError: says which sizes it can.
    """
    own = facts.samples.size
    if size == own:
        return
    in_tiles = isinstance(facts.model, LayoutGuided) and isinstance(facts.model, Diffusion)
    if not in_tiles:
        raise InputError(
            f"samples of {size} pixels a side, and a {facts.model.family} draws those that it was "
            f"trained on, {own}: use such a sample set"
        )
    cell = own // facts.latent_shape[1]
    if size < own or size % cell:
        raise InputError(
            f"samples of {size} pixels a side: a model trained on {own} draws {own} or more, in "
            f"steps of {cell}"
        )


def _check_layout(planned: PlannedSample, organs: tuple[str, ...]) -> None:
    layout = planned.condition.layout
    if layout is None or not layout_hole(layout, organs).any():
        raise InputError(
            f"the layout of sample {planned.sample_id} shows no {' or '.join(organs)}, and this "
            "model is told of nothing else: ask for one that does"
        )


def paste_known(hu: NDArray[np.int16], condition: Condition) -> None:
    """Puts the known pixels back as they were: windows clip, and round to whole HU."""
    if condition.known_mask is not None and condition.known_hu is not None:
        np.copyto(hu, condition.known_hu, where=condition.known_mask)


def _fresh(bundle: Bundle, seed: int) -> Denoiser:
    """The bundle's network before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("untrained", seed))
        channels, size, *axes = bundle.latent_shape
        return build_denoiser(
            bundle.diffusion, channels, size, bundle.tokenizer, spatial_dims=1 + len(axes)
        )


def _fresh_generator(bundle: Bundle, seed: int) -> Generator:
    """The bundle's generator before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("untrained", seed))
        return build_generator(bundle.gan, bundle.samples.size, bundle.facts.spatial_dims)
