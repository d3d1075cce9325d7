from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from raysynth.config import ExperimentConfig
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


def test_drivers_killed_ten_times_each_resume(
    tmp_path: Path, phantom_store: ExperimentConfig
) -> None:
    for verb in ("ingest", "shard"):
        for place, count in CRASHES:
            process = start(verb, tmp_path, place, count)
            _, errors = process.communicate(timeout=300)
            assert process.returncode == -signal.SIGKILL, (verb, place, errors)
        finish(verb, tmp_path)
    assert_as_if_nothing_happened(tmp_path, phantom_store)


def test_drivers_killed_at_random_times_resume(
    tmp_path: Path, phantom_store: ExperimentConfig
) -> None:
    when = random.Random(0)
    for verb in ("ingest", "shard"):
        for _ in range(3):
            process = start(verb, tmp_path)
            time.sleep(when.uniform(3.0, 9.0))
            process.kill()
            _, errors = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), errors
        finish(verb, tmp_path)
    assert_as_if_nothing_happened(tmp_path, phantom_store)


def test_killed_workers_are_replaced(tmp_path: Path, phantom_store: ExperimentConfig) -> None:
    config, killed, finished = tiny_config(tmp_path), 0, threading.Event()

    def kill_tasks() -> None:
        nonlocal killed
        when = random.Random(1)
        while not finished.is_set() and killed < 5:
            time.sleep(when.uniform(0.2, 1.0))
            # Only this process's own cluster: a Ray worker is named after what it runs.
            for worker in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # gone since, or a zombie
                    if any("ray::Map" in text for text in worker.cmdline()):
                        worker.kill()
                        killed += 1
                        break

    killer = threading.Thread(target=kill_tasks)
    killer.start()
    try:
        ingest(config)
        shard(config)
    finally:
        finished.set()
        killer.join()
    assert killed
    assert_as_if_nothing_happened(tmp_path, phantom_store)
