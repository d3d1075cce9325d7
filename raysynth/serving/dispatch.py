"""From a request to a drawn sample: checks, an order to a replica, and another if it is lost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from raysynth import __version__
from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.config import Diffusion, ExperimentConfig
from raysynth.config.model import InpaintingConfig, LatentDiffusionConfig, TextGuided, hears_scores
from raysynth.config.sampling import SamplerName
from raysynth.errors import InputError
from raysynth.export.passport import voxel_hash
from raysynth.models.bundle import CARD, bundle_digest, read_facts
from raysynth.models.facts import BundleFacts
from raysynth.prompt import WORDS
from raysynth.sampling.adherence import NODULE_LUNG_LABELS, find_nodule, requested_diameter_mm
from raysynth.serving.api import LOST
from raysynth.serving.replica import Order, served_bundles
from raysynth.serving.runner import Busy, slots_of
from raysynth.serving.schemas import (
    MAX_SEED,
    ModelOut,
    Part,
    ReadUpload,
    SampleIn,
    condition_from,
    spacing_of,
)

MAX_TRIES = 5
"""Of one sample, where replicas are lost."""

RETRY_S = 2.0

News = Callable[[dict[str, Any]], None]
"""Is told `step` and `num_steps`, or `preview` and `step`."""

Drawn = tuple[NDArray[np.int16], int]
"""HU, and the batch shape."""


class Dispatcher:
    """Knows the served models, checks what is asked of them, and has it drawn."""

    def __init__(self, replicas: DeploymentHandle[Any], config: ExperimentConfig) -> None:
        """Reads what the bundles say.

        Args:
            replicas: of `Replica`.
            config: the recipe.
        """
        self.config = config
        self._replicas = replicas
        self.paths = served_bundles(config)
        self.facts = {name: read_facts(path) for name, path in self.paths.items()}
        self.digests = {name: bundle_digest(path) for name, path in self.paths.items()}
        self.default = next(iter(self.paths))

    def models(self) -> list[ModelOut]:
        """The served models, with their cards."""
        found = []
        for name, facts in self.facts.items():
            depth_mm, pixel_mm = spacing_of(facts)
            found.append(
                ModelOut(
                    name=name,
                    family=facts.model.family,
                    digest=self.digests[name],
                    shape=facts.samples.shape,
                    pixel_mm=pixel_mm,
                    depth_mm=depth_mm,
                    window_hu=facts.window_hu,
                    intensity=facts.intensity,
                    card=(self.paths[name] / CARD).read_text(encoding="utf-8"),
                    **self._limits(facts),
                )
            )
        return found

    def _limits(self, facts: BundleFacts) -> dict[str, Any]:
        """What may be asked of a model, and what it is where nothing is asked."""
        model, sampling = facts.model, self.config.sampling
        assert isinstance(model, Diffusion)
        samplers = list(get_args(SamplerName))
        if model.schedule == "rectified_flow":
            samplers.remove("ddpm")
        return {
            "hears": heard_parts(model),
            "words": {name: [said for said, *_ in WORDS[name]] for name in CONDITION_ATTRIBUTES},
            "sampler": sampling.sampler,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "samplers": samplers,
            "max_steps": min(self.config.serving.max_steps, model.num_train_timesteps),
            "can_guide": model.condition_drop > 0,
        }

    def facts_of(self, body: SampleIn) -> BundleFacts:
        """Of the model that a request is for.

        Raises:
            InputError: there is none of that name.
        """
        return self.facts[self._model(body)]

    def seeded(self, body: SampleIn) -> SampleIn:
        """The request with a seed."""
        if body.seed is not None:
            return body
        return body.model_copy(update={"seed": secrets.randbelow(MAX_SEED)})

    def order(
        self,
        sample_id: str,
        body: SampleIn,
        read_upload: ReadUpload,
        preview_every: int | None = None,
    ) -> Order:
        """What a replica is told. Nothing that is refused reaches one.

        Raises:
            InputError: the request makes no sense to its model; the first word is the field.
        """
        assert body.seed is not None
        name = self._model(body)
        facts, steps = self.facts[name], body.num_inference_steps
        model = facts.model
        assert isinstance(model, Diffusion)
        most = min(self.config.serving.max_steps, model.num_train_timesteps)
        if steps is not None and steps > most:
            raise InputError(f"num_inference_steps {steps}: give {most} at most")
        if body.guidance_scale not in (None, 1) and not model.condition_drop:
            raise InputError(
                f"guidance_scale {body.guidance_scale}: this model never learned what no condition "
                "looks like; leave it out"
            )
        if body.sampler == "ddpm" and model.schedule == "rectified_flow":
            raise InputError("sampler ddpm: this model draws with ddim, dpm_solver++ or unipc")
        if body.batch_shape is not None:
            own = self.config.sampling.guidance_scale
            slots_of(body.batch_shape, own if body.guidance_scale is None else body.guidance_scale)
        return Order(
            model=name,
            sample_id=sample_id,
            seed=body.seed,
            condition=condition_from(body, facts, read_upload),
            sampler=body.sampler,
            num_inference_steps=steps,
            guidance_scale=body.guidance_scale,
            batch_shape=body.batch_shape,
            preview_every=preview_every,
        )

    async def draw(self, order: Order, on_news: News | None = None) -> Drawn:
        """Draws a sample; where a replica is lost another draws it again, from its seed.

        Raises:
            Busy: no replica has room.
            InputError: the model refuses.
        """
        handle = self._replicas.options(multiplexed_model_id=order.model)
        for left in reversed(range(MAX_TRIES)):
            answer: Any  # of a stream, only where somebody listens: it costs milliseconds
            if on_news is None:
                answer = handle.draw.remote(order)
            else:
                answer = handle.options(stream=True).watch.remote(order)
            try:
                drawn = await (answer if on_news is None else _last(answer, on_news))
                return drawn["hu"], drawn["batch_shape"]
            except asyncio.CancelledError:
                answer.cancel()
                raise
            except LOST:
                if not left:
                    raise
                await asyncio.sleep(RETRY_S)
        raise AssertionError("the last try has returned or raised")

    async def draw_at_last(self, order: Order, on_news: News | None = None) -> Drawn:
        """As `draw`, but waits for room: what was accepted is drawn."""
        while True:
            try:
                return await self.draw(order, on_news)
            except Busy:
                await asyncio.sleep(RETRY_S)

    def about(self, order: Order, batch_shape: int) -> dict[str, object]:
        """What a result says of itself."""
        facts, asked = self.facts[order.model], order.condition
        depth_mm, pixel_mm = spacing_of(facts)
        known, layout = asked.known_mask, asked.layout
        return {
            "synthetic": True,
            "model": order.model,
            "bundle": self.digests[order.model],
            "seed": order.seed,
            "batch_shape": batch_shape,
            "pixel_mm": pixel_mm,
            "depth_mm": depth_mm,
            "window_hu": facts.window_hu,
            "intensity": facts.intensity,
            "copied_fraction": 0.0 if known is None else float(known.mean()),
            "snapshot": facts.snapshot,
            "layout": None if layout is None else voxel_hash(layout),
            "request": {
                "box": asked.box,
                "attributes": asked.attributes,
                "prompt": asked.text,
                "sampler": order.sampler,
                "num_inference_steps": order.num_inference_steps,
                "guidance_scale": order.guidance_scale,
            },
            "raysynth": __version__,
        }

    def adherence(self, order: Order, hu: NDArray[np.int16]) -> dict[str, Any] | None:
        """What stands where a nodule was asked for; None: none was, or grey values have no unit."""
        facts, layout, box = self.facts[order.model], order.condition.layout, order.condition.box
        if box is None or facts.intensity != "hu":
            return None
        pixel_mm = float(facts.samples.pixel_mm)
        lung = None if layout is None else np.isin(layout, NODULE_LUNG_LABELS)
        shown = np.zeros(hu.shape, np.uint8) if layout is None else layout
        measured = find_nodule(hu, lung, box, pixel_mm)
        stands_out = measured.mask is not None
        return {
            "found": measured.found,
            "requested_diameter_mm": requested_diameter_mm(shown, box, pixel_mm),
            "diameter_mm": measured.diameter_mm if stands_out else None,
            "offset_mm": measured.offset_mm if stands_out else None,
            "mean_hu": float(hu[measured.mask].mean()) if stands_out else None,
            "contrast_hu": measured.contrast_hu,
        }

    def _model(self, body: SampleIn) -> str:
        name = body.model or self.default
        if name not in self.paths:
            raise InputError(f"model {name}: give {', '.join(self.paths)}")
        return name


def heard_parts(model: Diffusion) -> list[Part]:
    """What of a request a model follows; every one draws anew what of a reference it is told."""
    scores: list[Part] = ["attributes"] if hears_scores(model) else []
    if isinstance(model, TextGuided):
        return ["prompt", "reference"]
    if isinstance(model, InpaintingConfig):
        return ["reference"]
    if isinstance(model, LatentDiffusionConfig):
        layout: list[Part] = ["layout"] if model.conditioning == 4 else []
        return ["box", *scores, *layout, "reference"]
    return [*scores, "layout", "reference"]


async def _last(watching: Any, on_news: News) -> dict[str, Any]:
    """The sample, which a replica tells after its progress."""
    async for one in watching:
        if "hu" in one:
            drawn: dict[str, Any] = one
            return drawn
        on_news(one)
    raise Busy("no replica drew this: try again later")
