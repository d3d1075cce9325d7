"""Stores that somebody else wrote on purpose: refused by name, within bounds of time and memory.

What accidents and other software do is in `test_shards` and `test_validate`. Here every checksum
fits.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import icechunk
import numcodecs
import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from raysynth.data.inspect import inspect_store
from raysynth.errors import DamagedStore, InputError, RaysynthError
from raysynth.seeding import fingerprint
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.shards import ABSENT, ShardedArray
from raysynth.store.writer import _create_array
from storage_schema.spec import ArraySpec
from tests.bounds import bounds

SPEC = ArraySpec("x", "int16", ("a", "b"), (8, 4), (1, 4), (4, 4), 0, "")
Change = Callable[[dict[str, Any]], object]


def make(root: zarr.Group, spec: ArraySpec = SPEC) -> dict[str, Any]:
    """An array that raysynth could have written, and its metadata."""
    _create_array(root, spec)
    return json.loads(json.dumps(root[spec.name].metadata.to_dict()))


def put(root: zarr.Group, key: str, raw: bytes) -> None:
    sync(root.store.set(key, default_buffer_prototype().buffer.from_bytes(raw)))


def top(**values: Any) -> Change:
    return lambda metadata: metadata.update(values)


def grid(shape: Any) -> Change:
    return lambda metadata: metadata["chunk_grid"]["configuration"].update(chunk_shape=shape)


def sharding(**values: Any) -> Change:
    return lambda metadata: metadata["codecs"][0]["configuration"].update(values)


def inner(place: int, codec: Any) -> Change:
    """Puts another codec in the place of one of a chunk's."""
    return lambda metadata: metadata["codecs"][0]["configuration"]["codecs"].__setitem__(
        place, codec
    )


def blosc_of(**values: Any) -> Change:
    def change(metadata: dict[str, Any]) -> None:
        metadata["codecs"][0]["configuration"]["codecs"][1]["configuration"].update(values)

    return change


PICKLE = {"name": "numcodecs.pickle", "configuration": {}}

