"""Reads and writes stored arrays shard by shard: one call for each, chunks decoded in place.

zarr-python reads and writes the same arrays, several times slower. Only the store's own codecs are
known here (sharding, blosc lz4, CRC32C), so a foreign array is refused and none of its codecs is
ever run.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import icechunk
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync

from raysynth.errors import DamagedStore, InputError
from storage_schema.spec import CRC_BYTES, ITEM_BYTES, index_codecs, inner_codecs
from storage_schema.v1 import MAX_SHARD_BYTES

SHARDS_AT_ONCE = 16
"""Shards fetched together: enough to hide an object store's delay, few enough for memory."""

WRITTEN_AT_ONCE = 4
"""Shards encoded in memory and stored together."""

MAX_AXES, MAX_LENGTH = 8, 2**40
"""Of an array, and of an axis."""

ABSENT = 2**64 - 1
"""Offset and length of a chunk that nobody has written."""

CRC32C = np.dtype("<u4")

REMEDY = "restore the store from a copy, or make it again"


Position = tuple[int, ...]
"""Of a shard among the array's shards."""


@dataclass(frozen=True)
class Packed:
    """Rows [start, stop) of an array, encoded."""

    start: int
    stop: int
    shards: dict[Position, NDArray[np.uint8]]


class ShardedArray:
    """One stored array, read and written along its first axis.

    Attributes:
        path: of the array in the store.
        shape: of the array.
        dtype: of the array.
        shard: shape of a shard.
        chunk: shape of a chunk.
    """

    def __init__(self, store: Store, path: str) -> None:
        """Reads the array's metadata.

        Raises:
            InputError: no such array, or one that raysynth did not write.
        """
        metadata = _read_metadata(store, path)
        _refuse_foreign(metadata, path)
        self.path, self._store = path, store
        self.shape = tuple(metadata["shape"])
        self.shard = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        self.chunk = tuple(metadata["codecs"][0]["configuration"]["chunk_shape"])
        self.dtype = np.dtype(metadata["data_type"])
        self._check_shapes()

    def read(self, start: int = 0, stop: int | None = None) -> NDArray:
        """Rows [start, stop) of the first axis, whole along the other axes.

        Args:
            start: first row.
            stop: row after the last; None: to the end.

        Raises:
            DamagedStore: a checksum does not fit, or rows were never written.
        """
        stop = self.shape[0] if stop is None else stop
        self._check_rows(start, stop)
        out = self._allocate(stop - start)
        positions = self._shards_of(start, stop)
        while batch := list(itertools.islice(positions, SHARDS_AT_ONCE)):
            self._decode(self._fetch(batch), start, out)
        return out

    def fetch(self, start: int, stop: int) -> Packed:
        """Rows [start, stop) as they are stored, several times smaller: `unpack` decodes them.

        Raises:
            DamagedStore: they cannot be read.
        """
        self._check_rows(start, stop)
        return Packed(start, stop, self._fetch(list(self._shards_of(start, stop))))

    def unpack(self, packed: Packed) -> NDArray:
        """The rows that `fetch` brought.

        Raises:
            DamagedStore: a checksum does not fit, or rows were never written.
        """
        out = self._allocate(packed.stop - packed.start)
        self._decode(packed.shards, packed.start, out)
        return out

    def write(self, start: int, rows: NDArray) -> None:
        """Writes whole shards of the first axis; the last of them may end with the array.

        Every chunk is stored, of the fill value too: what is absent was never written.

        Args:
            start: where the rows go: the first row of a shard.
            rows: of the array's own data type, whole along the other axes.
        """
        stop = start + len(rows)
        starts_one = start % self.shard[0] == 0
        ends_one = stop == self.shape[0] or (stop % self.shard[0] == 0 and stop < self.shape[0])
        assert starts_one and ends_one, (  # noqa: PT018 - one rule
            f"rows [{start}, {stop}) of {self.path} are not whole shards of {self.shard[0]} rows"
        )
        assert rows.dtype == self.dtype, f"{self.path} is {self.dtype}, not {rows.dtype}"
        assert rows.shape[1:] == self.shape[1:], f"{self.path}: rows of {rows.shape[1:]}"
        positions = self._shards_of(start, stop)
        while batch := list(itertools.islice(positions, WRITTEN_AT_ONCE)):
            encoded = {self._key(one): self._encode_shard(rows, one, start) for one in batch}
            sync(_store_all(self._store, encoded))

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows [{start}, {stop}) of {self.shape[0]} in {self.path}")

    def _allocate(self, rows: int) -> NDArray:
        try:
            return np.empty((rows, *self.shape[1:]), self.dtype)
        except (MemoryError, ValueError) as error:  # the latter from 2**63 bytes on
            raise InputError(
                f"{rows} rows of {self.path} are more than fits into memory: read fewer at a time, "
                "or give a store made by raysynth"
            ) from error

    def _check_shapes(self) -> None:
        shapes = (self.shape, self.shard, self.chunk)
        fits = len({len(shape) for shape in shapes}) == 1 and all(
            chunk > 0 and shard > 0 and shard % chunk == 0
            for chunk, shard in zip(self.chunk, self.shard, strict=True)
        )
        # A foreign array could ask for any amount of memory.
        largest = max(math.prod(self.shard), math.prod(self.shape[1:])) * self.dtype.itemsize
        if not fits or largest > 2 * MAX_SHARD_BYTES or max(self.shape) > MAX_LENGTH:
            raise InputError(
                f"array {self.path} has shape {self.shape}, shard {self.shard} and chunk "
                f"{self.chunk}, which no raysynth writes: give a store made by raysynth"
            )

    def _shards_of(self, start: int, stop: int) -> Iterator[Position]:
        if start == stop:
            return iter(())
        first = range(start // self.shard[0], -(-stop // self.shard[0]))
        others = (
            range(-(-size // shard))
            for size, shard in zip(self.shape[1:], self.shard[1:], strict=True)
        )
        return _product((first, *others))

    def _fetch(self, positions: Sequence[Position]) -> dict[Position, NDArray[np.uint8]]:
        keys = [self._key(position) for position in positions]
        try:
            fetched = sync(_fetch_all(self._store, keys))
        except (icechunk.IcechunkError, OSError) as error:
            raise DamagedStore(
                f"a shard of {self.path} cannot be read: {str(error).splitlines()[0].strip()}"
            ) from error
        shards = {}
        for position, data in zip(positions, fetched, strict=True):
            if data is None:
                raise DamagedStore(f"{self._where(position)} was never written: {REMEDY}")
            shards[position] = data
        return shards

    def _decode(
        self, shards: Mapping[Position, NDArray[np.uint8]], start: int, out: NDArray
    ) -> None:
        for position, data in shards.items():
            self._decode_shard(data, position, start, out)

    def _decode_shard(
        self, data: NDArray[np.uint8], position: Position, start: int, out: NDArray
    ) -> None:
        """Decodes the chunks of one shard that fall into `out`, whose first row is `start`."""
        entries = _read_index(data, self._grid, self._where(position))
        for place, origin, target in self._chunks_of(position, start, out.shape):
            offset, size = (int(value) for value in entries[place])
            if (offset, size) == (ABSENT, ABSENT):
                raise DamagedStore(f"{self._where(position)} was written in part only: {REMEDY}")
            if offset + size > data.size:
                raise DamagedStore(f"{self._where(position)} is cut short: {REMEDY}")
            encoded = data[offset : offset + size]
            whole = out[target]
            if whole.shape == self.chunk and whole.flags.c_contiguous:
                self._decode_chunk(encoded, whole, position)
                continue
            chunk = np.empty(self.chunk, self.dtype)
            self._decode_chunk(encoded, chunk, position)
            part = tuple(
                slice(t.start - o, t.stop - o) for t, o in zip(target, origin, strict=True)
            )
            out[target] = chunk[part]

    def _encode_shard(self, rows: NDArray, position: Position, start: int) -> bytes:
        """One shard of the rows, the first of which is the array's row `start`."""
        index = np.full((*self._grid, 2), ABSENT, "<u8")
        parts: list[bytes] = []
        offset = 0
        for place, _, source in self._chunks_of(position, start, rows.shape):
            chunk = np.ascontiguousarray(rows[source])
            if chunk.shape != self.chunk:  # the array ends within it
                whole = np.zeros(self.chunk, self.dtype)
                whole[tuple(slice(size) for size in chunk.shape)] = chunk
                chunk = whole
            encoded = _with_checksum(_pack(chunk))
            index[place] = offset, sum(map(len, encoded))
            offset += int(index[place][1])
            parts += encoded
        return b"".join([*parts, *_with_checksum(index.tobytes())])

    def _chunks_of(
        self, position: Position, start: int, shape: tuple[int, ...]
    ) -> Iterator[tuple[Position, list[int], tuple[slice, ...]]]:
        """The chunks of one shard that fall into rows of `shape`, the first of which is `start`.

        Yields:
            The chunk's place in the shard, its first voxel in the rows, and its part of them.
        """
        for place in np.ndindex(self._grid):
            origin = [
                p * s + q * c
                for p, s, q, c in zip(position, self.shard, place, self.chunk, strict=True)
            ]
            origin[0] -= start
            target = tuple(
                slice(max(o, 0), min(o + c, n))
                for o, c, n in zip(origin, self.chunk, shape, strict=True)
            )
            if all(part.start < part.stop for part in target):
                yield place, origin, target

    @property
    def _grid(self) -> tuple[int, ...]:
        """Chunks along each axis of a shard."""
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    def _key(self, position: Position) -> str:
        return "/".join((self.path, "c", *map(str, position)))

    def _decode_chunk(self, encoded: NDArray[np.uint8], chunk: NDArray, position: Position) -> None:
        payload = _without_checksum(encoded, self._where(position))
        # Bytes 4-7 of a blosc buffer say how much it unpacks to, bytes 12-15 how long it is.
        sizes = payload[4:16].tobytes()
        unpacked, packed = (int.from_bytes(sizes[i : i + 4], "little") for i in (0, 8))
        if (unpacked, packed) != (chunk.nbytes, payload.size):
            raise DamagedStore(f"{self._where(position)} holds a chunk of a wrong size: {REMEDY}")
        try:
            blosc.decompress(payload, chunk)
        except RuntimeError as error:  # with a checksum that fits: somebody else wrote it
            raise DamagedStore(f"{self._where(position)} cannot be unpacked: {REMEDY}") from error

    def _where(self, position: Position) -> str:
        return f"shard {list(position)} of {self.path}"


async def _fetch_all(store: Store, keys: Sequence[str]) -> list[NDArray[np.uint8] | None]:
    prototype = default_buffer_prototype()
    buffers = await asyncio.gather(*(store.get(key, prototype) for key in keys))
    return [None if buffer is None else buffer.as_numpy_array() for buffer in buffers]


async def _store_all(store: Store, shards: Mapping[str, bytes]) -> None:
    wrap = default_buffer_prototype().buffer.from_bytes
    await asyncio.gather(*(store.set(key, wrap(data)) for key, data in shards.items()))


def _pack(chunk: NDArray) -> bytes:
    # As `storage_schema.spec.inner_codecs` says.
    packed: bytes = blosc.compress(chunk, b"lz4", 5, blosc.SHUFFLE, 0, chunk.itemsize)
    return packed


def _with_checksum(payload: bytes) -> tuple[bytes, bytes]:
    return payload, google_crc32c.value(payload).to_bytes(CRC_BYTES, "little")


def _read_metadata(store: Store, path: str) -> dict[str, Any]:
    [data] = sync(_fetch_all(store, [f"{path}/zarr.json"]))
    if data is None:
        raise InputError(f"the store has no array {path}")
    try:
        metadata: dict[str, Any] = json.loads(data.tobytes())
    except (ValueError, RecursionError) as error:
        raise DamagedStore(f"the metadata of {path} are damaged: {REMEDY}") from error
    return metadata


def _refuse_foreign(metadata: dict[str, Any], path: str) -> None:
    """Raises unless every codec is the one that the schema gives to the data type."""
    try:
        [sharding] = metadata["codecs"]
        options = sharding["configuration"]
        ours = (
            metadata["zarr_format"] == 3
            and metadata["node_type"] == "array"
            and metadata["data_type"] in ITEM_BYTES
            and metadata["chunk_grid"]["name"] == "regular"
            and metadata["chunk_key_encoding"]
            == {"name": "default", "configuration": {"separator": "/"}}
            and not metadata.get("storage_transformers")
            and sharding["name"] == "sharding_indexed"
            and options["codecs"] == inner_codecs(metadata["data_type"])
            and options["index_codecs"] == index_codecs()
            and options["index_location"] == "end"
            and _is_shape(metadata["shape"])
            and _is_shape(metadata["chunk_grid"]["configuration"]["chunk_shape"])
            and _is_shape(options["chunk_shape"])
        )
    except (KeyError, TypeError, ValueError):
        ours = False
    if not ours:
        raise InputError(
            f"array {path} is stored in a way that raysynth does not write, and is not decoded: "
            f"give a store made by raysynth"
        )


def _product(axes: Sequence[range]) -> Iterator[tuple[int, ...]]:
    """itertools.product, which lists its axes first: a lying shape would fill the memory."""
    if not axes:
        yield ()
        return
    for first in axes[0]:
        for others in _product(axes[1:]):
            yield first, *others


def _is_shape(value: Any) -> bool:
    """Whether JSON has a list of a few lengths here: floats, bools and minus would pass as well."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(type(length) is int and length >= 0 for length in value)
    )


def _read_index(data: NDArray[np.uint8], grid: tuple[int, ...], where: str) -> NDArray[np.uint64]:
    """Offset and length of every chunk of a shard, shape (*grid, 2)."""
    size = math.prod(grid) * 16 + CRC_BYTES
    if data.size < size:
        raise DamagedStore(f"{where} is cut short: {REMEDY}")
    return _without_checksum(data[-size:], where).view("<u8").reshape(*grid, 2)


def _without_checksum(data: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    payload, stored = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if payload.size == 0 or google_crc32c.value(payload) != int(stored.view(CRC32C)[0]):
        raise DamagedStore(f"{where} is damaged, its checksum does not fit: {REMEDY}")
    return payload
