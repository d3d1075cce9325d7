"""The same store behind an S3 interface: moto's server is a real endpoint, on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from raysynth.errors import InputError, StoreConflict
from raysynth.store.reader import SampleSet
from raysynth.store.repository import main_snapshot, open_repository, open_root
from raysynth.store.run import StoreRun
from raysynth.store.validate import validate
from tests.store.conftest import declare_samples, invented_samples, make_store
from tests.store.test_run import PATH, assert_complete, fill, steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fresh S3 server with an empty bucket `bucket`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                bucket = urllib.request.Request(f"{address}/bucket", method="PUT")
                urllib.request.urlopen(bucket).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        else:
            pytest.fail("moto's server does not start")
        yield address
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/{os.getpid()}"


def test_a_store_in_a_bucket(url: str) -> None:
    with pytest.raises(InputError, match="cannot be opened: the repository doesn't exist"):
        open_root(url)
    make_store(url)
    assert validate(url, full=True) == []


@pytest.mark.parametrize("kill_after", [1, 2, 4, 5, 11])
def test_resumes_wherever_it_was_stopped(url: str, kill_after: int) -> None:
    with StoreRun(url, "shard", "abc") as run:
        for _ in zip(range(kill_after), steps(run), strict=False):
            pass
    assert PATH not in open_root(url)
    with StoreRun(url, "shard", "abc") as run:
        list(steps(run))
    assert_complete(url)


def test_a_kill_before_the_root_is_written(url: str) -> None:
    # What open_repository does first, and no more.
    import icechunk

    from raysynth.store import repository

    icechunk.Repository.create(repository._s3_storage(url))
    with pytest.raises(InputError, match="is not a raysynth store"):
        open_root(url)
    with StoreRun(url, "shard", "abc") as run:
        list(steps(run))
    assert_complete(url)


def test_of_two_drivers_one_wins_and_one_is_told(url: str) -> None:
    with StoreRun(url, "shard", "slow") as slow:
        slow.declare(declare_samples, "Declare")
        slow.commit([fill(slow.fork(), 0)], ["rows-0"], "Rows 0")
        with StoreRun(url, "shard", "fast") as fast:
            list(steps(fast))
        won = main_snapshot(url)
        with pytest.raises(StoreConflict, match="branch run-shard-slow"):
            slow.publish("too late")
    assert main_snapshot(url) == won
    kept = open_repository(url).readonly_session("run-shard-slow").store
    rows = SampleSet(zarr.open_group(kept, mode="r")[PATH]).read("hu", 0, 64)
    np.testing.assert_array_equal(rows, invented_samples()["hu"][:64])


def test_two_drivers_of_one_run(url: str) -> None:
    with StoreRun(url, "shard", "abc") as first:
        first.declare(declare_samples, "Declare")
        with StoreRun(url, "shard", "abc") as second:
            second.commit([fill(second.fork(), 0)], ["rows-0"], "Rows 0")
            with pytest.raises(StoreConflict, match="another process"):
                first.commit([fill(first.fork(), 0)], ["rows-0"], "Rows 0")
            second.publish("done")
