from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.data.stream import GlobalOrder, SampleStream
from raysynth.errors import InputError
from raysynth.store.reader import SampleSet
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.shards import Packed
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import sample_set

COUNT = 200

rows_of_a_set = st.sets(st.integers(0, 400), min_size=1, max_size=200).map(
    lambda chosen: np.array(sorted(chosen), np.int64)
)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_a_set, shard=st.integers(1, 64), lanes=st.integers(1, 9), seed=st.integers(0))
def test_an_epoch_shows_every_row_and_repeats_fewer_than_the_lanes(
    rows: np.ndarray, shard: int, lanes: int, seed: int
) -> None:
    order = GlobalOrder(rows, shard, lanes, seed)
    for epoch in range(3):
        start = epoch * order.epoch_length
        seen = Counter(order.at(np.arange(start, start + order.epoch_length)).tolist())
        assert set(seen) == set(rows.tolist())
        assert order.epoch_length - len(rows) < lanes
        if len(rows) >= lanes:
            assert max(seen.values()) <= 2


@settings(max_examples=60, deadline=None)
@given(
    rows=rows_of_a_set,
    lanes=st.integers(1, 9),
    batch=st.integers(1, 50),
    start=st.integers(0, 2000),
)
def test_the_order_is_a_function_of_the_position(
    rows: np.ndarray, lanes: int, batch: int, start: int
) -> None:
    whole = GlobalOrder(rows, 16, lanes, seed=3).at(np.arange(2100))
    resumed = GlobalOrder(rows, 16, lanes, seed=3)
    positions = np.arange(start, min(start + batch, 2100))
    np.testing.assert_array_equal(resumed.at(positions), whole[positions])


def test_a_lane_stays_in_one_shard_until_it_is_used_up() -> None:
    rows, lanes = np.arange(64 * 32), 8
    order = GlobalOrder(rows, 64, lanes, seed=1)
    shards = order.at(np.arange(order.epoch_length)) // 64
    for lane in range(lanes):
        changes = np.flatnonzero(np.diff(shards[lane::lanes]))
        assert len(changes) == 3  # 4 shards a lane, each visited once, end to end
    assert len(set(shards[:8].tolist())) == 8


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    """Four shards of samples that show their row number; every fifth one tests."""
    url = tmp_path_factory.mktemp("stream") / "store"
    rows = np.arange(COUNT, dtype=np.int16)
    hu = np.broadcast_to(rows[:, None, None], (COUNT, 4, 4)).copy()

    def build(root: zarr.Group) -> None:
        attributes = {
            "kind": "slices",
            "pixel_mm": 1.0,
            "intensity": "hu",
            "cases": ["a"],
            "parent_snapshot": "none",
            "fingerprint": "none",
            "settings": {},
            "spacing_mm": 1.0,
            "field_of_view_mm": 4.0,
        }
        group = create_sample_set(root, "samples/numbered", sample_set(COUNT, (4, 4)), attributes)
        set_index(group, {"split": np.where(rows % 5, 0, 2), "z_mm": rows})
        write_rows(group, 0, {"hu": hu, "layout": np.zeros((COUNT, 4, 4), np.uint8)})

    with StoreRun(url, "shard", "numbered") as run:
        run.declare(build, "numbered")
        run.publish("numbered")
    return SampleSet(open_root(url)["samples/numbered"])


def stream(samples: SampleSet, **options: int) -> SampleStream:
    return SampleStream(
        samples, ("hu", "z_mm"), seed=5, global_batch_size=16, open_shards=4, **options
    )


def take(stream: SampleStream, count: int, seen: int = 0) -> list[dict[str, np.ndarray]]:
    batches = stream.batches(seen)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def test_a_batch_holds_the_rows_of_its_positions(numbered: SampleSet) -> None:
    source = stream(numbered)
    for batch in take(source, 25):
        rows = source.order.at(batch["position"])
        np.testing.assert_array_equal(batch["hu"], np.tile(rows[:, None, None], (1, 4, 4)))
        np.testing.assert_array_equal(batch["z_mm"], rows)
        assert (rows % 5 > 0).all()
    assert len(source._open) <= 4
    assert len(source._fetched) <= 8  # what comes next in each lane, and the one after at most


@pytest.mark.parametrize(("batch_size", "lanes"), [(16, 1), (2, 4)])
def test_a_shard_is_fetched_once_an_epoch(
    numbered: SampleSet, monkeypatch: pytest.MonkeyPatch, batch_size: int, lanes: int
) -> None:
    fetched: list[int] = []
    fetch = SampleSet.fetch

    def count(samples: SampleSet, name: str, start: int, stop: int) -> Packed:
        fetched.append(start)
        return fetch(samples, name, start, stop)

    monkeypatch.setattr(SampleSet, "fetch", count)
    source = SampleStream(
        numbered, ("hu",), seed=5, global_batch_size=batch_size, open_shards=lanes
    )
    num_shards = len(np.unique(source.order.rows // numbered.rows_per_shard))
    take(source, 3 * source.order.epoch_length // batch_size)
    # Three epochs, what was fetched ahead, and shards that end one lane and begin the next.
    assert num_shards <= len(fetched) <= 3 * num_shards + 3 * lanes


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_share_the_order_of_one(numbered: SampleSet, world_size: int) -> None:
    alone = take(stream(numbered), 12)
    shares = [
        take(stream(numbered, rank=rank, world_size=world_size), 12) for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        together = {name: np.concatenate([part[name] for part in parts]) for name in whole}
        order = np.argsort(together["position"])
        for name, values in whole.items():
            np.testing.assert_array_equal(together[name][order], values)


def test_a_stream_can_be_read_again(numbered: SampleSet) -> None:
    source = stream(numbered)
    first, again = take(source, 4), take(source, 4)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["hu"], other["hu"])


def test_a_resumed_stream_goes_on_where_it_stopped(numbered: SampleSet) -> None:
    uninterrupted = take(stream(numbered), 15)
    resumed = take(stream(numbered), 5, seen=10 * 16)
    for expected, batch in zip(uninterrupted[10:], resumed, strict=True):
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name], values)


def test_fewer_samples_than_a_batch_wrap_around(numbered: SampleSet) -> None:
    few = SampleStream(
        numbered, ("hu",), seed=0, global_batch_size=128, open_shards=8, split="test"
    )
    [batch] = take(few, 1)
    assert batch["hu"].shape == (128, 4, 4)
    assert set(batch["hu"][:40, 0, 0].tolist()) == set(range(0, COUNT, 5))


def test_a_split_without_samples_is_refused(numbered: SampleSet) -> None:
    with pytest.raises(InputError, match="no val samples among its 200"):
        SampleStream(numbered, ("hu",), seed=0, global_batch_size=8, split="val")


def test_an_error_of_the_reader_reaches_the_consumer(numbered: SampleSet) -> None:
    broken = SampleStream(numbered, ("no_such_array",), seed=0, global_batch_size=8)
    with pytest.raises(InputError, match="no_such_array"):
        take(broken, 1)
