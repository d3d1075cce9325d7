from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raysynth.config import ExperimentConfig
from raysynth.data import units
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.store.repository import open_repository
from raysynth.store.validate import validate
from tests.data.tiny import content, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

CRASHES = [
    ("before-commit", 1),  # of what is planned: nothing is there yet
    ("after-commit", 1),
    ("before-merge", 1),
    ("before-commit", 1),  # merged, and not committed
    ("before-merge", 2),
    ("before-commit", 1),
    ("before-publish", 1),
    ("before-publish", 1),
    ("before-commit", 1),  # of the note that the run is published
    ("before-branch-is-deleted", 1),
]
"""Where the driver of a stage dies, one time after the other."""

FEW_CRASHES = [CRASHES[3], CRASHES[6]]
"""In the midst of a commit, and with all units but no publication."""


def start(
    verb: str, work_dir: Path, place: str = "nowhere", count: int = 0
) -> subprocess.Popen[str]:
    arguments = [verb, str(work_dir), place, str(count)]
    command = [sys.executable, "-m", "tests.data.crashing_run", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def assert_as_if_nothing_happened(work_dir: Path, clean: ExperimentConfig) -> None:
    config = tiny_config(work_dir)
    assert content(config.store_url) == content(clean.store_url)
    assert validate(config.store_url, full=True) == []
    repository = open_repository(config.store_url)
    published = {snapshot.id for snapshot in repository.ancestry(branch="main")}
    assert {repository.lookup_branch(name) for name in repository.list_branches()} <= published


def finish(verb: str, work_dir: Path) -> None:
    process = start(verb, work_dir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def test_killed_drivers_resume(tmp_path: Path, phantom_store: ExperimentConfig) -> None:
    """Each stage is killed twice, or ten times with RAYSYNTH_ALL_FAULTS=1 (10 minutes)."""
    crashes = CRASHES if os.environ.get("RAYSYNTH_ALL_FAULTS") else FEW_CRASHES
    for verb in ("ingest", "shard"):
        for place, count in crashes:
            process = start(verb, tmp_path, place, count)
            _, errors = process.communicate(timeout=300)
            assert process.returncode == -signal.SIGKILL, (verb, place, errors)
        finish(verb, tmp_path)
    assert_as_if_nothing_happened(tmp_path, phantom_store)


def wait_for_the_run(process: subprocess.Popen[str], work_dir: Path) -> None:
    """Until the process holds the store's lock, so is in its run; or ends, with nothing to do."""
    lock = Path(f"{tiny_config(work_dir).store_url}.lock")
    deadline = time.monotonic() + 120
    while process.poll() is None:
        if lock.exists() and f"(process {process.pid} on" in lock.read_text():
            return
        assert time.monotonic() < deadline, "the driver does not come to its run"
        time.sleep(0.02)


@pytest.mark.skipif(
    "RAYSYNTH_ALL_FAULTS" not in os.environ, reason="chosen places are killed; RAYSYNTH_ALL_FAULTS"
)
def test_drivers_killed_at_random_times_resume(
    tmp_path: Path, phantom_store: ExperimentConfig
) -> None:
    when = random.Random(0)
    for verb in ("ingest", "shard"):
        # The first kill hits in any case; the second may come when all is done.
        for delay_s in (0.0, when.uniform(0.0, 3.0)):
            process = start(verb, tmp_path)
            wait_for_the_run(process, tmp_path)
            time.sleep(delay_s)
            process.kill()
            _, errors = process.communicate(timeout=60)
            killed = process.returncode == -signal.SIGKILL
            assert killed or (process.returncode == 0 and delay_s > 0), errors
        finish(verb, tmp_path)
    assert_as_if_nothing_happened(tmp_path, phantom_store)


WriteUnit = Callable[[dict[str, Any], bytes, Any], dict[str, Any]]


def dying_twice(write_unit: WriteUnit, notes: Path) -> WriteUnit:
    """`write_unit`, but a worker is killed that begins with a unit, and one that has written it.

    Ray repeats a task three times: two kills cannot be too many, whichever units they hit.
    """

    # Ray ships a function inside a function as it is: its workers need not import this module.
    def write(row: dict[str, Any], fork: bytes, write: Any) -> dict[str, Any]:
        def die_once(name: str) -> None:
            with suppress(FileExistsError):
                (notes / name).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)

        die_once("before")
        ended = write_unit(row, fork, write)
        die_once("after")
        return ended

    return write


def test_killed_workers_are_replaced(
    tmp_path: Path, phantom_store: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write_unit = tiny_config(tmp_path), units._write_unit
    for stage in (ingest, shard):
        notes = tmp_path / f"killed-{stage.__name__}"
        notes.mkdir()
        monkeypatch.setattr(units, "_write_unit", dying_twice(write_unit, notes))
        stage(config)
        assert {path.name for path in notes.iterdir()} == {"before", "after"}
    assert_as_if_nothing_happened(tmp_path, phantom_store)
