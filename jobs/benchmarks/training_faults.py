"""Kills, changed engines and broken batches: what training survives (rules R6 to R9).

python -m jobs.benchmarks.training_faults [--full] [--only R6] [--kills 6] [--saves 20]

R6  SIGKILL of one of two workers (or of a single one) at a random step; then the same run again.
    At the end its weights must be those of a run that nobody disturbed, bit by bit, and each time
    at most an interval between checkpoints, and what was on its way to the disk, may be done again.
R7  SIGKILL at a random file operation of a checkpoint's writing: a whole one must be found.
R8  A run goes on under another engine, ZeRO stage or number of workers: losses of the next steps
    must be within 1e-6 of a run that never changed.
R9  Batches that are not a number, all air, constant or absurdly bright: skipped or learned from,
    and the average stays finite.

`--full` does what a release asks for: 60 kills and 200 saves. A tiny autoencoder; float32 on the
CPU. Prints a table and a line of JSON; exits 1 unless nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysynth.config import AutoencoderKLConfig, TrainingConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.training.checkpoints import CheckpointFolder
from raysynth.training.context import LocalContext
from raysynth.training.history import HISTORY_FILE, read_history
from raysynth.training.loop import RunFiles, fit
from raysynth.training.objectives import AutoencoderObjective, Batch
from raysynth.training.saving import Key, Saver

WINDOW_HU = (-1000.0, 400.0)
MODEL = AutoencoderKLConfig(
    window_hu=WINDOW_HU, channels=(8, 8), num_res_blocks=1, norm_num_groups=4, latent_channels=2
)
BATCH, INTERVAL, LENGTH = 8, 40, 400
"""Samples a step, between checkpoints, and in all."""

PATHS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"num_workers": 2}, {"num_workers": 1}, {"num_workers": 2}),
    *(
        (
            {"num_workers": 2, "engine": "deepspeed", "zero_stage": before},
            {"num_workers": workers, "engine": "deepspeed", "zero_stage": after},
        )
        for before, after, workers in (
            (0, 3, 2),
            (1, 2, 2),
            (2, 1, 1),
            (3, 0, 2),
            (2, 3, 2),
            (3, 2, 1),
        )
    ),
    ({"num_workers": 1}, {"num_workers": 2, "engine": "deepspeed", "zero_stage": 3}),
)


@dataclass
class Count:
    """What came of one rule.

    Attributes:
        rule: for example `R6`.
        faults: injected.
        lost: checkpoints that were not found, or runs that ended otherwise than undisturbed ones.
        worst: samples that had to be done again at most (R6), or difference of losses (R8).
        notes: one for each thing lost.
    """

    rule: str
    faults: int = 0
    lost: int = 0
    worst: float = 0.0
    notes: list[str] = field(default_factory=list)

    def lose(self, note: str) -> None:
        """Counts a failure."""
        self.lost += 1
        self.notes.append(note)


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=["R6", "R7", "R8", "R9"])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--saves", type=int, default=20)
    options = parser.parse_args(arguments)
    kills, saves = (60, 200) if options.full else (options.kills, options.saves)
    rules = {
        "R6": lambda folder: _killed_workers(folder, kills),
        "R7": lambda folder: _killed_saves(folder, saves),
        "R8": _changed_engines,
        "R9": _broken_batches,
    }
    counts = []
    for rule, run in rules.items():
        if options.only in (None, rule):
            with tempfile.TemporaryDirectory() as folder:
                counts.append(run(Path(folder)))
                found = counts[-1]
                print(f"{rule}: {found.faults} faults, {found.lost} lost, worst {found.worst:g}")
                for note in found.notes:
                    print(f"    {note}")
    print(json.dumps([asdict(count) for count in counts]))
    return int(any(count.lost for count in counts))


class Stream:
    """This worker's share of random slices; the process may die before one of them."""

    def __init__(self, rank: int, world_size: int, die_at: int | None = None) -> None:
        """Draws the slices."""
        drawn = np.random.default_rng(0).integers(-1000, 400, (48, 16, 16))
        self.hu = drawn.astype(np.int16)
        self.rank, self.world_size, self.die_at = rank, world_size, die_at

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        """Positions in the order of the run, and what lies there."""
        while True:
            if self.die_at is not None and seen_samples >= self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            position = np.arange(seen_samples + self.rank, seen_samples + BATCH, self.world_size)
            yield {"position": position, "hu": self.hu[position % len(self.hu)]}
            seen_samples += BATCH


