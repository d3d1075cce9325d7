"""Runs a bundle's engines in a thread of their own: requests join and leave between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raysynth.condition import Condition
from raysynth.diffusion.samplers import step_table
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError, RaysynthError
from raysynth.sampling.draw import BundleSampler, paste_known
from raysynth.sampling.engine import FinishedSample, SampleRequest
from raysynth.sampling.planner import NO_SOURCE, PlannedSample

OnStep = Callable[[int, int], None]
"""Is told how many steps are done, and of how many; in the runner's thread, so it must be quick."""


class Busy(RaysynthError):
    """As many requests wait as may."""


@dataclass
class Ticket:
    """A sample that was asked for.

    Attributes:
        request: what was asked.
        condition: likewise; what it keeps is pasted into the result.
        drawn: HU (*spatial), int16, when it is there; cancelled, or the error, if it never is.
        batch_shape: rows of the network calls, by which its bits are reproducible; 0 before.
        on_step: is told of progress.
    """

    request: SampleRequest
    condition: Condition
    drawn: Future[NDArray[np.int16]] = field(default_factory=Future)
    batch_shape: int = 0
    on_step: OnStep | None = None


class Runner:
    """Draws with one bundle for whoever asks.

    Requests of any steps, sampler and guidance share network calls. What is finished is decoded in
    another thread, so that no step waits for it.
    """

    def __init__(self, sampler: BundleSampler, max_waiting: int = 64) -> None:
        """Loads the bundle and starts the thread.

        Args:
            sampler: bundle and sampling settings: slots, and the defaults of requests.
            max_waiting: requests that may wait for a slot; more are refused.

        Raises:
            InputError: its model draws in one call, and has no steps to join.
        """
        if sampler.bundle.denoiser is None:
            raise InputError(
                f"bundle {sampler.bundle_path} is a {sampler.facts.model.family}: it draws in one "
                "call; serve a diffusion model"
            )
        self.sampler, self.max_waiting = sampler, max_waiting
        self._schedule = NoiseSchedule.from_config(sampler.bundle.diffusion)
        self.num_steps = 0
        self._waiting: deque[Ticket] = deque()
        self._going: dict[str, Ticket] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._decoder = ThreadPoolExecutor(1, "decode")
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def submit(
        self,
        sample_id: str,
        seed: int,
        condition: Condition,
        *,
        on_step: OnStep | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Ticket:
        """Asks for a sample; it starts as soon as a slot is free.

        Args:
            sample_id: unique among those that are unfinished.
            seed: all its noise follows from it.
            condition: what it should show.
            on_step: is told of progress.
            num_inference_steps: None: the sampling settings'.
            guidance_scale: None: likewise.

        Raises:
            Busy: too many wait, or the runner is closing.
            InputError: the request makes no sense to this model.
        """
        sampling = self.sampler.sampling
        scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
        planned = PlannedSample(sample_id, seed, condition, NO_SOURCE)
        (request,) = self.sampler.requests([planned], scale, num_inference_steps)
        step_table(request.sampler, self._schedule, request.num_inference_steps)
        ticket = Ticket(request, condition, on_step=on_step)
        with self._changed:
            if self._is_closing or len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests wait already: try again later")
            if sample_id in self._going or any(
                one.request.sample_id == sample_id for one in self._waiting
            ):
                raise InputError(f"sample {sample_id} is being drawn already")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Gives a sample up; its slot is free before the next step. Finished ones stay."""
        ticket.drawn.cancel()
        with self._changed:
            self._changed.notify()

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or are being drawn."""
        with self._changed:
            return len(self._waiting) + len(self._going)

    @property
    def is_alive(self) -> bool:
        """Whether steps are made."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Refuses what is new, finishes what is there, and ends the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self._decoder.shutdown()

    def _run(self) -> None:
        try:
            while self._admit():
                self._step()
        except Exception as error:  # nobody would hear of it: who waits must
            with self._changed:
                self._is_closing = True
                lost = [*self._going.values(), *self._waiting]
                self._going.clear()
                self._waiting.clear()
            for ticket in lost:
                if not ticket.drawn.done():
                    ticket.drawn.set_exception(error)

    def _admit(self) -> bool:
        """Drops what was given up and fills free slots; waits for work. False: there is no more."""
        with self._changed:
            while True:
                for ticket in [one for one in self._going.values() if one.drawn.cancelled()]:
                    self.sampler.engine(ticket.request.guidance_scale).abandon(
                        ticket.request.sample_id
                    )
                    del self._going[ticket.request.sample_id]
                kept: deque[Ticket] = deque()
                for ticket in self._waiting:
                    if ticket.drawn.cancelled():
                        continue
                    engine = self.sampler.engine(ticket.request.guidance_scale)
                    if engine.admit(ticket.request):
                        ticket.batch_shape = engine.batch_shape
                        self._going[ticket.request.sample_id] = ticket
                    else:
                        kept.append(ticket)
                self._waiting = kept
                if self._going:
                    return True
                if self._is_closing:
                    return False
                self._changed.wait()

    def _step(self) -> None:
        """One step of every engine that has work."""
        scales = {
            one.request.guidance_scale != 1: one.request.guidance_scale
            for one in self._going.values()
        }
        for scale in scales.values():
            engine = self.sampler.engine(scale)
            engine.step()
            self.num_steps += 1
            left = engine.progress()
            for finished in engine.retire():
                with self._changed:
                    ticket = self._going.pop(finished.sample_id)
                self._decoder.submit(self._decode, ticket, finished)
                _tell(ticket, 0)
            for sample_id, (_, steps_left) in left.items():
                _tell(self._going[sample_id], steps_left)

    def _decode(self, ticket: Ticket, finished: FinishedSample) -> None:
        if not ticket.drawn.set_running_or_notify_cancel():
            return
        try:
            hu = self.sampler.decode(finished.x_0[None])[0]
            paste_known(hu, ticket.condition)
            ticket.drawn.set_result(hu)
        except Exception as error:
            ticket.drawn.set_exception(error)


def _tell(ticket: Ticket, steps_left: int) -> None:
    if ticket.on_step is not None:
        total = ticket.request.num_inference_steps
        ticket.on_step(total - steps_left, total)
