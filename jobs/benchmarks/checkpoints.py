"""What a checkpoint costs: how long training stands still, and how fast it is read again.

python -m jobs.benchmarks.checkpoints [--rounds N] [--parameters N]

Fifty million parameters with AdamW's moments and an average (800 MB in all) on one process. Between
two updates stands a step of matrix products. "Stall" is by how much a step takes longer in which a
checkpoint is begun: its file is written meanwhile, where `torch.save` writes the same tensors while
training waits. Ways take turns in every round. Wall time is what counts here; load makes it
uncertain. Prints a table and a line of JSON; exits 1 where a target is missed: a stall of a tenth
of `torch.save`, and reading in 1.2 times what the bare file takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.distributed import checkpoint as dcp

from jobs.benchmarks.ratios import Row, Seconds, facts_of_run, median_row, report
from raysynth.training.checkpoints import CheckpointFolder
from raysynth.training.saving import Key, Runs, Saved, Saver, file_name

KINDS = ("weight", "average", "exp_avg", "exp_avg_sq")
NUM_TENSORS = 60
STEP_PRODUCTS = 6
MOST_STALL, MOST_READ = 0.10, 1.2


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=50_000_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = options.parameters // NUM_TENSORS
    runs: Runs = {
        Key(kind, f"layer{number}", 0): torch.randn(size)
        for kind in KINDS
        for number in range(NUM_TENSORS)
    }
    with tempfile.TemporaryDirectory() as scratch:
        written = _writing(runs, Path(scratch), options.rounds)
        read = _reading(runs, Path(scratch) / "run", options.rounds)
    facts = facts_of_run("torch", "safetensors") | {"megabytes": 4 * size * len(runs) // 10**6}
    tables = {
        "training stands still": _rows(written, "torch.save", MOST_STALL, "ours, stall"),
        "reading": _rows(read, "bare file", MOST_READ, "ours"),
    }
    return report(facts, tables, "of that wall time")


def _writing(runs: Runs, scratch: Path, rounds: int) -> dict[str, list[Seconds]]:
    folder = CheckpointFolder(scratch / "run", keep=1)
    saver = Saver(folder, rank=0, world_size=1)
    tensors = {":".join(map(str, key)): run for key, run in runs.items()}
    spent: dict[str, list[Seconds]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        started = Seconds.now()
        call()
        spent.setdefault(name, []).append(started.elapsed())

    matrix = torch.randn(2048, 2048)

    def step() -> None:
        for _ in range(STEP_PRODUCTS):
            torch.mm(matrix, matrix)

    def step_with_checkpoint(seen: int) -> None:
        saver.save(seen, runs, {})
        step()
        saver.settle()

    for number in range(rounds + 1):
        folder.stage(number)
        timed("a step", step)
        timed("a step that begins a checkpoint", lambda seen=number: step_with_checkpoint(seen))  # type: ignore[misc]
        timed("ours, until it is on disk", saver.wait)
        timed("torch.save", lambda: torch.save(tensors, scratch / "saved.pt"))
        if number < 2:  # two are enough of what is far behind
            timed("torch DCP", lambda: dcp.save(tensors, checkpoint_id=scratch / "dcp"))
    # The first round meets cold memory.
    spent = {name: seconds[1:] for name, seconds in spent.items()}
    longer = zip(spent["a step that begins a checkpoint"], spent["a step"], strict=True)
    spent["ours, stall"] = [Seconds(a.cpu - b.cpu, a.wall - b.wall) for a, b in longer]
    return spent


def _reading(runs: Runs, root: Path, rounds: int) -> dict[str, list[Seconds]]:
    checkpoint = CheckpointFolder(root, keep=1).newest_valid()
    assert checkpoint is not None
    target = {key: torch.empty_like(run) for key, run in runs.items()}
    spent: dict[str, list[Seconds]] = {"bare file": [], "ours": [], "ours, all bytes verified": []}
    for _ in range(rounds):
        started = Seconds.now()
        np.fromfile(checkpoint.path / file_name(0), np.uint8)
        spent["bare file"].append(started.elapsed())
        started = Seconds.now()
        with Saved(checkpoint.path) as saved:
            for key, run in target.items():
                run.copy_(saved.read(key.kind, key.name, 0, run.numel()))
        spent["ours"].append(started.elapsed())
        started = Seconds.now()
        CheckpointFolder(root, keep=1).newest_valid()
        spent["ours, all bytes verified"].append(started.elapsed())
    assert all(torch.equal(run, target[key]) for key, run in runs.items())
    return spent


def _rows(spent: dict[str, list[Seconds]], against: str, at_most: float, asked: str) -> list[Row]:
    """Medians, and ratios of wall times to one way's."""
    base = median_row(against, spent[against])
    rows = [base]
    for name, seconds in spent.items():
        if name != against:
            row = median_row(name, seconds)
            count = min(len(seconds), len(spent[against]))
            ratios = [
                a.wall / b.wall
                for a, b in zip(seconds[:count], spent[against][:count], strict=True)
            ]
            limits = float(min(ratios)), float(max(ratios))
            target = at_most if name == asked else None
            ratio = row.wall_ms / base.wall_ms
            rows.append(Row(name, row.cpu_ms, row.wall_ms, ratio, limits, at_most=target))
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
