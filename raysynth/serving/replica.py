"""A Ray Serve replica: the bundles that are asked for, each with its runner."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from ray import serve
from ray.util.metrics import Counter, Gauge

from raysynth.condition import Condition
from raysynth.config import ExperimentConfig
from raysynth.config.sampling import SamplerName
from raysynth.errors import InputError, RaysynthError
from raysynth.models.bundle import bundle_digest
from raysynth.sampling.curve import Slots, batch_curve, slots_that_pay
from raysynth.sampling.draw import BundleSampler
from raysynth.serving.runner import Counts, Runner, Ticket
from raysynth.serving.tokens import FOLDER

TOLD_EVERY_S = 0.1
"""Progress is no more frequent."""

MAX_LOADED = 4
"""Bundles that a replica holds at a time; a fifth takes the place of the one unused for longest."""

SLOTS_FILE = "slots.json"
"""Below the service's folder: how many slots each bundle has on each kind of device."""

LEVELS = {
    "raysynth_serving_waiting": ("waiting", "Requests without a slot"),
    "raysynth_serving_busy_slots": ("busy", "Samples that are being drawn"),
    "raysynth_serving_slots": ("slots", "Slots"),
}
TOTALS = {
    "raysynth_serving_steps_total": ("steps", "Network calls"),
    "raysynth_serving_rows_total": ("rows", "Samples that took part in network calls"),
    "raysynth_serving_samples_total": ("finished", "Samples that were drawn"),
    "raysynth_serving_cancelled_total": ("cancelled", "Samples that were given up"),
    "raysynth_serving_step_seconds_total": ("step_s", "Time in network calls"),
    "raysynth_serving_decode_seconds_total": ("decode_s", "Time of decoding"),
}
"""What Prometheus sees of every replica, by model: names, fields of `Counts`, descriptions."""


@dataclass(frozen=True)
class Order:
    """What a replica is told of a sample.

    Attributes:
        model: name of the bundle.
        sample_id: unique among those that are unfinished.
        seed: all noise follows from it.
        condition: what it should show.
        sampler: None: the recipe's; so are the next two.
        num_inference_steps: network calls.
        guidance_scale: 1 follows the condition as trained.
        batch_shape: of the network calls; None: the bundle's own.
        preview_every: steps between two previews, where the sample is watched; None: nobody looks.
    """

    model: str
    sample_id: str
    seed: int
    condition: Condition
    sampler: SamplerName | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    batch_shape: int | None = None
    preview_every: int | None = None


