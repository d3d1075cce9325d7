"""The direct reader gives what zarr-python gives, and no flipped bit passes."""

from __future__ import annotations

import json
import pickle
import traceback
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from raysynth.errors import DamagedStore, InputError, RaysynthError
from raysynth.store.reader import SampleSet, open_group, read_case
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.shards import ShardedArray
from raysynth.store.writer import _create_array, create_sample_set, set_index, write_rows
from storage_schema.spec import ArraySpec
from storage_schema.v1 import sample_set
from tests.store.conftest import SET_ATTRIBUTES, invented_samples


@st.composite
def arrays(draw: st.DrawFn) -> tuple[ArraySpec, int, int]:
    """An array of one to three axes with uneven edges, and a range of its rows."""
    dims = draw(st.integers(1, 3))
    shape, chunk, shard = [], [], []
    for _ in range(dims):
        shape.append(draw(st.integers(1, 9)))
        chunk.append(draw(st.integers(1, 4)))
        shard.append(chunk[-1] * draw(st.integers(1, 3)))
    dtype = draw(st.sampled_from(["uint8", "int16", "float16", "float32", "uint64"]))
    start = draw(st.integers(0, shape[0]))
    stop = draw(st.integers(start, shape[0]))
    names = ("a", "b", "c")[:dims]
    spec = ArraySpec("x", dtype, names, tuple(shape), tuple(chunk), tuple(shard), 7, "")
    return spec, start, stop


