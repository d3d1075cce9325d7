"""A Ray Serve replica: one bundle, one runner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from raysynth.condition import Condition
from raysynth.config import SamplingConfig
from raysynth.errors import RaysynthError
from raysynth.sampling.draw import BundleSampler
from raysynth.serving.runner import Runner


class Replica:
    """Draws for the gateway."""

    def __init__(
        self, bundle_path: Path, sampling: SamplingConfig, seed: int, max_waiting: int
    ) -> None:
        """Loads the bundle."""
        self.runner = Runner(BundleSampler(bundle_path, sampling, seed), max_waiting)

    async def draw(
        self,
        sample_id: str,
        seed: int,
        condition: Condition,
        num_inference_steps: int | None,
        guidance_scale: float | None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Progress of a sample, and at last itself; whoever stops listening gives it up.

        Yields:
            `step` and `num_steps`; the last one `hu` and `batch_shape`.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int] | None]()

        def tell(what: tuple[int, int] | None) -> None:
            loop.call_soon_threadsafe(news.put_nowait, what)

        ticket = self.runner.submit(
            sample_id,
            seed,
            condition,
            on_step=lambda *step: tell(step),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        ticket.drawn.add_done_callback(lambda _: tell(None))
        try:
            while (step := await news.get()) is not None:
                yield {"step": step[0], "num_steps": step[1]}
            yield {"hu": ticket.drawn.result(), "batch_shape": ticket.batch_shape}
        finally:
            self.runner.cancel(ticket)

    def check_health(self) -> None:
        """Ray starts a replica anew whose thread has ended."""
        if not self.runner.is_alive:
            raise RaysynthError("no steps are made any more")
