"""Runs a bundle's engines in a thread of their own: requests join and leave between two steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from raysynth.condition import Condition
from raysynth.config.sampling import SamplerName
from raysynth.diffusion.samplers import step_table
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError, RaysynthError
from raysynth.sampling.draw import BundleSampler, paste_known
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.sampling.planner import NO_SOURCE, PlannedSample

MAX_SLOTS = 64
"""That a request may pin: its engine is made for it."""

CROWD = 2
"""More than so many requests for every slot that wait are a crowd."""

OnStep = Callable[[int, int], None]
"""Is told how many steps are done, and of how many; in the runner's thread, so it must be quick."""

OnPreview = Callable[[int, NDArray[np.int16]], None]
"""Is shown what the sample would be after a step, in HU."""


class Busy(RaysynthError):
    """As many requests wait as may."""


@dataclass
class Ticket:
    """A sample that was asked for.

    Attributes:
        request: what was asked.
        condition: likewise; what it keeps is pasted into the result.
        slots: of the engine that draws it; 0: those that suit best when its turn comes.
        drawn: HU (*spatial), int16, when it is there; cancelled, or the error, if it never is.
        batch_shape: rows of the network calls, by which its bits are reproducible.
        on_step: is told of progress.
        on_preview: is shown previews.
        preview_every: steps between two of them.
    """

    request: SampleRequest
    condition: Condition
    slots: int = 0
    drawn: Future[NDArray[np.int16]] = field(default_factory=Future)
    batch_shape: int = 0
    on_step: OnStep | None = None
    on_preview: OnPreview | None = None
    preview_every: int = 1
    is_previewing: bool = False

    @property
    def is_guided(self) -> bool:
        """Whether its engine evaluates the null condition, too."""
        return self.request.guidance_scale != 1


@dataclass(frozen=True)
class Counts:
    """What a runner has done since it began, and what it holds.

    Attributes:
        steps: network calls.
        rows: samples that took part in them; the rest of their slots were idle.
        finished: samples that were decoded.
        cancelled: samples that were given up.
        step_s: seconds in network calls.
        decode_s: seconds of decoding, of previews too.
        waiting: requests without a slot.
        busy: samples in slots.
        slots: of the engine that takes requests now that pin nothing.
    """

    steps: int = 0
    rows: int = 0
    finished: int = 0
    cancelled: int = 0
    step_s: float = 0.0
    decode_s: float = 0.0
    waiting: int = 0
    busy: int = 0
    slots: int = 0