@given(arrays(), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_equals_zarr_python(array: tuple[ArraySpec, int, int], seed: int) -> None:
    spec, start, stop = array
    root = zarr.create_group(MemoryStore())
    values = np.random.default_rng(seed).integers(0, 100, spec.shape).astype(spec.dtype)
    values[: len(values) // 2] = spec.fill
    keys = []
    for writer in (_write_with_zarr, ShardedArray.write):
        _create_array(root, spec)
        array = ShardedArray(root.store, "x")
        writer(array, 0, values)
        keys.append(sync(_keys(root.store)))
        np.testing.assert_array_equal(root["x"][:], values)
        read = array.read(start, stop)
        np.testing.assert_array_equal(read, values[start:stop])
        np.testing.assert_array_equal(array.unpack(array.fetch(start, stop)), read)
        assert read.dtype == np.dtype(spec.dtype)
        del root["x"]
    assert keys[0] == keys[1]


def _write_with_zarr(array: ShardedArray, _: int, values: np.ndarray) -> None:
    # Chunks that hold nothing but the fill value are stored too.
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(array._store, path=array.path)[:] = values


async def _keys(store: Store) -> set[str]:
    return {key async for key in store.list_prefix("x/c")}


def test_what_nobody_wrote_does_not_read_as_air() -> None:
    root = zarr.create_group(MemoryStore())
    attributes = {**SET_ATTRIBUTES, "cases": []}
    group = create_sample_set(root, "samples/s", sample_set(130, (4, 4)), attributes)
    samples = SampleSet(group)
    # What equals the fill value is stored all the same.
    set_index(group, {"nodule": np.full(130, -1)})
    assert samples.index["nodule"].tolist() == [-1] * 130
    with pytest.raises(DamagedStore, match="index/box was never written"):
        assert len(samples.index["box"])
    write_rows(group, 64, {"hu": np.full((64, 4, 4), -1000, np.int16)})
    assert samples.read("hu", 70, 80).min() == -1000
    with pytest.raises(DamagedStore, match=r"shard \[0, 0, 0\] of samples/s/hu was never written"):
        samples.read("hu")
    group["hu"][128:129] = 5
    with pytest.raises(DamagedStore, match="in part only"):
        samples.read("hu", 128, 130)


def test_rows_outside_are_an_error(read_only_store: str) -> None:
    samples = SampleSet(open_root(read_only_store)["samples/slices"])
    with pytest.raises(IndexError, match=r"\[0, 131\) of 130"):
        samples.read("hu", 0, 131)


def test_a_sample_set_can_be_sent_to_a_worker(read_only_store: str) -> None:
    samples = SampleSet(open_root(read_only_store)["samples/slices"])
    samples.read("hu", 0, 1)
    sent = pickle.loads(pickle.dumps(samples))
    np.testing.assert_array_equal(sent.read("hu"), invented_samples()["hu"])


def flip_a_bit(file: Path, random: np.random.Generator) -> bytes:
    """Flips one random bit and returns what was there."""
    original = file.read_bytes()
    damaged = bytearray(original)
    damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
    file.write_bytes(damaged)
    return original


def read_everything(store: str) -> dict[str, object]:
    """All that the store holds, by path."""
    root = open_root(store)
    case = read_case(root, "case-a")
    samples = SampleSet(open_group(root, "samples/slices"))
    latents = SampleSet(open_group(root, "latents/slices/bundle"))
    drawn = SampleSet(open_group(root, "synthetic/run"))
    return {
        "volume": (case.volume.hu, case.volume.direction, case.volume.spacing_mm),
        "layout": case.layout,
        "nodule": (case.nodules[0].mask, case.nodules[0].ratings),
        "samples": [samples.read(name) for name in invented_samples()],
        "latents": latents.read("latents"),
        "attributes": (samples.attrs, latents.attrs, drawn.attrs),
        "drawn": ([drawn.read(name) for name in invented_samples()], dict(drawn.index)),
        "index": dict(samples.index),
    }


def test_every_flipped_bit_of_a_shard_is_seen(store: str) -> None:
    random = np.random.default_rng(5)
    files = sorted(Path(store, "chunks").iterdir())
    for _ in range(100):
        file = files[random.integers(len(files))]
        original = flip_a_bit(file, random)
        with pytest.raises(DamagedStore):
            read_everything(store)
        file.write_bytes(original)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chunks", "manifests", "snapshots", "refs", "transactions"])
def test_a_flipped_bit_of_any_file_is_seen_or_harmless(store: str, kind: str) -> None:
    random = np.random.default_rng(6)
    truth = {path: pickle.dumps(value) for path, value in read_everything(store).items()}
    files = sorted(file for file in Path(store, kind).rglob("*") if file.is_file())
    seen = harmless = 0
    for _ in range(200):
        file = files[random.integers(len(files))]
        original = flip_a_bit(file, random)
        try:
            read = read_everything(store)
        except RaysynthError:
            seen += 1
        except Exception as error:
            # zarr-python reads a group's metadata, and has many words for what it cannot read.
            frames = traceback.walk_tb(error.__traceback__)
            if not any(frame.f_globals["__name__"].startswith("zarr.") for frame, _ in frames):
                raise
            seen += 1
        else:
            for path, value in read.items():
                assert pickle.dumps(value) == truth[path], path
            harmless += 1
        file.write_bytes(original)
    # Every byte of a shard counts. Who only reads needs no log of transactions.
    assert (harmless > 0) == (kind != "chunks")
    assert (seen > 0) == (kind != "transactions")


def test_changed_attributes_are_seen(store: str) -> None:
    def change(root: zarr.Group) -> None:
        root["volumes/case-a"].attrs["spacing_mm"] = [2.5, 0.7, 0.8]
        root["samples/slices"].attrs["pixel_mm"] = 1.6

    with StoreRun(store, "spoil", "1") as run:
        run.declare(change, "")
        run.publish("")
    root = open_root(store)
    with pytest.raises(DamagedStore, match="attributes of volumes/case-a"):
        read_case(root, "case-a")
    with pytest.raises(DamagedStore, match="attributes of samples/slices"):
        SampleSet(root["samples/slices"])


def test_a_lost_or_cut_shard_is_named(store: str) -> None:
    samples = SampleSet(open_root(store)["samples/slices"])
    for file in Path(store, "chunks").iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DamagedStore, match="samples/slices/hu"):
        samples.read("hu")
    for file in Path(store, "chunks").iterdir():
        file.unlink()
    with pytest.raises(DamagedStore, match="samples/slices/hu"):
        SampleSet(open_root(store)["samples/slices"]).read("hu")


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle"}]},
        {"codecs": []},
        {"data_type": "string"},
        {"data_type": "vlen-bytes", "fill_value": ""},
        {"shape": [2**41, 4]},
        {"shape": [4, 2**40]},
        {"shape": [5]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 4]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**20, 2**20]}}},
        {"storage_transformers": [{"name": "evil"}]},
        {"zarr_format": 2},
    ],
)
def test_foreign_arrays_are_not_decoded(change: dict[str, object]) -> None:
    root = zarr.create_group(MemoryStore())
    _create_array(root, ArraySpec("x", "int16", ("a", "b"), (8, 4), (1, 4), (4, 4), 0, ""))
    metadata = json.loads(json.dumps(root["x"].metadata.to_dict())) | change
    from zarr.core.buffer import default_buffer_prototype

    raw = default_buffer_prototype().buffer.from_bytes(json.dumps(metadata).encode())
    sync(root.store.set("x/zarr.json", raw))
    with pytest.raises(InputError, match="x"):
        ShardedArray(root.store, "x")
