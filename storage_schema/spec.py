"""What a schema is made of: arrays, attributes, groups, and the one chain of codecs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

ITEM_BYTES = {
    "uint8": 1,
    "int16": 2,
    "float16": 2,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
}
"""The data types that a store uses, and their size."""

CRC_BYTES = 4
"""A CRC32C (Castagnoli), little-endian, follows every chunk and every shard's index."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr v3 array.

    Attributes:
        name: path inside its group, for example `index/box`.
        dtype: Zarr data type.
        dims: names of the axes.
        shape: of the array.
        chunk: inner chunk, the unit that is compressed and checksummed.
        shard: outer chunk, one stored object, written by one owner.
        fill: value of what nobody has written.
        doc: what it means, with unit.
    """

    name: str
    dtype: str
    dims: tuple[str, ...]
    shape: Shape
    chunk: Shape
    shard: Shape
    fill: int | float
    doc: str

    def metadata(self) -> dict[str, object]:
        """The parts of the array's `zarr.json` that this version fixes."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shard)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _json_number(self.fill),
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": list(self.chunk),
                        "codecs": inner_codecs(self.dtype),
                        "index_codecs": index_codecs(),
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": list(self.dims),
        }

    def as_json(self) -> dict[str, object]:
        """The array as JSON values, without its codecs, which follow from the data type."""
        return {**asdict(self), "fill": _json_number(self.fill)}


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute of a group, JSON.

    Attributes:
        name: its key.
        type: JSON type.
        doc: what it means, with unit.
        choices: allowed values; none: any.
        required: whether a group without it is invalid.
    """

    name: str
    type: str
    doc: str
    choices: tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True)
class GroupSpec:
    """One kind of group: which arrays and attributes it has. `optional` arrays may be absent."""

    kind: str
    path: str
    doc: str
    arrays: tuple[ArraySpec, ...]
    attributes: tuple[AttributeSpec, ...]
    optional: tuple[str, ...] = ()

    def without(self, name: str) -> GroupSpec:
        """The same group without one of its optional arrays."""
        assert name in self.optional
        return replace(self, arrays=tuple(spec for spec in self.arrays if spec.name != name))

    def as_json(self) -> dict[str, object]:
        """The group as JSON values."""
        return {
            "kind": self.kind,
            "path": self.path,
            "doc": self.doc,
            "attributes": [asdict(attribute) for attribute in self.attributes],
            "arrays": [
                {**spec.as_json(), "required": spec.name not in self.optional}
                for spec in self.arrays
            ],
        }


def inner_codecs(dtype: str) -> list[dict[str, object]]:
    """Codecs of one chunk, in encoding order: little-endian bytes, blosc lz4, CRC32C."""
    blosc = {
        "typesize": ITEM_BYTES[dtype],
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "shuffle",
        "blocksize": 0,
    }
    return [
        _little_endian(dtype),
        {"name": "blosc", "configuration": blosc},
        {"name": "crc32c"},
    ]


def index_codecs() -> list[dict[str, object]]:
    """Codecs of a shard's index: offset and length of every chunk."""
    return [_little_endian("uint64"), {"name": "crc32c"}]


@dataclass(frozen=True)
class Column:
    """An index column: `width` are its axes after the sample axis, by name."""

    name: str
    dtype: str
    fill: int | float
    doc: str
    width: tuple[tuple[str, int], ...] = ()


def _little_endian(dtype: str) -> dict[str, object]:
    # Zarr leaves the byte order of one-byte types unsaid.
    if ITEM_BYTES[dtype] == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def _json_number(value: int | float) -> int | float | str:
    """JSON has no NaN; Zarr writes it as text."""
    return "NaN" if math.isnan(value) else value