class Runner:
    """Draws with one bundle for whoever asks.

    Requests of any steps, sampler and guidance share network calls. When a crowd waits, they go to
    an engine of more slots as soon as the other is empty: steps are short while few ask, and
    samples cheap while many do. What is finished is decoded in another thread, so that no step
    waits for it.
    """

    def __init__(
        self, sampler: BundleSampler, max_waiting: int = 64, crowd_slots: int | None = None
    ) -> None:
        """Loads the bundle and starts the thread.

        Args:
            sampler: bundle and sampling settings: slots, and the defaults of requests.
            max_waiting: requests that may wait for a slot; more are refused.
            crowd_slots: slots while a crowd waits; None: as ever.

        Raises:
            InputError: its model draws in one call, and has no steps to join.
        """
        if sampler.bundle.denoiser is None:
            raise InputError(
                f"bundle {sampler.bundle_path} is a {sampler.facts.model.family}: it draws in one "
                "call; serve a diffusion model"
            )
        self.sampler, self.max_waiting = sampler, max_waiting
        self.num_slots = sampler.sampling.batch_size
        self.crowd_slots = crowd_slots or self.num_slots
        self._samplers = {self.num_slots: sampler}
        self._open = {False: self.num_slots, True: self.num_slots}  # by whether they are guided
        self._schedule = NoiseSchedule.from_config(sampler.bundle.diffusion)
        self._counts = Counts(slots=self.num_slots)
        self._waiting: deque[Ticket] = deque()
        self._going: dict[str, Ticket] = {}
        self._finished: deque[tuple[Ticket, torch.Tensor]] = deque()
        self._changed = threading.Condition()
        self._is_closing = self._has_failed = False
        self._decoder = ThreadPoolExecutor(1, "decode")
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._thread.start()

    def submit(
        self,
        sample_id: str,
        seed: int,
        condition: Condition,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        batch_shape: int | None = None,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 1,
    ) -> Ticket:
        """Asks for a sample; it starts as soon as a slot is free.

        Args:
            sample_id: unique among those that are unfinished.
            seed: all its noise follows from it.
            condition: what it should show.
            num_inference_steps: None: the sampling settings'.
            guidance_scale: None: likewise.
            sampler: None: likewise.
            batch_shape: rows of the network calls, for the bits of a sample that was drawn at it.
            on_step: is told of progress.
            on_preview: is shown previews, from the decoder's thread.
            preview_every: steps between two of them.

        Raises:
            Busy: too many wait, or the runner is closing.
            InputError: the request makes no sense to this model.
        """
        sampling = self.sampler.sampling
        scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
        planned = PlannedSample(sample_id, seed, condition, NO_SOURCE)
        (request,) = self.sampler.requests([planned], scale, num_inference_steps, sampler)
        step_table(request.sampler, self._schedule, request.num_inference_steps)
        slots = 0 if batch_shape is None else slots_of(batch_shape, scale)
        ticket = Ticket(
            request,
            condition,
            slots,
            on_step=on_step,
            on_preview=on_preview,
            preview_every=preview_every,
        )
        with self._changed:
            is_ending = self._is_closing or self._has_failed
            if is_ending or len(self._waiting) >= self.max_waiting:
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
    def counts(self) -> Counts:
        """What was done, and what is there."""
        with self._changed:
            return replace(self._counts, waiting=len(self._waiting), busy=len(self._going))

    @property
    def is_alive(self) -> bool:
        """Whether steps are made."""
        return self._thread.is_alive()

    @property
    def is_closing(self) -> bool:
        """Whether it was told to end."""
        return self._is_closing

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
                self._has_failed = True
                lost = [*self._going.values(), *self._waiting]
                self._going.clear()
                self._waiting.clear()
            for ticket in lost:
                if not ticket.drawn.done():
                    ticket.drawn.set_exception(error)

    def _engine(self, slots: int, ticket: Ticket) -> SamplingEngine:
        if slots not in self._samplers:
            self._samplers[slots] = self.sampler.with_slots(slots)
        return self._samplers[slots].engine(ticket.request.guidance_scale)

    def _open_slots(self, *, guided: bool) -> int:
        """Slots of the engine that takes what pins nothing; 0: one of more waits for its end."""
        now = self._open[guided]
        waiting = sum(not one.slots and one.is_guided == guided for one in self._waiting)
        busy = sum(one.slots == now and one.is_guided == guided for one in self._going.values())
        if waiting > CROWD * self.num_slots:
            wanted = self.crowd_slots
        elif waiting + busy <= self.num_slots:
            wanted = self.num_slots
        else:
            wanted = now
        if wanted > now and busy:
            return 0
        self._open[guided] = wanted
        self._counts = replace(self._counts, slots=wanted)
        return wanted

    def _admit(self) -> bool:
        """Drops what was given up and fills free slots; waits for work. False: there is no more."""
        with self._changed:
            while True:
                for ticket in [one for one in self._going.values() if one.drawn.cancelled()]:
                    self._engine(ticket.slots, ticket).abandon(ticket.request.sample_id)
                    del self._going[ticket.request.sample_id]
                    self._count(cancelled=1)
                opened = {guided: self._open_slots(guided=guided) for guided in self._open}
                kept: deque[Ticket] = deque()
                for ticket in self._waiting:
                    slots = ticket.slots or opened[ticket.is_guided]
                    if ticket.drawn.cancelled():
                        self._count(cancelled=1)
                    elif slots and (engine := self._engine(slots, ticket)).admit(ticket.request):
                        ticket.slots, ticket.batch_shape = slots, engine.batch_shape
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
        engines = {
            (one.slots, one.is_guided): self._engine(one.slots, one) for one in self._going.values()
        }
        for engine in engines.values():
            started, busy = time.perf_counter(), engine.num_busy
            engine.step()
            with self._changed:
                self._count(steps=1, rows=busy, step_s=time.perf_counter() - started)
            left = engine.progress()
            for finished in engine.retire():
                with self._changed:
                    ticket = self._going.pop(finished.sample_id)
                self._finished.append((ticket, finished.x_0))
                self._decoder.submit(self._decode)
                _tell(ticket, 0)
            for sample_id, (slot, steps_left) in left.items():
                ticket = self._going[sample_id]
                _tell(ticket, steps_left)
                done = ticket.request.num_inference_steps - steps_left
                if ticket.on_preview is not None and done % ticket.preview_every == 0:
                    self._preview(ticket, done, engine.estimates()[slot])

    def _decode(self) -> None:
        """Decodes what has finished: all of one batch shape that came since the last time."""
        if not self._finished:  # an earlier call took it along
            return
        slots = self._finished[0][0].slots
        some: list[tuple[Ticket, torch.Tensor]] = []
        while self._finished and self._finished[0][0].slots == slots and len(some) < slots:
            ticket, x_0 = self._finished.popleft()
            if ticket.drawn.set_running_or_notify_cancel():
                some.append((ticket, x_0))
        if not some:
            return
        started = time.perf_counter()
        try:
            decoded = self._samplers[slots].decode(torch.stack([x_0 for _, x_0 in some]))
        except Exception as error:
            for ticket, _ in some:
                ticket.drawn.set_exception(error)
            return
        with self._changed:
            self._count(finished=len(some), decode_s=time.perf_counter() - started)
        for (ticket, _), hu in zip(some, decoded, strict=True):
            paste_known(hu, ticket.condition)
            ticket.drawn.set_result(hu)

    def _preview(self, ticket: Ticket, step: int, x_0: torch.Tensor) -> None:
        """Shows a preview, unless the last one is still being made."""
        if ticket.is_previewing:
            return
        ticket.is_previewing, x_0 = True, x_0.clone()

        def show() -> None:
            started = time.perf_counter()
            if not ticket.drawn.done() and ticket.on_preview is not None:
                hu = self._samplers[ticket.slots].decode(x_0[None])[0]
                paste_known(hu, ticket.condition)
                ticket.on_preview(step, hu)
            ticket.is_previewing = False
            with self._changed:
                self._count(decode_s=time.perf_counter() - started)

        self._decoder.submit(show)

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._counts, name) + value for name, value in more.items()}
        self._counts = replace(self._counts, **now)


def slots_of(batch_shape: int, guidance_scale: float) -> int:
    """Slots of the engine whose calls have so many rows.

    Raises:
        InputError: there is no such engine.
    """
    slots, rest = divmod(batch_shape, 1 if guidance_scale == 1 else 2)
    if rest or not 1 <= slots <= MAX_SLOTS:
        raise InputError(
            f"batch_shape {batch_shape}: give 1 to {MAX_SLOTS}; with guidance an even number, up "
            f"to {2 * MAX_SLOTS}"
        )
    return slots


def _tell(ticket: Ticket, steps_left: int) -> None:
    if ticket.on_step is not None:
        total = ticket.request.num_inference_steps
        ticket.on_step(total - steps_left, total)
