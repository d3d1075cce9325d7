"""Does the usefulness trial find what is so? Its whole protocol where the right answer is known.

python -m jobs.benchmarks.usefulness [--tasks TASK ...] [--seeds N] [--work-dir FOLDER]

A few phantom patients are the real ones. A perfect generator is played by other phantom patients,
with other nodules, cut the same way; a broken one by the same slices, each with the layout and box
of another. With the perfect one's samples networks have to become better, for certain; with the
broken one's they must not, nor with the real samples twice over. Most of its time is training (192
networks of 150 steps); `--work-dir` keeps the phantoms for another time. Prints tables, verdicts
and a line of JSON; exits 1 where the right answer is not found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from jobs.benchmarks.ratios import facts_of_run
from raysynth import stages
from raysynth.config import DownstreamConfig, ExperimentConfig
from raysynth.config.downstream import Task
from raysynth.evaluation.downstream.arms import DUPLICATED
from raysynth.evaluation.downstream.examples import NOBODY, Examples
from raysynth.evaluation.downstream.from_store import read_real
from raysynth.evaluation.downstream.report import table, verdicts
from raysynth.evaluation.downstream.trial import TaskResult, run_trial
from raysynth.session import connect
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

NUM_REAL, NUM_OTHERS, RATIO = 16, 60, 4.0

TASKS: tuple[Task, ...] = ("classification",)

TRIAL = DownstreamConfig(
    tasks=TASKS,
    folds=NUM_REAL,
    ratios=(RATIO,),
    augmented_copies=0,
    steps=150,
    batch_size=32,
    width=8,
    backbone="narrow",
    detection_size=96,
    learning_rate=2e-3,
)
"""Small networks that learn in seconds, and a fold for each real patient."""


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path)
    options = parser.parse_args(arguments)
    facts, started = facts_of_run("torch", "torchvision"), time.monotonic()
    changes = {"tasks": tuple(options.tasks), "seeds": options.seeds}
    config = DownstreamConfig.model_validate(TRIAL.model_dump() | changes)
    with tempfile.TemporaryDirectory() as folder, connect():
        work_dir = options.work_dir or Path(folder)
        real = phantoms(work_dir / "real", NUM_REAL, (2, 4), seed=0, test=0.98)
        others = phantoms(work_dir / "others", NUM_OTHERS, (7, 9), seed=1, test=0.02)
        perfect = replace(
            others,
            patient=np.full(len(others), NOBODY),
            held_out=np.zeros(len(others), bool),
        )
        origins = {"perfect": perfect, "broken": mislabelled(perfect)}
        trial = run_trial(replace(real, held_out=np.ones(len(real), bool)), origins, config)
    facts |= {"slices": {"real": len(real), "perfect": len(perfect)}, "steps": config.steps}
    facts["seconds"] = round(time.monotonic() - started)
    right = [_report(task, result) for task, result in trial.tasks.items()]
    for notice in trial.notices:
        print(notice)
    print(json.dumps(facts | {"right": right, "trial": asdict(trial)}))
    return int(not all(right))


def phantoms(
    work_dir: Path, count: int, nodules: tuple[int, int], seed: int, test: float
) -> Examples:
    """Slices of phantom patients; those who test and those who train share no nodule."""
    recipe = ExperimentConfig.model_validate(
        {
            "name": "usefulness",
            "work_dir": work_dir,
            "data": {
                "source": {
                    "kind": "phantom",
                    "num_patients": count,
                    "seed": seed,
                    "spacing_mm": (5.0, 2.0, 2.0),
                    "nodules_per_patient": nodules,
                    "min_diameter_mm": 6,
                },
                "split": {"val": 0.0, "test": test},
                "samples": {
                    "size": 64,
                    "spacing_mm": 5.0,
                    "field_of_view_mm": 256,
                    "nodule_free_every": 0,
                },
            },
            "model": {"family": "semantic_diffusion"},
        }
    )
    stages.ingest(recipe)
    stages.shard(recipe)
    root = open_root(recipe.store_url)
    return read_real(root, SampleSet(open_group(root, "samples/slices")), frozenset())


def mislabelled(examples: Examples) -> Examples:
    """The same slices, each with layout and box of another."""
    half = len(examples) // 2
    layout, box = (np.roll(part, half, axis=0) for part in (examples.layout, examples.box))
    return replace(examples, layout=layout, box=box)


def _report(task: str, result: TaskResult) -> bool:
    """Prints what a task came to; whether it is right."""
    print(f"\n{task}, {result.patients} test patients")
    for row in table(result.arms, result.headline):
        print("  ".join(f"{cell:>16s}" for cell in row))
    for sentence in verdicts(result.arms, result.headline):
        print(sentence)
    signs = {
        name: difference.sign
        for name, arm in result.arms.items()
        if (difference := arm.metrics[result.headline].difference) is not None
    }
    perfect, broken = (signs[f"+ {name} x{RATIO:g}"] for name in ("perfect", "broken"))
    right = perfect == 1 and broken <= 0 and signs[DUPLICATED] <= 0
    print("the right answer" if right else "NOT the right answer")
    return right


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
