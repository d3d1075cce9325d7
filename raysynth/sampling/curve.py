"""How much a network gains by drawing several samples in one call, and so how many slots pay."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.engine import SamplingEngine

ROUNDS = 5
"""Each batch is timed so often, in turn, after one step that is not; the shortest time counts."""

LONG_S = 2.0
"""A step that takes so long fills the device: larger batches are not tried."""

USUAL_LOAD = 0.3
"""Of what the cheapest batch can do: where answers should be quick."""

CROWDED = 1.3
"""And batches for crowds must gain so much over that to be worth their longer steps."""

WORTH = 1.05
"""Of batches for crowds, the smallest within so much of the cheapest is taken."""


@dataclass(frozen=True)
class Slots:
    """How many samples share a network call.

    Attributes:
        few: while few wait: short steps.
        many: while a crowd waits: cheap samples; the same where that gains little.
    """

    few: int
    many: int


def batch_curve(sampler: BundleSampler, most: int) -> dict[int, float]:
    """Seconds of a step by sample, at 1, 2, 4, ... slots.

    Idle slots cost what busy ones do, so nothing needs to be drawn. The network is not compiled
    for this: that would take a minute for each batch.

    Args:
        sampler: of a diffusion model.
        most: slots.
    """
    sampling = sampler.sampling.model_copy(update={"compile": False})
    one = BundleSampler(sampler.bundle_path, sampling, sampler.seed, sampler.size)
    one.bundle = sampler.bundle
    engines: dict[int, SamplingEngine] = {}
    slots = 1
    while slots <= most:
        engines[slots] = one.with_slots(slots).engine(guidance_scale=1)
        if _seconds(engines[slots]) > LONG_S:
            break
        slots *= 2
    rounds = [[_seconds(engine) for engine in engines.values()] for _ in range(ROUNDS)]
    shortest = map(min, zip(*rounds, strict=True))
    return {slots: seconds / slots for slots, seconds in zip(engines, shortest, strict=True)}


def slots_that_pay(curve: dict[int, float]) -> Slots:
    """How many slots to have, by a batch curve.

    While few wait, as many as answer soonest at `USUAL_LOAD`: more slots make every step longer,
    fewer let requests queue. A network that fills the device with one sample gets one slot.
    """
    cheapest = min(curve.values())
    few = min(curve, key=lambda slots: _response(slots, curve[slots], cheapest / USUAL_LOAD))
    many = min(slots for slots, seconds in curve.items() if seconds <= WORTH * cheapest)
    return Slots(few, many if curve[few] >= CROWDED * curve[many] else few)


def _response(slots: int, seconds: float, between: float) -> float:
    """How long a step and its share of the wait for a slot take, by the queue M/M/slots.

    Args:
        slots: servers.
        seconds: of a step by sample.
        between: of a step and the next one that are asked for.

    Returns:
        Mean response time (Erlang's C formula, 1917), infinite if the queue grows without end.
    """
    busy = seconds / between
    if busy >= 1:
        return math.inf
    load = slots * busy
    blocked = 1.0  # Erlang's B formula, server by server
    for servers in range(1, slots + 1):
        blocked = load * blocked / (servers + load * blocked)
    waits = blocked / (1 - busy * (1 - blocked))
    return slots * seconds * (1 + waits / (slots * (1 - busy)))


def _seconds(engine: SamplingEngine) -> float:
    started = time.perf_counter()
    engine.step()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return time.perf_counter() - started
