"""Ingests or shards the tiny recipe in a process that is killed where it is told to be.

Run as `python -m tests.data.crashing_run VERB WORK_DIR PLACE COUNT`: the process dies by SIGKILL
when it reaches PLACE for the COUNT-th time. The places are in `arm`; any other lets it finish.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icechunk

from raysynth.data import ingest, shard, units
from raysynth.session import connect
from raysynth.store.run import StoreRun
from tests.data.tiny import tiny_config


def main(verb: str, work_dir: Path, place: str, count: int) -> None:
    """Runs one stage, and dies where it is told to."""
    stage = {"ingest": ingest.ingest, "shard": shard.shard}[verb]
    arm(place, count)
    with connect(num_cpus=2):
        stage(tiny_config(work_dir))


def arm(place: str, count: int) -> None:
    """Lets this process die before a commit, between merge and commit, or around publishing."""
    units.MAX_COMMIT_SHARE = float("inf")  # every unit in a commit of its own
    kill_at = {
        "before-merge": (icechunk.Session, "merge", True),
        "before-commit": (icechunk.Session, "commit", True),
        "after-commit": (icechunk.Session, "commit", False),
        "before-publish": (StoreRun, "publish", True),
        "before-branch-is-deleted": (icechunk.Repository, "delete_branch", True),
    }
    if place in kill_at:
        owner, name, first = kill_at[place]
        setattr(owner, name, dying(getattr(owner, name), count, first))


def dying(function: Callable[..., Any], count: int, first: bool) -> Callable[..., Any]:
    """`function`, but its COUNT-th call kills the process: before its work, or after it."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if first and calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapper


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
