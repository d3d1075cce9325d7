"""Training half a billion parameters and drawing a million volumes on 1,000 GPUs: a plan.

python -m jobs.benchmarks.thousand_gpus [--hardware cluster/hardware/h100_1000.yaml]

`lidc_flow3d` with half a billion parameters on latents of 4 x 128^3 of volumes of 512^3, planned by
the formulas and simulations of `raysynth plan`; nothing is run. Every line names what it assumes,
and the target, where there is one. Prints tables and a line of JSON; exits 1 where a target is
missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from raysynth.config import load_recipe
from raysynth.config.hardware import Hardware, load_hardware
from raysynth.planning.formulas import best_interval_s, exchange, goodput
from raysynth.planning.plan import HU_RATIO, LABEL_RATIO, Part, find_autoencoder, plan
from raysynth.planning.simulation import simulate_serving, simulate_training
from raysynth.training.memory import EngineChoice

RECIPE = Path("jobs/recipes/lidc_flow3d.yaml")
HOUR = 3600.0
CHANGES = [
    "work_dir=runs/thousand_gpus",
    "data.samples.size=512",
    "data.samples.field_of_view_mm=360",
    "model.channels=[128,256,512,768]",
    "model.attention_levels=[false,false,false,true]",
    "model.num_head_channels=64",
    "model.checkpointing=true",
    "training.global_batch_size=1000",
    "training.micro_batch_size=1",
    "training.open_shards=1000",
    "training.num_workers=1000",
    "training.max_seen_samples=5000000",
    "training.checkpoint_every=500000",
    "sampling.num_samples=1000000",
    "sampling.num_actors=1000",
    "sampling.batch_size=1",
]


@dataclass(frozen=True)
class Line:
    """A figure with its assumptions, and the target that it must reach or not pass."""

    name: str
    value: float
    basis: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_missed(self) -> bool:
        """Whether a target is."""
        too_low = self.at_least is not None and self.value < self.at_least
        return too_low or (self.at_most is not None and self.value > self.at_most)


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hardware", type=Path, default="cluster/hardware/h100_1000.yaml")
    options = parser.parse_args(arguments)
    hardware = load_hardware(options.hardware)
    config = load_recipe(RECIPE, CHANGES)
    autoencoder = find_autoencoder(config, RECIPE.parent)
    made = plan(config, hardware, autoencoder)
    for name, part in made.parts.items():
        print(f"{name}, held up by {part.bottleneck}")
        for line in part.lines():
            print(line)
    for text in made.advice:
        print(f"advice: {text}")
    training, drawing = made.parts["training"], made.parts["drawing"]
    lines = [
        *_network(training, hardware),
        *_data(training),
        *_volumes(drawing),
        *_failures(),
        *_serving(),
    ]
    print()
    for line in lines:
        verdict = ""
        if line.at_least is not None or line.at_most is not None:
            sign, target = (
                (">=", line.at_least) if line.at_least is not None else ("<=", line.at_most)
            )
            verdict = f"  target {sign} {target:g}: {'MISSED' if line.is_missed else 'met'}"
        print(f"{line.name:44}{line.value:>12,.4g}  {line.basis}{verdict}")
    missed = [line.name for line in lines if line.is_missed]
    print(json.dumps({"lines": [asdict(line) for line in lines], "missed": missed}))
    return int(bool(missed))


def _network(training: Part, hardware: Hardware) -> list[Line]:
    shares = training.shares
    busy = shares["computing"]
    slow = hardware.model_copy(update={"network_gb_s": 12.5})
    engine = EngineChoice("ddp", 0, "")
    flat, by_node = (
        exchange(
            500_000_000,
            1000,
            engine,
            slow,
            compute_s=0.6,
            num_micro_batches=1,
            by_node=whether,
        )
        for whether in (False, True)
    )
    waiting = "waiting for the slowest worker"
    return [
        Line("exposed communication, share", shares["exchanging gradients"], "", at_most=0.05),
        Line(
            "scaling without stragglers",
            busy / (1 - shares[waiting]),
            "computing over all but the wait for the slowest",
            at_least=0.95,
        ),
        Line(
            "scaling with stragglers",
            busy,
            f"each worker's steps vary by sigma {hardware.straggler_sigma:g} on their own",
        ),
        Line(
            "100 Gb/s a node: exchange, s", by_node.seconds, "0.5 B gradients in float32, by node"
        ),
        Line("- of it not hidden", by_node.exposed_s, "behind 0.4 s of backward pass"),
        Line("- flat, s", flat.seconds, "every GPU sends over its node's card: 8 times as much"),
    ]


def _data(training: Part) -> list[Line]:
    rate = training["samples a second"]
    raw, latents = 512**3 * 2 / HU_RATIO, 4 * 128**3 * 2
    labels = 512**3 / LABEL_RATIO
    return [
        Line(
            "training data, images, GB/s",
            (raw + labels) * rate / 1e9,
            f"512^3 int16 compressed {HU_RATIO:g} times, at {rate:,.0f} samples a second",
        ),
        Line("- latents, GB/s", latents * rate / 1e9, "4 x 128^3 float16, encoded once"),
        Line("- labels beside either, GB/s", labels * rate / 1e9, "512^3, though 128^3 would do"),
    ]


def _volumes(drawing: Part) -> list[Line]:
    seconds = drawing["time"]
    return [
        Line("a volume, s", drawing["a sample"], "on one GPU", at_most=15.0),
        Line("1 M volumes, h", seconds / HOUR, "1,000 GPUs, simulated", at_most=4.2),
        Line(
            "- GPU hours",
            1000 * seconds / HOUR,
            "MAISI v1 166,667 and v2 13,611 on A100 (published)",
        ),
        Line("- output, TB", drawing["output"] / 1e12, "in the store"),
        Line("- requests", drawing["requests"], "a shard a volume"),
        Line("- unsharded chunks of 256 KB", 1e6 * 512**3 * 2 / 2**18, "81 h at 3,500 a second"),
        Line(
            "- overlap of writing",
            1 - drawing.shares["waiting for the store"],
            "share of the time that is no waiting for the store",
            at_least=0.97,
        ),
    ]


def _failures() -> list[Line]:
    lines = []
    for between_h in (50.7, 7.9):
        for stall in (5.0, 60.0):
            interval = best_interval_s(stall, between_h * HOUR)
            share = goodput(stall, interval, between_h * HOUR, 300.0)
            steps = int(30 * 24 * HOUR)  # of a second, a month
            found = simulate_training(
                steps,
                1.0,
                num_workers=1,
                sigma=0.0,
                steps_between_checkpoints=round(interval),
                stall_s=stall,
                between_failures_s=between_h * HOUR,
                restart_s=300.0,
                seed=0,
            )
            lines.append(
                Line(
                    f"goodput, a failure in {between_h:g} h, stall {stall:g} s",
                    share,
                    f"every {interval:.0f} s; a simulated month: {steps / found.seconds:.4f}, "
                    f"{found.failures} failures",
                    at_least=0.98 if between_h > 50 and stall == 5 else None,
                )
            )
    return lines


def _serving() -> list[Line]:
    lines = []
    for lost in (0.0, 0.1):
        found = simulate_serving(
            100_000,
            10.0,
            num_replicas=1000,
            slots=8,
            load=0.8,
            choices=2,
            lost_share=lost,
            sigma=0.05,
            seed=0,
        )
        lines += [
            Line(
                f"serving, {lost:.0%} of 1,000 replicas lost: p99 / mean",
                found.p99_s / found.mean_s,
                f"80 % load, the freer of two; {found.repeated} requests drawn again",
                at_most=1.5,
            ),
            Line("- requests lost", found.lost, "of 100,000", at_most=0),
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
