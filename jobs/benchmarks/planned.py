"""Is `raysynth plan` right? A recipe's plan for this machine, and then the runs themselves.

python -m jobs.benchmarks.planned RECIPE [--set KEY=VALUE ...] [--samples 400] [--drawn 128]

Plans training with one worker and with two, and drawing with one actor and with two; then trains
and draws so. Training's time is that of its steps with checkpoints; drawing's is what so many
samples more take: so start-up stays apart. Plans are means of two, from steps taken before and
after. Needs the recipe's sample set (and, of latents, these and the autoencoder). Prints a table
and a line of JSON; exits 1 where a plan is more than 15 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.benchmarks.ratios import facts_of_run
from raysynth import stages
from raysynth.config import ExperimentConfig, load_recipe
from raysynth.planning.here import measure_here
from raysynth.planning.plan import find_autoencoder, plan

AT_MOST = 0.15


@dataclass(frozen=True)
class Row:
    """Seconds that were planned, and that it took."""

    name: str
    planned_s: float
    measured_s: float

    @property
    def off(self) -> float:
        """Share by which it took longer than planned."""
        return self.measured_s / self.planned_s - 1


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--drawn", type=int, default=128)
    options = parser.parse_args(arguments)
    facts = facts_of_run("torch", "ray") | {"recipe": options.recipe.stem}
    rows = []
    for count in (1, 2):
        changes = [
            *options.set,
            f"name=planned_{os.getpid()}_{count}",  # nothing of an earlier time
            f"training.num_workers={count}",
            f"training.max_seen_samples={options.samples}",
            "training.max_seconds=null",
            "training.threads_per_worker=1",
            f"sampling.num_actors={count}",
            f"sampling.num_samples={options.drawn}",
            "evaluation={controls: false}",
        ]
        rows += _compare(load_recipe(options.recipe, changes), options.recipe.parent)
    print(f"{'':28s}{'planned s':>12s}{'measured s':>12s}{'off':>9s}")
    for row in rows:
        verdict = "" if abs(row.off) <= AT_MOST else "  MISSED"
        print(f"{row.name:28s}{row.planned_s:12.1f}{row.measured_s:12.1f}{row.off:+9.1%}{verdict}")
    missed = [row.name for row in rows if abs(row.off) > AT_MOST]
    print(json.dumps(facts | {"rows": [asdict(row) for row in rows], "missed": missed}))
    return int(bool(missed))


def _compare(config: ExperimentConfig, folder: Path) -> list[Row]:
    count = config.training.num_workers
    autoencoder = find_autoencoder(config.absolute(), folder)
    before, planned, took, drawing = measure_here(config, autoencoder), [], [], []
    trained = stages.train(config)["seconds"]
    batch = config.sampling.batch_size  # a smaller one would be filled up
    for name, num_samples in (("few", batch), ("many", config.sampling.num_samples + batch)):
        sampling = config.sampling.model_copy(update={"num_samples": num_samples})
        changes = {
            "name": f"{config.name}_{name}",
            "bundle": str(config.absolute().bundle_path),
            "sampling": sampling,
        }
        drawing.append(config.model_copy(update=changes))
        took.append(stages.synthesize(drawing[-1])["seconds"])
    # Other people's work makes a machine faster and slower: it is looked at before and after.
    for hardware in (before, measure_here(config, autoencoder)):
        few, many = (plan(one, hardware, autoencoder).parts["drawing"]["time"] for one in drawing)
        training = plan(config, hardware, autoencoder).parts["training"]["time"]
        planned.append((training, many - few))
    training_s, drawing_s = (sum(seconds) / 2 for seconds in zip(*planned, strict=True))
    return [
        Row(f"training, {count} workers", training_s, trained),
        Row(f"drawing, {count} actors", drawing_s, took[1] - took[0]),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