def _objective() -> AutoencoderObjective:
    torch.manual_seed(0)
    return AutoencoderObjective(build_autoencoder(MODEL), WINDOW_HU, (2, 8, 8), seed=0)


def _config(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "global_batch_size": BATCH,
        "max_seen_samples": LENGTH,
        "checkpoint_every": INTERVAL,
        "log_every": BATCH,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
    }
    return TrainingConfig(**values | changes)


def _files(folder: Path) -> RunFiles:
    return RunFiles(folder / "checkpoints", folder / "log", "benchmark", snapshot="none")


def _work(rank: int, port: int, folder: Path, changes: dict[str, Any], die_at: int | None) -> None:
    """One worker of a group; rank 0 leaves the weights if the run ends."""
    torch.set_num_threads(1)
    config = _config(**changes)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.num_workers}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    if config.num_workers > 1 or config.engine == "deepspeed":
        os.environ |= {name: str(value) for name, value in place.items()}
    context = LocalContext(rank, config.num_workers)
    stream = Stream(rank, config.num_workers, die_at)
    outcome = fit(_objective(), stream, config, context, _files(folder))
    if rank == 0:
        torch.save(outcome.weights, folder / "weights.pt")


def _run(folder: Path, changes: dict[str, Any], dies: tuple[int, int] | None = None) -> bool:
    """Trains in processes of their own, until the end (true) or until one is killed.

    Args:
        folder: of the run.
        changes: to the configuration.
        dies: rank and place at which it is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["raysynth.training.loop"])
    workers = []
    for rank in range(changes.get("num_workers", 1)):
        die_at = dies[1] if dies is not None and dies[0] == rank else None
        workers.append(spawn.Process(target=_work, args=(rank, port, folder, changes, die_at)))
    for worker in workers:
        worker.start()
    if dies is not None:
        workers[dies[0]].join(timeout=300)
        for worker in workers:  # as a supervisor would
            worker.kill()
    for worker in workers:
        worker.join(timeout=300)
    return all(worker.exitcode == 0 for worker in workers)


def _seen(folder: Path) -> int:
    checkpoint = CheckpointFolder(_files(folder).checkpoints, 3).newest_valid()
    return 0 if checkpoint is None else int(checkpoint.state["standing"]["seen_samples"])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return weights


def _losses(folder: Path) -> list[float]:
    return [point["loss"] for point in read_history(_files(folder).log / HISTORY_FILE)]


def _killed_workers(folder: Path, kills: int) -> Count:
    count, chance = Count("R6"), random.Random(0)
    whole = {}
    for workers in (1, 2):
        _run(folder / f"whole{workers}", {"num_workers": workers, "open_shards": 2})
        whole[workers] = _weights(folder / f"whole{workers}")
    run = 0
    while count.faults < kills:
        workers, place = chance.choice((1, 2)), folder / f"run{run}"
        changes = {"num_workers": workers, "open_shards": 2}
        run += 1
        while count.faults < kills:
            before = _seen(place)
            die_at = before + BATCH * chance.randint(1, 2 * INTERVAL // BATCH)
            if die_at >= LENGTH:
                break
            _run(place, changes, (chance.randrange(workers), die_at))
            count.faults += 1
            again = die_at - _seen(place)
            count.worst = max(count.worst, again)
            if again > 2 * INTERVAL or _seen(place) < before:
                count.lose(f"killed at {die_at}, {again} samples have to be done again")
        if not _run(place, changes):
            count.lose(f"run {run} does not go on")
            continue
        found = _weights(place)
        if not all(torch.equal(found[name], one) for name, one in whole[workers].items()):
            count.lose(f"run {run} of {workers} workers ends with other weights")
    return count


def _killed_saves(folder: Path, saves: int) -> Count:
    count, chance = Count("R7"), random.Random(0)
    checkpoints = CheckpointFolder(folder, keep=2)
    _write_one(checkpoints, 0)
    # How many file operations a save has; each of them is as likely to be the last one.
    operations = 1
    while _dies_writing(checkpoints, 1, operations):
        operations += 1
    for number in range(2, saves + 2):
        _dies_writing(checkpoints, number, chance.randint(1, operations - 1))
        count.faults += 1
        found = checkpoints.newest_valid()
        if found is None or found.state["seen"] < number - 1:
            count.lose(f"save {number}: {found}")
        _write_one(checkpoints, number)
    return count


def _write_one(checkpoints: CheckpointFolder, number: int) -> None:
    checkpoints.stage(number)
    saver = Saver(checkpoints, rank=0, world_size=1)
    saver.save(
        number, {Key("weight", "w", 0): torch.full((1000,), float(number))}, {"seen": number}
    )
    saver.wait()


def _dies_writing(checkpoints: CheckpointFolder, number: int, operation: int) -> bool:
    """Writes in a child that dies at its n-th file operation; false if it ended before."""
    child = os.fork()
    if child == 0:
        operations = 0

        def count(event: str, _: object) -> None:
            nonlocal operations
            if event == "open" or event.startswith(("os.", "shutil.")):
                operations += 1
                if operations == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            _write_one(checkpoints, number)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def _changed_engines(folder: Path) -> Count:
    count = Count("R8")
    _run(folder / "whole", {"max_seen_samples": 120})
    whole = _losses(folder / "whole")
    for number, path in enumerate(PATHS):
        place = folder / str(number)
        for step, changes in enumerate(path, start=1):
            stop = {"max_seen_samples": INTERVAL * step, "open_shards": 2}
            if not _run(place, changes | stop):
                count.lose(f"{path} fails at {changes}")
                break
            count.faults += step > 1
        losses = _losses(place)
        apart = max(abs(a - b) for a, b in zip(losses, whole, strict=False))
        count.worst = max(count.worst, apart)
        if apart > 1e-6 or len(losses) != len(path) * INTERVAL // BATCH:
            count.lose(f"{path}: losses differ by {apart:g}")
    return count


def _broken_batches(folder: Path) -> Count:
    count, chance = Count("R9"), random.Random(0)
    kinds = ("not a number", "air", "constant", "absurdly bright")
    for number in range(20):
        kind, at = kinds[number % len(kinds)], BATCH * chance.randrange(2, 12)
        stream, objective = Stream(0, 1), _objective()
        broken = _Broken(objective, kind, at)
        config = _config(max_seen_samples=15 * BATCH)
        place = folder / str(number)
        outcome = fit(broken, stream, config, LocalContext(), _files(place))
        count.faults += 1
        if not all(bool(torch.isfinite(one).all()) for one in outcome.weights.values()):
            count.lose(f"{kind}: the average is not finite")
        if outcome.now.skipped_steps != (kind == "not a number"):
            count.lose(f"{kind}: {outcome.now.skipped_steps} steps skipped")
    return count


class _Broken:
    """The objective, with one batch that is not as it should be."""

    def __init__(self, objective: AutoencoderObjective, kind: str, at: int) -> None:
        self.inner, self.kind, self.at = objective, kind, at
        self.module, self.columns = objective.module, objective.columns

    def loss(self, module: Any, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        is_broken = int(batch["position"][0]) == self.at
        values = {"air": -1000, "constant": 40, "absurdly bright": 32767}
        if is_broken and self.kind in values:
            batch = batch | {"hu": np.full_like(batch["hu"], values[self.kind])}
        terms = self.inner.loss(module, batch, device)
        factor = math.nan if is_broken and self.kind == "not a number" else 1.0
        return {name: term * factor for name, term in terms.items()}

    def preview(self, module: Any, batch: Batch, device: torch.device) -> Any:
        return self.inner.preview(module, batch, device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
