"""Requests that join between two steps, against batches that are made when they come (B8).

python -m jobs.benchmarks.step_batching [--requests 400]

Requests of 10, 20 or 50 steps arrive by chance (Poisson) at 80 % of what padded batches can do, at
one process of one thread. Four policies serve the same arrivals with the same network: by steps
(ours, the service's own runner, slots from the measured batch curve), groups of equal steps, padded
batches of what waits, and one after the other; groups and batches have rows for those they hold
alone. Twice: in latents of 4 x 16 x 16, where calls cost more than arithmetic, and of 4 x 32 x 32,
which fill the core. Then all requests are there at once: capacity. Everybody decodes. Prints tables
and a line of JSON; exits 1 where a target is missed or a sample is not that of a run alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.benchmarks.random_bundle import AUTOENCODER, latents_recipe, make_bundle
from jobs.benchmarks.ratios import facts_of_run
from raysynth.condition import Condition
from raysynth.sampling.curve import Slots, batch_curve, slots_that_pay
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.sampling.planner import NO_SOURCE, PlannedSample
from raysynth.serving.runner import Runner

STEPS = (10, 20, 50)
SLOTS = 8
LOAD = 0.8
NETWORKS = {"small": (16, (16, 32)), "large": (32, (32, 64))}
"""Size of the latents along a side, and channels of the network's levels."""

ROUNDS = 3
"""Of requests that come by chance, for all policies in turn: a machine's speed changes."""

NUM_CHECKED = 16


@dataclass
class Asked:
    """A request and when it comes, in seconds; when it was drawn, and what."""

    request: SampleRequest
    comes: float
    done: float = 0.0
    hu: NDArray[np.int16] | None = None
    batch_shape: int = 0


class Server:
    """Engines of every number of slots, made when they are needed."""

    def __init__(self, sampler: BundleSampler) -> None:
        self.sampler = sampler
        self._samplers: dict[int, BundleSampler] = {}
        self.started = 0.0

    def engine(self, slots: int) -> SamplingEngine:
        """That of so many slots."""
        if slots not in self._samplers:
            self._samplers[slots] = self.sampler.with_slots(slots)
        return self._samplers[slots].engine(1.0)

    @property
    def now(self) -> float:
        """Seconds since the first request could come."""
        return time.perf_counter() - self.started

    def run(self, group: list[Asked], num_steps: int) -> None:
        """A batch from beginning to end; rows that are through wait for the last one."""
        engine = self.engine(len(group))
        for one in group:
            engine.admit(one.request)
        for _ in range(num_steps):
            engine.step()
        drawn = {one.sample_id: one.x_0 for one in engine.retire()}
        decoder = self._samplers[len(group)]
        decoder.decode(torch.stack([drawn[one.request.sample_id] for one in group]))
        for one in group:
            one.done = self.now


def by_steps(server: Server, asked: list[Asked], slots: Slots) -> None:
    """The runner of the service: requests take a free slot before the next step."""
    runner = Runner(server.sampler.with_slots(slots.few), len(asked), slots.many)
    tickets = []
    for one in asked:
        time.sleep(max(0.0, one.comes - server.now))
        wanted = one.request
        ticket = runner.submit(
            wanted.sample_id,
            wanted.seed,
            wanted.condition,
            num_inference_steps=wanted.num_inference_steps,
        )
        ticket.drawn.add_done_callback(partial(_note_end, server, one))
        tickets.append(ticket)
    runner.close()
    for one, ticket in zip(asked, tickets, strict=True):
        one.hu, one.batch_shape = ticket.drawn.result(), ticket.batch_shape


def _note_end(server: Server, one: Asked, _: object) -> None:
    one.done = server.now


def in_batches(server: Server, asked: list[Asked], most: int, *, are_equal: bool) -> None:
    """Up to so many that are there are drawn together, to the end."""
    waiting = deque(asked)
    while waiting:
        if waiting[0].comes > server.now:
            time.sleep(max(0.0, waiting[0].comes - server.now))
        here = [one for one in waiting if one.comes <= server.now]
        steps = here[0].request.num_inference_steps
        if are_equal:
            here = [one for one in here if one.request.num_inference_steps == steps]
        group = here[:most]
        server.run(group, max(one.request.num_inference_steps for one in group))
        taken = {id(one) for one in group}
        waiting = deque(one for one in waiting if id(one) not in taken)


def policies(slots: Slots) -> dict[str, Callable[[Server, list[Asked]], None]]:
    """By name, what serves."""
    return {
        "by steps": lambda server, asked: by_steps(server, asked, slots),
        "equal steps": lambda server, asked: in_batches(server, asked, SLOTS, are_equal=True),
        "padded": lambda server, asked: in_batches(server, asked, SLOTS, are_equal=False),
        "one by one": lambda server, asked: in_batches(server, asked, 1, are_equal=False),
    }


