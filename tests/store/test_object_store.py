"""The same store behind an S3 interface: moto's server is a real endpoint, on this machine."""

from __future__ import annotations

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


def test_a_store_in_a_bucket(s3_url: str) -> None:
    with pytest.raises(InputError, match="cannot be opened: the repository doesn't exist"):
        open_root(s3_url)
    make_store(s3_url)
    assert validate(s3_url, full=True) == []


@pytest.mark.parametrize("kill_after", [1, 2, 4, 5, 11])
def test_resumes_wherever_it_was_stopped(s3_url: str, kill_after: int) -> None:
    with StoreRun(s3_url, "shard", "abc") as run:
        for _ in zip(range(kill_after), steps(run), strict=False):
            pass
    assert PATH not in open_root(s3_url)
    with StoreRun(s3_url, "shard", "abc") as run:
        list(steps(run))
    assert_complete(s3_url)


def test_a_kill_before_the_root_is_written(s3_url: str) -> None:
    # What open_repository does first, and no more.
    import icechunk

    from raysynth.store import repository

    icechunk.Repository.create(repository._s3_storage(s3_url))
    with pytest.raises(InputError, match="is not a raysynth store"):
        open_root(s3_url)
    with StoreRun(s3_url, "shard", "abc") as run:
        list(steps(run))
    assert_complete(s3_url)


def test_of_two_drivers_one_wins_and_one_is_told(s3_url: str) -> None:
    with StoreRun(s3_url, "shard", "slow") as slow:
        slow.declare(declare_samples, "Declare")
        slow.commit([fill(slow.fork(), 0)], ["rows-0"], "Rows 0")
        with StoreRun(s3_url, "shard", "fast") as fast:
            list(steps(fast))
        won = main_snapshot(s3_url)
        with pytest.raises(StoreConflict, match="branch run-shard-slow"):
            slow.publish("too late")
    assert main_snapshot(s3_url) == won
    kept = open_repository(s3_url).readonly_session("run-shard-slow").store
    rows = SampleSet(zarr.open_group(kept, mode="r")[PATH]).read("hu", 0, 64)
    np.testing.assert_array_equal(rows, invented_samples()["hu"][:64])


def test_two_drivers_of_one_run(s3_url: str) -> None:
    with StoreRun(s3_url, "shard", "abc") as first:
        first.declare(declare_samples, "Declare")
        with StoreRun(s3_url, "shard", "abc") as second:
            second.commit([fill(second.fork(), 0)], ["rows-0"], "Rows 0")
            with pytest.raises(StoreConflict, match="another process"):
                first.commit([fill(first.fork(), 0)], ["rows-0"], "Rows 0")
            second.publish("done")