class _Loaded:
    """A bundle in memory. Ray Serve ends those that make room by `__del__`, as its manual says."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __del__(self) -> None:
        self.runner.close()


class Replica:
    """Draws for the gateway."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Loads nothing yet: a bundle is loaded when it is asked for."""
        self.config = config
        self.paths = served_bundles(config)
        self._runners: dict[str, Runner] = {}
        self._exported: dict[str, Counts] = {}
        self._gauges = {name: Gauge(name, told, ("model",)) for name, (_, told) in LEVELS.items()}
        self._counters = {
            name: Counter(name, told, ("model",)) for name, (_, told) in TOTALS.items()
        }

    @serve.multiplexed(max_num_models_per_replica=MAX_LOADED)  # type: ignore[untyped-decorator]
    async def load(self, model: str) -> _Loaded:
        """The bundle of that name, with a runner."""
        runner = await asyncio.to_thread(self._make_runner, model)
        self._runners[model] = runner
        return _Loaded(runner)

    async def draw(self, order: Order) -> dict[str, Any]:
        """A sample, as `hu` and `batch_shape`; whoever stops waiting gives it up."""
        runner = (await self.load(order.model)).runner
        ticket = self._submit(runner, order)
        try:
            hu = await asyncio.wrap_future(ticket.drawn)
            return {"hu": hu, "batch_shape": ticket.batch_shape}
        finally:
            runner.cancel(ticket)

    async def watch(self, order: Order) -> AsyncIterator[dict[str, Any]]:
        """Progress of a sample, and at last itself; whoever stops listening gives it up.

        Yields:
            `step` and `num_steps`; `preview` and its `step`; the last one `hu` and `batch_shape`.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
        last_told = 0.0

        def tell(what: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(news.put_nowait, what)

        def on_step(step: int, num_steps: int) -> None:
            nonlocal last_told
            if (now := time.monotonic()) - last_told >= TOLD_EVERY_S:
                last_told = now
                tell({"step": step, "num_steps": num_steps})

        def on_preview(step: int, hu: NDArray[np.int16]) -> None:
            tell({"preview": hu, "step": step})

        runner = (await self.load(order.model)).runner
        every = order.preview_every
        ticket = self._submit(
            runner,
            order,
            on_step=on_step,
            on_preview=on_preview if every else None,
            preview_every=every or 1,
        )
        ticket.drawn.add_done_callback(lambda _: tell(None))
        try:
            while (one := await news.get()) is not None:
                yield one
            yield {"hu": ticket.drawn.result(), "batch_shape": ticket.batch_shape}
        finally:
            runner.cancel(ticket)

    def _submit(self, runner: Runner, order: Order, **watch: Any) -> Ticket:
        return runner.submit(
            order.sample_id,
            order.seed,
            order.condition,
            num_inference_steps=order.num_inference_steps,
            guidance_scale=order.guidance_scale,
            sampler=order.sampler,
            batch_shape=order.batch_shape,
            **watch,
        )

    def check_health(self) -> None:
        """Ray starts a replica anew whose thread has ended; and counts are exported meanwhile."""
        self._export()
        # Those that made room are kept by nobody.
        self._runners = {
            model: runner for model, runner in self._runners.items() if not runner.is_closing
        }
        if not all(runner.is_alive for runner in self._runners.values()):
            raise RaysynthError("no steps are made any more")

    def _make_runner(self, model: str) -> Runner:
        config = self.config
        sampler = BundleSampler(self.paths[model], config.sampling, config.seed)
        slots = self._slots(sampler)
        return Runner(sampler.with_slots(slots.few), config.serving.max_waiting, slots.many)

    def _slots(self, sampler: BundleSampler) -> Slots:
        """As many as pay, measured once: replicas are alike, and those that come back, too."""
        place = service_folder(self.config) / SLOTS_FILE
        device = "cpu" if sampler.device.type == "cpu" else torch.cuda.get_device_name()
        sampling = sampler.sampling
        digest = bundle_digest(sampler.bundle_path)
        key = f"{digest[:16]} {device} {sampling.threads_per_actor} {sampling.batch_size}"
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            known = json.loads(place.read_text()) if place.exists() else {}
            if "few" not in known.get(key, {}):
                curve = batch_curve(sampler, sampling.batch_size)
                slots = asdict(slots_that_pay(curve))
                known[key] = slots | {"seconds_a_sample_step": curve}
                place.write_text(json.dumps(known, indent=1))
        return Slots(known[key]["few"], known[key]["many"])

    def _export(self) -> None:
        for model, runner in self._runners.items():
            now, labels = runner.counts, {"model": model}
            before = self._exported.get(model, Counts())
            for name, (field, _) in LEVELS.items():
                self._gauges[name].set(getattr(now, field), labels)
            for name, (field, _) in TOTALS.items():
                if (more := getattr(now, field) - getattr(before, field)) > 0:
                    self._counters[name].inc(more, labels)
            self._exported[model] = now


def served_bundles(config: ExperimentConfig) -> dict[str, Path]:
    """The folders of the bundles that a recipe serves, by their names; its own comes first.

    Raises:
        InputError: two of one name.
    """
    paths = (config.bundle_path, *config.serving.bundles)
    found = {path.name: path for path in paths}
    if len(found) < len(paths):
        names = ", ".join(path.name for path in paths)
        raise InputError(f"serving.bundles: names must differ, and these are {names}")
    return found


def service_folder(config: ExperimentConfig) -> Path:
    """Where the service of a recipe keeps what must outlive it."""
    return config.work_dir / FOLDER