def requests(sampler: BundleSampler, count: int, rate: float | None, seed: int = 0) -> list[Asked]:
    """Requests that come at a rate by chance; None: all at once."""
    rng = np.random.default_rng(seed)
    comes = np.zeros(count) if rate is None else np.cumsum(rng.exponential(1 / rate, count))
    size = sampler.size
    layout = np.full((size, size), 4, np.uint8)
    return [
        Asked(
            SampleRequest(
                f"r{number}", number, Condition(layout=layout), "ddim", int(rng.choice(STEPS))
            ),
            float(when),
        )
        for number, when in enumerate(comes)
    ]


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    missed = []
    for network, (size, channels) in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = latents_recipe(Path(folder), size, channels, batch_size=16)
            make_bundle(config, config.bundle_path, AUTOENCODER)
            sampler = BundleSampler(config.bundle_path, config.sampling, 0)
            count = options.requests if network == "small" else max(60, options.requests // 5)
            figures[network], misses = _of_network(network, sampler, count)
            missed += misses
    for line in missed:
        print(f"MISSED: {line}")
    print(json.dumps(facts_of_run("torch") | figures))
    return int(bool(missed))


def _of_network(network: str, sampler: BundleSampler, count: int) -> tuple[object, list[str]]:
    curve = batch_curve(sampler, 16)
    slots = slots_that_pay(curve)
    shown = ", ".join(f"{rows}: {1e3 * seconds:.2f}" for rows, seconds in curve.items())
    print(f"{network} network, ms of a step by sample at {shown}")
    print(f"slots: {slots.few} while few wait, {slots.many} for a crowd")
    server = Server(sampler)
    for rows in range(1, 2 * SLOTS + 1):
        first = [
            Asked(replace(one.request, num_inference_steps=1), 0.0)
            for one in requests(sampler, rows, None)
        ]
        server.run(first, 1)  # no policy pays for it
    serving = policies(slots)
    capacity: dict[str, float] = {}
    for name, policy in serving.items():
        asked = requests(sampler, count, None)  # all at once: the more, the less their end counts
        server.started = time.perf_counter()
        policy(server, asked)
        capacity[name] = len(asked) / max(one.done for one in asked)
    rate = LOAD * capacity["padded"]
    waits: dict[str, list[float]] = {name: [] for name in serving}
    wrong = 0
    for turn in range(ROUNDS):
        for name, policy in serving.items():
            asked = requests(sampler, count // ROUNDS, rate, seed=1 + turn)
            server.started = time.perf_counter()
            policy(server, asked)
            waits[name] += [one.done - one.comes for one in asked]
            if name == "by steps" and turn == 0:
                wrong = _wrong(server, asked[:NUM_CHECKED])
    found: dict[str, dict[str, float]] = {}
    for name in serving:
        p50, p99 = np.percentile(waits[name], (50, 99))
        found[name] = {"capacity": capacity[name], "p50_s": p50, "p99_s": p99}
    ours = found["by steps"]
    print(f"{rate:.1f} requests a second, {count} of them")
    print(f"{'policy':12}{'a second':>10}{'p50 s':>9}{'p99 s':>9}{'ours of it: p50, p99':>24}")
    for name, one in found.items():
        ratios = f"{ours['p50_s'] / one['p50_s']:.2f}, {ours['p99_s'] / one['p99_s']:.2f}"
        print(f"{name:12}{one['capacity']:10.2f}{one['p50_s']:9.3f}{one['p99_s']:9.3f}{ratios:>24}")
    equal, padded = found["equal steps"], found["padded"]
    checks = {"every sample is that of a run alone": wrong == 0}
    if network == "small":
        checks |= {
            "p50 <= .45 of equal steps": ours["p50_s"] <= 0.45 * equal["p50_s"],
            "p99 <= .72 of equal steps": ours["p99_s"] <= 0.72 * equal["p99_s"],
            "capacity >= 1.7 of padded": ours["capacity"] >= 1.7 * padded["capacity"],
        }
    else:
        checks |= {
            f"{figure} <= 1.05 of {name}": ours[figure] <= 1.05 * one[figure]
            for name, one in (("equal steps", equal), ("padded", padded))
            for figure in ("p50_s", "p99_s")
        }
    misses = [f"{network}: {what}" for what, is_met in checks.items() if not is_met]
    return {"curve": curve, "slots": asdict(slots), "wrong": wrong, "policies": found}, misses


def _wrong(server: Server, asked: list[Asked]) -> int:
    """Samples that are not, bit by bit, what a run alone draws at the same batch shape."""
    wrong = 0
    for one in asked:
        wanted = one.request
        sampling = server.sampler.sampling.model_copy(
            update={"num_inference_steps": wanted.num_inference_steps}
        )
        alone = BundleSampler(server.sampler.bundle_path, sampling, 0).with_slots(one.batch_shape)
        planned = PlannedSample(wanted.sample_id, wanted.seed, wanted.condition, NO_SOURCE)
        assert one.hu is not None
        wrong += not np.array_equal(alone.draw([planned])[0], one.hu)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