METADATA: dict[str, bytes | Change] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a list of metadata": b'[{"zarr_format": 3}]',
    "a text": b'"array"',
    "no text": b"\xff\xfe{",
    "50,000 lists in each other": b"[" * 50_000,
    "50,000 objects in each other": b'{"shape":' * 50_000,
    "a number of 5,000 digits": b'{"shape": [' + b"9" * 5_000 + b"]}",
    "no shape": lambda metadata: metadata.pop("shape"),
    "shape of no list": top(shape=8),
    "shape of text": top(shape=["8", "4"]),
    "shape in one text": top(shape="84"),
    "fractions": top(shape=[8.0, 4]),
    "not a number": top(shape=[math.nan, 4]),
    "endless": top(shape=[math.inf, 4]),
    "true": top(shape=[True, 4]),
    "negative": top(shape=[-8, 4]),
    "negative columns": top(shape=[8, -4]),
    "shape of shapes": top(shape=[[8], [4]]),
    "40 axes": top(shape=[8] * 40),
    "a million axes": top(shape=[1] * 1_000_000),
    "data type in a list": top(data_type=["int16"]),
    "data type in an object": top(data_type={"name": "int16", "configuration": {}}),
    "numpy's objects": top(data_type="|O"),
    "structured": top(data_type=[["a", "int16"]]),
    "a group": top(node_type="group"),
    "rectilinear": lambda metadata: metadata["chunk_grid"].update(name="rectilinear"),
    "keys of version 2": top(chunk_key_encoding={"name": "v2"}),
    "keys with dots": top(
        chunk_key_encoding={"name": "default", "configuration": {"separator": "."}}
    ),
    "no chunk grid": top(chunk_grid=[]),
    "shard of no list": grid(4),
    "shard of nothing": grid(None),
    "shard of fractions": grid([4.0, 4]),
    "shard of text": grid(["4", "4"]),
    "negative shard": grid([-4, -4]),
    "shard of 2^70 rows": grid([2**70, 4]),
    "shard no multiple of its chunks": sharding(chunk_shape=[3, 4]),
    "chunk larger than its shard": sharding(chunk_shape=[8, 4]),
    "chunk of other axes": sharding(chunk_shape=[4]),
    "chunk of fractions": sharding(chunk_shape=[1.0, 4]),
    "chunk in an object": sharding(chunk_shape={"0": 1}),
    "no chunk": lambda metadata: metadata["codecs"][0]["configuration"].pop("chunk_shape"),
    "codecs in an object": top(codecs={"name": "bytes"}),
    "two layers of shards": inner(0, {"name": "sharding_indexed", "configuration": {}}),
    "pickles in a chunk": inner(0, PICKLE),
    "pickles behind the checksum": lambda metadata: metadata["codecs"].append(PICKLE),
    "pickles in the index": lambda metadata: metadata["codecs"][0]["configuration"][
        "index_codecs"
    ].insert(0, PICKLE),
    "no checksum": lambda metadata: metadata["codecs"][0]["configuration"]["codecs"].pop(),
    "no checksum of the index": lambda metadata: metadata["codecs"][0]["configuration"][
        "index_codecs"
    ].pop(),
    "zstd": blosc_of(cname="zstd"),
    "other words": blosc_of(typesize=1),
    "index in front": sharding(index_location="start"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_raysynth_does_not_write(name: str) -> None:
    root = zarr.create_group(MemoryStore())
    metadata, change = make(root), METADATA[name]
    if isinstance(change, bytes):
        raw = change
    else:
        change(metadata)
        raw = json.dumps(metadata).encode()
    put(root, "x/zarr.json", raw)
    with bounds(), pytest.raises((InputError, DamagedStore), match="x ") as refusal:
        ShardedArray(root.store, "x")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


ROWS = (np.arange(256, dtype="<i2") // 3).reshape(4, 64)
BIG = ArraySpec("x", "int16", ("a", "b"), (4, 64), (1, 64), (4, 64), 0, "")
Entries = list[tuple[int, int]]


def checked(raw: bytes) -> bytes:
    return raw + struct.pack("<I", google_crc32c.value(raw))


def packed(row: np.ndarray, name: str = "lz4") -> bytes:
    return bytes(numcodecs.Blosc(name, 5, 1).encode(np.ascontiguousarray(row)))


def shard_of(
    change: Callable[[bytes], bytes] = lambda chunk: chunk,
    entries: Callable[[Entries], Sequence[tuple[int, int]]] = lambda found: found,
) -> bytes:
    """A shard whose second chunk and whose index are changed, with checksums that fit."""
    body, found = b"", []
    for number, row in enumerate(ROWS):
        chunk = packed(row)
        chunk = checked(change(chunk) if number == 1 else chunk)
        found.append((len(body), len(chunk)))
        body += chunk
    return body + checked(b"".join(struct.pack("<QQ", *entry) for entry in entries(found)))


def written(place: int, form: str, value: int) -> Callable[[bytes], bytes]:
    def change(chunk: bytes) -> bytes:
        changed = bytearray(chunk)
        struct.pack_into(form, changed, place, value)
        return bytes(changed)

    return change


def second(offset: int, size: int) -> Callable[[Entries], Entries]:
    """What the index says of the second chunk."""
    return lambda found: [found[0], (offset, size), *found[2:]]


SHARDS: dict[str, bytes] = {
    "empty": b"",
    "a byte": b"x",
    "nothing but an index": shard_of()[-68:],
    "no index": shard_of()[:-68],
    "half an index": shard_of()[:-40],
    "an index of zeros": shard_of()[:-68] + checked(bytes(64)),
    "chunk beyond the file": shard_of(entries=second(1 << 30, 100)),
    "chunk into the index and beyond": shard_of(entries=second(0, 1 << 20)),
    "sum beyond 64 bits": shard_of(entries=second(ABSENT - 3, 8)),
    "offset beyond 63 bits": shard_of(entries=second(1 << 63, 100)),
    "length beyond all": shard_of(entries=second(0, ABSENT)),
    "only its offset absent": shard_of(entries=second(ABSENT, 100)),
    "absent": shard_of(entries=second(ABSENT, ABSENT)),
    "no byte": shard_of(entries=second(0, 0)),
    "three bytes": shard_of(entries=second(0, 3)),
    "nothing but a checksum": shard_of(lambda chunk: b""),
    "half a header": shard_of(lambda chunk: chunk[:10]),
    "nothing but a header": shard_of(lambda chunk: chunk[:16]),
    "promises 2 GiB": shard_of(written(4, "<I", 2**31 - 1)),
    "promises 4 GiB": shard_of(written(4, "<I", 2**32 - 1)),
    "promises a byte less": shard_of(written(4, "<I", 127)),
    "is longer than it says": shard_of(lambda chunk: chunk + b"\0"),
    "says that it is longer": shard_of(written(12, "<I", 9999)),
    "blocks of nothing": shard_of(written(8, "<I", 0)),
    "blocks of 2 GiB": shard_of(written(8, "<I", 1 << 31)),
    "words of nothing": shard_of(written(3, "B", 0)),
    "version 255": shard_of(written(0, "B", 255)),
    "a codec nobody knows": shard_of(written(2, "B", 0xE1)),
    "starts beyond its end": shard_of(written(16, "<I", 1 << 30)),
    "starts before its start": shard_of(written(16, "<i", -8)),
    "noise": shard_of(lambda chunk: chunk[:20] + random.Random(0).randbytes(len(chunk) - 20)),
    "64 MiB of zeros in zstd": shard_of(lambda chunk: packed(np.zeros(1 << 25, "<i2"), "zstd")),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_raysynth_does_not_write(name: str) -> None:
    root = zarr.create_group(MemoryStore())
    make(root, BIG)
    put(root, "x/c/0/0", SHARDS[name])
    array = ShardedArray(root.store, "x")
    with bounds(), pytest.raises(DamagedStore, match=r"shard \[0, 0\] of x"):
        array.read()


def test_what_is_odd_but_whole_is_read() -> None:
    root = zarr.create_group(MemoryStore())
    make(root, BIG)
    array = ShardedArray(root.store, "x")
    put(root, "x/c/0/0", shard_of())
    np.testing.assert_array_equal(array.read(), ROWS)
    # Two chunks in one place, and another of the codecs that blosc has.
    put(root, "x/c/0/0", shard_of(entries=lambda found: [found[0], *found[:1], *found[2:]]))
    np.testing.assert_array_equal(array.read(), ROWS[[0, 0, 2, 3]])
    put(root, "x/c/0/0", shard_of(lambda chunk: packed(ROWS[1], "zstd")))
    np.testing.assert_array_equal(array.read(), ROWS)


def test_damaged_chunks_with_fitting_checksums() -> None:
    rng = random.Random(5)
    root = zarr.create_group(MemoryStore())
    make(root, BIG)
    array = ShardedArray(root.store, "x")
    outcomes = {"read": 0, "refused": 0}

    def damaged(chunk: bytes) -> bytes:
        changed = bytearray(chunk)
        for _ in range(rng.choice([1, 2, 5])):
            # The size of all and of the chunk are checked before: spare them.
            place = rng.choice([*range(4), *range(8, 12), *range(16, len(chunk))])
            changed[place] = rng.randrange(256)
        return bytes(changed)

    with bounds():
        for _ in range(1000):
            put(root, "x/c/0/0", shard_of(damaged))
            try:
                assert array.read().shape == (4, 64)
                outcomes["read"] += 1
            except DamagedStore:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_rows_that_no_memory_holds() -> None:
    root = zarr.create_group(MemoryStore())
    metadata = make(root)
    for rows, columns in ((2**40, 4), (2**40, 2**24)):
        metadata["shape"] = [rows, columns]
        put(root, "x/zarr.json", json.dumps(metadata).encode())
        array = ShardedArray(root.store, "x")
        with bounds(), pytest.raises(InputError, match="more than fits into memory"):
            array.read()
        with bounds(), pytest.raises(DamagedStore, match="never written"):
            array.read(0, 1)


Spoil = Callable[[zarr.Group], object]
CASE, SLICES = "volumes/case-a", "samples/slices"


def attributes(path: str, **values: Any) -> Spoil:
    """Changes attributes, and their checksum with them."""

    def spoil(root: zarr.Group) -> None:
        changed = {**root[path].attrs.asdict(), **values}
        changed.pop("checksum", None)
        changed = {name: value for name, value in changed.items() if value is not ...}
        root[path].attrs.put(changed | {"checksum": fingerprint(changed)})

    return spoil


def nodule(**values: Any) -> Spoil:
    def spoil(root: zarr.Group) -> None:
        (first, *_) = root[CASE].attrs["nodules"]
        attributes(CASE, nodules=[{**first, **values}])(root)

    return spoil


def array(path: str, **changes: Any) -> Spoil:
    """Rewrites some of an array's metadata."""

    def spoil(root: zarr.Group) -> None:
        metadata = json.loads(json.dumps(root[path].metadata.to_dict())) | changes
        put(root, f"{path}/zarr.json", json.dumps(metadata).encode())

    return spoil


def group(path: str, **fields: Any) -> Spoil:
    """Writes the metadata of a group anew."""
    metadata = {"zarr_format": 3, "node_type": "group", **fields}
    return lambda root: put(root, f"{path}/zarr.json", json.dumps(metadata).encode())


def array_instead(path: str) -> Spoil:
    def spoil(root: zarr.Group) -> None:
        if path in root:
            del root[path]
        root.create_array(path, shape=(2,), dtype="i1")

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda root: [spoil(root) for spoil in spoils]


DEEP: list[Any] = []
for _ in range(900):
    DEEP = [DEEP]

STORES: dict[str, tuple[Spoil, str]] = {
    # what was done, and a word of the problem that is found
    "nodule of 2^60 voxels": (nodule(shape=[2**20] * 3), "not those of a case"),
    "nodule of 8 GiB": (nodule(shape=[2**11] * 3), "not those of a case"),
    "nodule of negative size": (nodule(shape=[-3, -4, 5]), "not those of a case"),
    "nodule of two axes": (nodule(shape=[3, 4]), "zip"),
    "nodule without voxels": (nodule(voxels="!!!"), "not those of a case"),
    "nodule at 10^30": (nodule(corner_zyx=[10**30, 0, 0]), "reaches out"),
    "nodule of a text's size": (nodule(diameter_mm="large"), "not those of a case"),
    "a number of nodules": (attributes(CASE, nodules=7), "cannot be read"),
    "nodules of nothing": (attributes(CASE, nodules=[None]), "cannot be read"),
    "direction of words": (attributes(CASE, direction=["x"] * 9), "not those of a case"),
    "direction of two": (attributes(CASE, direction=[1, 0]), "not those of a case"),
    "lungs at 10^30": (attributes(CASE, lung_zyx=[[0, 10**30]] * 3), "not those of a case"),
    "lungs backwards": (attributes(CASE, lung_zyx=[[5, 1]] * 3), "not those of a case"),
    "planes of lungs beyond": (attributes(CASE, lung_planes=[[0, 9999]]), "not those of a case"),
    "many patients": (attributes(CASE, patient_key=["a", "b"]), "not those of a case"),
    "no split": (attributes(CASE, split=...), "split is missing"),
    "splits": (attributes(CASE, split=["train"]), "not one of train"),
    "deep attributes": (group(CASE, attributes={"source": DEEP}), "checksum|damaged"),
    "attributes in a list": (group(CASE, attributes=[1]), "damaged"),
    "fields to be understood": (group(CASE, evil={"must_understand": True}), "damaged"),
    "case of version 2": (
        lambda root: put(root, f"{CASE}/zarr.json", b'{"zarr_format":2,"node_type":"group"}'),
        "missing",
    ),
    "text in quarantine": (attributes("quarantine", entries="abc"), "no object"),
    "nothing in quarantine": (attributes("quarantine", entries=None), "cannot be read"),
    "numbers in quarantine": (attributes("quarantine", entries=[1]), "no object"),
    "cases are a number": (attributes(SLICES, cases=5), "cannot be read"),
    "cases are objects": (attributes(SLICES, cases=[{}]), "cannot be read"),
    "volumes are an array": (array_instead("volumes"), "no 'volumes'"),
    "samples are an array": (array_instead("samples"), "no 'samples'"),
    "a set is an array": (array_instead(SLICES), "array where a group"),
    "a case is an array": (array_instead(CASE), "array where a group"),
    "the index is an array": (array_instead(f"{SLICES}/index"), "no 'index'"),
    "an array is a group": (
        lambda root: root.create_group(f"{CASE}/hu", overwrite=True),
        "not decoded",
    ),
    "no quarantine": (lambda root: root.__delitem__("quarantine"), "no 'quarantine'"),
    "an index of 8 TiB": (array(f"{SLICES}/index/split", shape=[2**40]), "fits into memory"),
    "an index of a GiB": (array(f"{SLICES}/index/split", shape=[2**30]), "never written"),
    "a volume of 2^40 planes": (array(f"{CASE}/hu", shape=[2**40, 40, 150]), "never written"),
    "a set of 2^40 samples": (array(f"{SLICES}/hu", shape=[2**40, 24, 24]), "shape is"),
    "pickles": (array(f"{CASE}/hu", codecs=[PICKLE]), "not decoded"),
    "pickles in a column": (array(f"{SLICES}/index/split", codecs=[PICKLE]), "pickle"),
    "pickles beside the cases": (
        both(array_instead("volumes/x"), array("volumes/x", codecs=[PICKLE])),
        "damaged",
    ),
    "an unknown data type": (array(f"{CASE}/hu", data_type="evil"), "not decoded"),
    "text for a fill value": (array(f"{CASE}/hu", fill_value="x"), "cannot be read"),
}


@pytest.mark.parametrize("name", STORES)
def test_stores_that_raysynth_does_not_write(store: str, name: str) -> None:
    spoil, word = STORES[name]
    with StoreRun(store, "spoil", "1") as run:
        run.declare(spoil, "Spoil it")
        run.publish("spoiled")
    with bounds(max_bytes=128 << 20):
        try:
            told = " ".join(inspect_store(store).problems)
        except RaysynthError as error:
            told = str(error)
    assert any(part in told for part in word.split("|")), told
    assert "\n" not in told


def rewrite(folder: str, raw: bytes) -> Callable[[Path], object]:
    """Puts other bytes behind the header of every file of a kind."""

    def spoil(store: Path) -> None:
        for path in (store / folder).iterdir():
            head, mark, _ = path.read_bytes().partition(b"\x28\xb5\x2f\xfd")
            path.write_bytes((head if mark else b"") + raw)

    return spoil


def main_points_to(raw: bytes) -> Callable[[Path], object]:
    return lambda store: (store / "refs/branch.main/ref.json").write_bytes(raw)


def laughs(depth: int = 40) -> bytes:
    """YAML that is 2^40 words long when its references are followed."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, depth)]
    return "\n".join(lines).encode()


FILES: dict[str, Callable[[Path], object]] = {
    "snapshots of noise": rewrite("snapshots", bytes(range(256))),
    "snapshots of nothing": rewrite("snapshots", b""),
    "snapshots of 8 MiB of zeros": rewrite("snapshots", Zstd(1).encode(bytes(8 << 20))),
    "manifests of noise": rewrite("manifests", bytes(range(256))),
    "manifests of 8 MiB of zeros": rewrite("manifests", Zstd(1).encode(bytes(8 << 20))),
    "main is nothing": main_points_to(b""),
    "main is a list": main_points_to(b"[]"),
    "main is deep": main_points_to(b"[" * 100_000),
    "main leads away": main_points_to(b'{"snapshot": "../../../../etc/passwd"}'),
    "main leads nowhere": main_points_to(b'{"snapshot": "ZZZZZZZZZZZZZZZZZZZ0"}'),
    "settings of noise": lambda store: (store / "config.yaml").write_bytes(b"\xff{[:"),
    "settings of a list": lambda store: (store / "config.yaml").write_bytes(b"- 1\n- 2\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_icechunk_does_not_write(store: str, name: str) -> None:
    FILES[name](Path(store))
    with bounds(max_bytes=160 << 20):  # 132 MiB were seen beside other tests
        try:
            told = inspect_store(store).problems
        except RaysynthError as error:
            told = [str(error)]
    assert told
    assert not [line for line in told if "\n" in line or "root:" in line]


def test_settings_that_laugh_are_harmless(store: str) -> None:
    Path(store, "config.yaml").write_bytes(laughs())
    with bounds():
        assert inspect_store(store).problems == []


def test_a_store_cannot_lend_the_reader_s_own_files(tmp_path: Path) -> None:
    """Icechunk knows chunks that lie elsewhere; a store may not say that they are ours."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "secret").write_bytes(shard_of())
    place = f"file://{folder}/"
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer(place, icechunk.local_filesystem_store(str(folder)))
    )
    storage = icechunk.local_filesystem_storage(str(tmp_path / "store"))
    repository = icechunk.Repository.create(
        storage, config, authorize_virtual_chunk_access={place: None}
    )
    repository.save_config()
    session = repository.writable_session("main")
    root = zarr.create_group(session.store, zarr_format=3, attributes={"schema_version": "1.0"})
    make(root, BIG)
    session.store.set_virtual_ref("x/c/0/0", f"{place}secret", offset=0, length=len(shard_of()))
    np.testing.assert_array_equal(ShardedArray(session.store, "x").read(), ROWS)
    session.commit("a trap")
    with pytest.raises(DamagedStore, match="a virtual chunk"):
        ShardedArray(open_root(tmp_path / "store").store, "x").read()
