"""Solvers of few steps against DDIM of 250: how much faster, and are their samples as good?

python -m jobs.benchmarks.same_quality RECIPE [--set KEY=VALUE ...] [--samples N] [--long N]

Draws the same requests from a recipe's bundle with each solver and the same noise, and once more
with other noise in 1,000 steps (or `--long`): the reference. KID to it is that of whole slices or
volumes. What as many steps with the first noise have, and its 95 % interval, is what nothing but
chance makes; a solver is as good where its KID is not above that interval. All ways run on one
thread, one after the other; processor seconds, decoding included. Needs what `make demo` leaves, or
another recipe's store and bundle; takes three quarters of an hour for the demo. Prints a table and
a line of JSON; exits 1 unless a solver as good is 12 times as fast.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.benchmarks.ratios import facts_of_run
from raysynth.config import ExperimentConfig, load_recipe
from raysynth.config.sampling import SamplerName
from raysynth.evaluation.intervals import Arm, Interval, subsample_intervals
from raysynth.metrics.features import load_extractor
from raysynth.metrics.kernel import cubic_mmd2
from raysynth.sampling.batch import plan_run_samples
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.layouts import Lender
from raysynth.sampling.planner import PlannedSample
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

EXTRACTOR = "ct-conv"
PEER_STEPS = 250
SOLVERS: tuple[tuple[SamplerName, int], ...] = (
    ("ddim", 20),
    ("dpm_solver++", 20),
    ("dpm_solver++", 12),
    ("unipc", 10),
)
TARGET = 12.0


@dataclass(frozen=True)
class Way:
    """A solver: processor seconds for all samples, and their KID to the reference."""

    name: str
    seconds: float
    kid: float
    interval: Interval


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--long", type=int, default=1000, metavar="N")
    options = parser.parse_args(arguments)
    facts = facts_of_run("torch")
    config = load_recipe(options.recipe, options.set)
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, f"samples/{config.samples.name}"))
    plan = plan_run_samples(config, samples)[: options.samples]
    if (lender := Lender.of(config)) is not None:
        plan = [lender(root, one) for one in plan]
    extract = load_extractor(EXTRACTOR, spatial_dims=len(samples.shape))
    again = [one.redrawn(2) for one in plan]
    long: tuple[SamplerName, int] = ("ddim", options.long)
    peer: tuple[SamplerName, int] = ("ddim", min(PEER_STEPS, options.long))
    reference = Arm(extract(_draw(config, *long, again)[0]), np.arange(len(plan)))
    ways = []
    for name, steps in dict.fromkeys((long, peer, *SOLVERS)):
        hu, seconds = _draw(config, name, steps, plan)
        features = extract(hu)
        kid = cubic_mmd2(reference.features, features)
        drawn = Arm(features, reference.patients)
        (interval,) = subsample_intervals(_kids, reference, drawn, [kid], 200, seed=0)
        ways.append(Way(f"{name} {steps}", seconds, kid, interval))
        print(f"{name} {steps}: {seconds:.1f} s", file=sys.stderr, flush=True)
    facts |= {
        "samples": len(plan),
        "recipe": config.name,
        "extractor": extract.name,
        "long": options.long,
    }
    return _report(ways, facts)


def _kids(real: NDArray[np.float32], drawn: NDArray[np.float32]) -> list[float]:
    return [cubic_mmd2(real, drawn)]


def _draw(
    config: ExperimentConfig, name: SamplerName, steps: int, plan: Sequence[PlannedSample]
) -> tuple[NDArray[np.int16], float]:
    """Samples, and the processor seconds that they took."""
    changes = {"sampler": name, "num_inference_steps": steps, "threads_per_actor": 1}
    sampling = config.sampling.model_copy(update=changes)
    sampler = BundleSampler(config.bundle_path, sampling, config.seed, config.samples.size)
    sampler.draw(plan[:1])  # loads the bundle
    started = time.process_time()
    hu = sampler.draw(plan)
    return hu, time.process_time() - started


def _report(ways: Sequence[Way], facts: dict[str, Any]) -> int:
    chance = ways[0].interval[1]
    peer = next(way for way in ways if way.name == f"ddim {min(PEER_STEPS, facts['long'])}")
    print(f"{'way':20s}{'s':>9s}{'times':>8s}   KID to {ways[0].name} with other noise")
    best = 0.0
    for way in ways:
        times, as_good = peer.seconds / way.seconds, way.kid <= chance
        best = max(best, times * as_good)
        line = f"{way.name:20s}{way.seconds:9.1f}{times:8.1f}   {way.kid:.4g} "
        print(line + "[{:.4g}, {:.4g}]".format(*way.interval) + ("" if as_good else "  worse"))
    met = best >= TARGET
    verdict = "met" if met else "MISSED"
    print(f"{best:.1f} times {peer.name} as good, target >= {TARGET:g}: {verdict}")
    print(json.dumps(facts | {"ways": [asdict(way) for way in ways], "met": met}))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
