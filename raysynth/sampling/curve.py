"""How much a network gains by drawing several samples in one call, and so how many slots pay."""

from __future__ import annotations

import statistics
import time

import torch

from raysynth.sampling.draw import BundleSampler

NUM_STEPS = 5
"""Timed at each batch, after one that is not; fewer where they are long."""

LONG_S = 2.0
"""A batch that has taken so long is timed, and none after it: it fills the device."""

WORTH = 0.95
"""A larger batch is worth its wait if it takes less than this share of the time a sample."""


def batch_curve(sampler: BundleSampler, most: int) -> dict[int, float]:
    """Seconds of a step by sample, at 1, 2, 4, ... slots.

    Idle slots cost what busy ones do, so nothing needs to be drawn. The network is not compiled
    for this: that would take a minute for each batch.

    Args:
        sampler: of a diffusion model.
        most: slots.
    """
    sampling = sampler.sampling.model_copy(update={"compile": False})
    curve: dict[int, float] = {}
    slots = 1
    while slots <= most:
        one = BundleSampler(sampler.bundle_path, sampling, sampler.seed, sampler.size)
        one.bundle = sampler.bundle
        curve[slots] = _seconds_a_step(one.with_slots(slots)) / slots
        if slots * curve[slots] > LONG_S:
            break
        slots *= 2
    return curve


def slots_that_pay(curve: dict[int, float]) -> int:
    """The fewest slots whose samples cost little more than the cheapest."""
    cheapest = min(curve.values())
    return min(slots for slots, seconds in curve.items() if WORTH * seconds <= cheapest)


def _seconds_a_step(sampler: BundleSampler) -> float:
    engine = sampler.engine(guidance_scale=1)
    seconds = []
    for _ in range(1 + NUM_STEPS):
        started = time.perf_counter()
        engine.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > LONG_S:
            break
    return statistics.median(seconds[1:] or seconds)
