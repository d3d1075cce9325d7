"""Work in units, each the owner of its shards: one Ray Data task a unit, committed as they end."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import zarr
from icechunk import ForkSession

from raysynth.progress import Progress, progress
from raysynth.session import check_resources
from raysynth.store.run import StoreRun

MAX_COMMIT_SHARE = 0.2
"""Of the wall time, where units are tiny; of whole scans it is below a hundredth. What a killed
driver loses is what came back since the last commit."""

Write = Callable[[zarr.Group, Any], Any]
"""Writes a unit below a writable root. None: done; anything else says why nothing was written."""

Meanwhile = Callable[[Progress], AbstractContextManager[Any]]
"""Entered with the progress view for as long as units are written."""


def write_units(
    run: StoreRun,
    units: Mapping[str, Any],
    write: Write,
    *,
    stage: str,
    noun: str,
    num_actors: int | None = None,
    num_cpus: int = 1,
    num_gpus: int = 0,
    meanwhile: Meanwhile = nullcontext,
) -> dict[str, Any]:
    """Writes the units that the run has not committed yet, on the cluster.

    Every task writes through its own fork of the run; the driver merges and commits. A task that is
    repeated after a lost worker writes the same unit again, and only what came back counts.

    Args:
        run: which commits them.
        units: key -> what `Write` needs to know of it; picklable.
        write: picklable. An actor gets one copy for all its units, which may keep a model.
        stage: name of the stage, for the progress view.
        noun: what the units are, for people.
        num_actors: processes that keep their copy of `write`; None: any free core takes a unit.
        num_cpus: cores of each task or actor.
        num_gpus: of each actor.
        meanwhile: what else the driver does.

    Returns:
        Key -> reason for each unit that was not written.
    """
    refused: dict[str, Any] = {}
    waiting = {key: unit for key, unit in units.items() if key not in run.completed}
    committer = _Committer(run, noun)
    with progress(stage, len(units), noun) as view, meanwhile(view):
        view.resume(len(units) - len(waiting))
        if waiting:
            check_resources(1, {"CPU": num_cpus, "GPU": num_gpus}, stage)
        fork = pickle.dumps(run.fork())
        for key, filled, reason in _run(fork, waiting, write, num_actors, num_cpus, num_gpus):
            if filled is None:
                refused[key] = reason
            else:
                committer.add(key, filled)
            view.advance()
        committer.commit()
    return refused


class _Committer:
    """Commits finished units at once, or several together where commits would slow the run down."""

    def __init__(self, run: StoreRun, noun: str) -> None:
        self.run, self.noun = run, noun
        self.forks: dict[str, ForkSession] = {}
        self.not_before = 0.0

    def add(self, key: str, fork: ForkSession) -> None:
        self.forks[key] = fork
        if time.monotonic() >= self.not_before:
            self.commit()

    def commit(self) -> None:
        if not self.forks:
            return
        started = time.monotonic()
        self.run.commit(self.forks.values(), list(self.forks), f"{len(self.forks)} {self.noun}")
        self.forks = {}
        ended = time.monotonic()
        self.not_before = ended + (ended - started) / MAX_COMMIT_SHARE


def _run(
    fork: bytes,
    units: Mapping[str, Any],
    write: Write,
    num_actors: int | None,
    num_cpus: int,
    num_gpus: int,
) -> Iterator[tuple[str, ForkSession | None, Any]]:
    """Key, fork and reason of every unit, in the order in which they end."""
    if not units:
        return
    import ray

    rows = [{"unit": pickle.dumps(unit)} for unit in units.items()]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    if num_actors is None:
        ended = dataset.map(partial(_write_unit, fork=fork, write=write), num_cpus=num_cpus)
    else:
        most = min(num_actors, len(rows))
        # A unit takes minutes: an actor that held a second one would keep it from an idle one, and
        # a pool that is full at one unit each must grow then, and not at several.
        scaling = ray.data.DataContext.get_current().autoscaling_config
        scaling.actor_pool_util_upscaling_threshold = 0.99
        ended = dataset.map(
            _Actor,  # type: ignore[arg-type]  # Ray's types know no callable classes here
            fn_constructor_args=(fork, write),
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
    for row in ended.iter_rows():
        yield pickle.loads(row["ended"])


class _Actor:
    def __init__(self, fork: bytes, write: Write) -> None:
        self.fork, self.write = fork, write

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _write_unit(row, self.fork, self.write)


def _write_unit(row: dict[str, Any], fork: bytes, write: Write) -> dict[str, Any]:
    key, unit = pickle.loads(row["unit"])
    # A fresh copy each time: it must come back with this unit's shards alone.
    session: ForkSession = pickle.loads(fork)
    reason = write(zarr.open_group(session.store, mode="r+", zarr_format=3), unit)
    return {"ended": pickle.dumps((key, session if reason is None else None, reason))}
