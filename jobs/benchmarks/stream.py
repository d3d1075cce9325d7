"""What metrics that run along cost the sampling they watch, and how often they have a value.

python -m jobs.benchmarks.stream [--samples N] [--repeats N] [--actors N] [--work-dir PATH]
    [--set KEY=VALUE ...]

Makes the demo's phantoms, trains its two networks for a few seconds, and draws runs of N samples in
turn without and with `evaluation.stream`. Samplers note time and processor seconds at every shard:
both are compared between the first and the last shard of each sampler, so starts do not count.
"Slowdown" is of wall time, which other load disturbs; the "share" is the stream's processor seconds
while samples were drawn, over the samplers' own, which it hardly does. What the stream takes before
(imports, the reference) and after (last values) is told apart. "Gap" is the time between two
answers of the stream, from its first value on. Then a run whose stream is killed in the middle must
end in the values that Ray Data gets from the store. A folder given as --work-dir stays, and its
store and networks are used again. The last line is everything as JSON. Exits 1 where the share or
the median slowdown is above 2 %, the median gap above 1.2 s, or values differ by more than 1e-9.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from jobs.benchmarks.ratios import facts_of_run
from raysynth import stages
from raysynth.config import ExperimentConfig, load_recipe
from raysynth.evaluation.stream import Values
from raysynth.evaluation.watch import Sender, figures_shown, metric_stream, stream_store
from raysynth.progress import Progress
from raysynth.sampling.batch import Show, Watch, plan_mark, synthesize
from raysynth.session import connect

RECIPES = Path(__file__).parents[1] / "recipes"
MOST, MOST_GAP_S, MOST_DIFFERENCE = 0.02, 1.2, 1e-9
SEEN_SAMPLES = 480


@dataclass(frozen=True)
class Watched:
    """A run with its stream: seconds a shard of one sampler, and what the stream took and said."""

    wall_s: float
    cpu_s: float
    stream_cpu_s: dict[str, float]
    gaps_s: list[float]
    values: Values


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, help="default: a temporary folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    if options.samples < 2 * 64 * options.actors:
        parser.error(f"--samples {options.samples}: give every sampler two shards of 64 at least")
    facts = facts_of_run("torch", "ray") | {"samples": options.samples, "actors": options.actors}
    with tempfile.TemporaryDirectory(prefix="raysynth-stream-") as path, connect():
        work_dir = options.work_dir or Path(path)
        config = _trained(work_dir, options.samples, options.actors, options.set)
        plain, watched = [], []
        for repeat in range(options.repeats):
            ways = [("plain", _draw, plain), ("watched", _draw_watched, watched)]
            for name, draw, rows in ways[:: 1 if repeat % 2 else -1]:
                rows.append(draw(_named(config, f"{name}_{repeat}")))
        killed = _named(config, "killed")
        ended = _draw_watched(killed, kill=True).values
        difference = _difference(ended, stream_store(killed))
    facts["load"].append(round(os.getloadavg()[0], 2))
    return _report(plain, watched, difference, facts)


def _trained(work_dir: Path, samples: int, actors: int, overrides: list[str]) -> ExperimentConfig:
    """A store and a bundle that draws, if badly: the network is the demo's."""
    short = [f"work_dir={work_dir}", f"training.max_seen_samples={SEEN_SAMPLES}", *overrides]
    autoencoder = load_recipe(RECIPES / "phantom_demo_kl.yaml", short)
    model = load_recipe(
        RECIPES / "phantom_demo.yaml",
        [
            *short,
            f"sampling.num_samples={samples}",
            f"sampling.num_actors={actors}",
            "evaluation.controls=false",
        ],
    )
    for stage, config in (
        (stages.ingest, model),
        (stages.shard, model),
        (stages.train, autoencoder),
        (stages.encode, model),
        (stages.train, model),
    ):
        stage(config)
    return model


def _named(config: ExperimentConfig, name: str) -> ExperimentConfig:
    """The recipe under a new name: what is drawn already would not be drawn again."""
    named = config.model_copy(update={"name": f"{name}_{time.time_ns()}"}).absolute()
    named.bundle_path.symlink_to(config.bundle_path.absolute())
    return named


def _draw(config: ExperimentConfig) -> tuple[float, float]:
    """Wall and processor seconds a shard of one sampler."""
    with tempfile.TemporaryDirectory(prefix="raysynth-notes-") as notes:
        synthesize(config, Watch(_Noting(Path(notes), None), nullcontext))
        return _seconds_a_shard(Path(notes))


def _draw_watched(config: ExperimentConfig, kill: bool = False) -> Watched:
    answers: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="raysynth-notes-") as notes,
        metric_stream(config, plan_mark(config)) as (name, stream),
    ):
        send = _KillingSender(name) if kill else Sender(name)
        watch = Watch(_Noting(Path(notes), send), partial(_answers_noted, stream, answers))
        synthesize(config, watch)
        values = ray.get(stream.finish.remote())
        stream_cpu_s = ray.get(stream.cpu_seconds.remote())
        wall_s, cpu_s = _seconds_a_shard(Path(notes))
    return Watched(wall_s, cpu_s, stream_cpu_s, np.diff(answers).tolist(), values)


class _Noting:
    """Notes, in a sampler, when it ended a shard and what its process had taken by then."""

    def __init__(self, folder: Path, then: Show | None) -> None:
        self.folder, self.then = folder, then

    def __call__(self, *shard: Any) -> None:
        # Sending is the stream's cost: it falls between this note and the next.
        with open(self.folder / str(os.getpid()), "a") as file:
            file.write(f"{time.monotonic()} {time.process_time()}\n")
        if self.then is not None:
            self.then(*shard)


class _KillingSender(Sender):
    """Kills the stream after the second shard."""

    def __call__(self, first_row: int, *shard: Any) -> None:
        super().__call__(first_row, *shard)
        if first_row == 64:
            ray.kill(ray.get_actor(self._name), no_restart=False)


def _seconds_a_shard(notes: Path) -> tuple[float, float]:
    """Means over all samplers, from the first shard of each to its last."""
    tables = [np.loadtxt(file, ndmin=2) for file in notes.iterdir()]
    shards = sum(len(table) - 1 for table in tables)
    wall_s, cpu_s = np.sum([table[-1] - table[0] for table in tables], axis=0) / shards
    return float(wall_s), float(cpu_s)


@contextmanager
def _answers_noted(stream: Any, answers: list[float], view: Progress) -> Iterator[None]:
    """Shows figures as ever, and notes when they came."""

    class Noting:
        def note(self, **figures: float) -> None:
            if figures:
                answers.append(time.monotonic())
            view.note(**figures)

    with figures_shown(stream, Noting()):  # type: ignore[arg-type]
        yield


def _difference(one: Values, other: Values) -> float:
    """The largest of all figures, as a share."""
    assert list(one) == list(other)
    pairs = [
        (a, b)
        for key in one
        for a, b in zip(astuple(one[key]), astuple(other[key]), strict=True)
        if b is not None
    ]
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)


def _report(
    plain: list[tuple[float, float]],
    watched: list[Watched],
    difference: float,
    facts: dict[str, Any],
) -> int:
    """Prints the figures and the JSON line; returns the exit code."""
    shards = facts["samples"] / 64
    slowdowns = [one.wall_s / wall_s - 1 for one, (wall_s, _) in zip(watched, plain, strict=True)]
    sampling_s = float(np.median([cpu_s for _, cpu_s in plain]))
    shares = [one.stream_cpu_s["along"] / (shards * sampling_s) for one in watched]
    cpu_slowdowns = [one.cpu_s / cpu_s - 1 for one, (_, cpu_s) in zip(watched, plain, strict=True)]
    gaps_s = np.concatenate([one.gaps_s for one in watched])
    figures = {
        "slowdown": float(np.median(slowdowns)),
        "slowdown of each repeat": slowdowns,
        "samplers' processor seconds more": float(np.median(cpu_slowdowns)),
        "share": float(np.median(shares)),
        "sampling, processor s a sample": sampling_s / 64,
        "stream, processor s a sample": float(
            np.median([one.stream_cpu_s["along"] for one in watched]) / facts["samples"]
        ),
        "stream, processor s before and after": [
            float(np.median([one.stream_cpu_s[name] for one in watched]))
            for name in ("start", "end")
        ],
        "gap, median and longest s": [float(np.median(gaps_s)), float(gaps_s.max(initial=0))],
        "answers": len(gaps_s) + len(watched),
        "difference after a kill": difference,
    }
    targets = {
        "slowdown": (figures["slowdown"], MOST),
        "share": (figures["share"], MOST),
        "gap": (figures["gap, median and longest s"][0], MOST_GAP_S),
        "difference": (difference, MOST_DIFFERENCE),
    }
    missed = [name for name, (value, most) in targets.items() if not value <= most]  # nor NaN
    for name, value in (facts | figures).items():
        print(f"{name}: {value}")
    for name, (value, most) in targets.items():
        print(f"{name} {value:.3g}, at most {most:g}: {'MISSED' if name in missed else 'met'}")
    print(json.dumps(facts | figures | {"missed": missed}))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
