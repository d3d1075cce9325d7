"""Reads cases and samples of an open store."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from raysynth.case import Case, Intensity, Nodule, Split
from raysynth.errors import DamagedStore, InputError
from raysynth.seeding import fingerprint
from raysynth.store.shards import REMEDY, Packed, ShardedArray
from raysynth.volume import Triple, Volume
from storage_schema.spec import GroupSpec
from storage_schema.v1 import SPLITS, audit, sample_set, synthetic_run

MAX_VOXELS = 2**31
"""Of a volume: twice what can be ingested."""

Range = tuple[int, int]


@dataclass(frozen=True)
class VolumeAttrs:
    """All about a stored case but its voxels.

    Attributes:
        shape: voxels along (z, y, x).
        lung_zyx: half-open bounding box of the lungs; None if the layout shows none.
        lung_planes: half-open ranges of planes that show any lung.

    The others are those of `raysynth.case.Case` and `raysynth.volume.Volume`.
    """

    case_id: str
    patient_key: str
    split: Split
    intensity: Intensity
    shape: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple
    direction: NDArray[np.float64]
    nodules: tuple[Nodule, ...]
    source: dict[str, str | float]
    lung_zyx: tuple[Range, Range, Range] | None
    lung_planes: tuple[Range, ...]


def case_ids(root: zarr.Group) -> list[str]:
    """Ids of all stored cases, sorted."""
    return [name for name, _ in subgroups(open_group(root, "volumes"))]


def subgroups(group: zarr.Group) -> list[tuple[str, zarr.Group]]:
    """Name and group of all groups in a group, sorted.

    Raises:
        DamagedStore: the metadata of something there makes no sense.
    """
    with _metadata_of(group.path):
        return sorted(group.groups(), key=lambda found: found[0])


def case_attrs(root: zarr.Group, case_id: str) -> VolumeAttrs:
    """What is known of a case, without reading its voxels.

    Raises:
        InputError: the store has no such case.
        DamagedStore: a checksum does not fit, or the attributes make no sense.
    """
    path = f"volumes/{case_id}"
    attributes = checked_attributes(open_group(root, path))
    shape = ShardedArray(root.store, f"{path}/hu").shape
    if len(shape) != 3 or math.prod(shape) > MAX_VOXELS:
        raise InputError(f"array {path}/hu has shape {shape}: give a store made by raysynth")
    try:
        return _volume_attrs(case_id, attributes, shape)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        # The checksum fits: somebody else wrote them.
        raise DamagedStore(
            f"the attributes of {path} are not those of a case ({type(error).__name__}): {REMEDY}"
        ) from error


def read_case(root: zarr.Group, case_id: str) -> Case:
    """A stored case with its voxels.

    Raises:
        InputError: the store has no such case.
        DamagedStore: a checksum does not fit.
    """
    attributes = case_attrs(root, case_id)
    path = f"volumes/{case_id}"
    layout = None
    if has_array(open_group(root, path), "layout"):
        layout = ShardedArray(root.store, f"{path}/layout").read()
    return Case(
        case_id=case_id,
        patient_key=attributes.patient_key,
        split=attributes.split,
        volume=Volume(
            ShardedArray(root.store, f"{path}/hu").read(),
            attributes.spacing_mm,
            attributes.origin_mm,
            attributes.direction,
        ),
        nodules=attributes.nodules,
        layout=layout,
        intensity=attributes.intensity,
        source=attributes.source,
    )


class SampleSet:
    """A sample set, the latents of one, a synthetic run, or the audit of one. Picklable.

    Attributes:
        group: the read-only group.
        attrs: its attributes.
    """

    def __init__(self, group: zarr.Group) -> None:
        """Opens the set; reads nothing but metadata."""
        self.group = group
        self.attrs = checked_attributes(group)
        self._arrays: dict[str, ShardedArray] = {}

    @cached_property
    def _main(self) -> ShardedArray:
        kind = self.group.path.partition("/")[0]
        name = "index/flagged" if kind == "audits" else "latents"
        return self._array("hu" if has_array(self.group, "hu") else name)

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._main.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self._main.shape[1:]

    @property
    def pixel_mm(self) -> float:
        """Side of one pixel in millimetres."""
        return float(self.attrs["pixel_mm"])

    @property
    def rows_per_shard(self) -> int:
        """Samples of one shard; the last one may have fewer."""
        return self._main.shard[0]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.count / self.rows_per_shard)

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        start = shard * self.rows_per_shard
        return start, min(start + self.rows_per_shard, self.count)

    def training_rows(self) -> NDArray[np.int64]:
        """Rows of the training split, ascending.

        Raises:
            InputError: there are none.
        """
        rows = np.flatnonzero(self.index["split"] == SPLITS.index("train"))
        if not len(rows):
            raise InputError("the sample set has no train samples: ingest more patients")
        return rows

    @cached_property
    def index(self) -> Mapping[str, NDArray]:
        """The index columns: name without `index/` -> one value or row of values a sample.

        A column is read when it is first asked for, and kept.

        Raises:
            DamagedStore: when it is asked for: a checksum does not fit, or some of it was never
                written.
        """
        return _Columns(self)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray:
        """Rows [start, stop) of an array (`hu`, `layout`, `latents`).

        Whole shards are the fast way: any part of one costs the transfer of all of it.

        Raises:
            DamagedStore: a checksum does not fit.
        """
        return self._array(name).read(start, stop)

    def fetch(self, name: str, start: int, stop: int) -> Packed:
        """Rows [start, stop) of an array as they are stored, for `unpack`."""
        return self._array(name).fetch(start, stop)

    def unpack(self, name: str, packed: Packed) -> NDArray:
        """The rows that `fetch` brought.

        Raises:
            DamagedStore: a checksum does not fit.
        """
        return self._array(name).unpack(packed)

    def _array(self, name: str) -> ShardedArray:
        if name not in self._arrays:
            self._arrays[name] = ShardedArray(self.group.store, f"{self.group.path}/{name}")
        return self._arrays[name]


class _Columns(Mapping[str, NDArray]):
    """Index columns of a sample set, read one by one when they are needed."""

    def __init__(self, samples: SampleSet) -> None:
        self._samples = samples
        self._columns: dict[str, NDArray] = {}
        # From the schema, not from a listing: a damaged name must not make a column vanish.
        kind = samples.group.path.partition("/")[0]
        axes = 3 if samples.attrs.get("kind") == "patches" else 2
        arrays = _spec(kind, (1,) * axes).arrays if kind != "latents" else ()
        columns = (array.name.partition("index/")[2] for array in arrays)
        self._names = sorted(filter(None, columns))

    def __getitem__(self, name: str) -> NDArray:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._columns:
            path = f"index/{name}"
            if not has_array(self._samples.group, path):
                group = self._samples.group.path
                raise DamagedStore(f"{group} has lost its column {path}: {REMEDY}")
            self._columns[name] = self._samples.read(path)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _spec(kind: str, item_shape: tuple[int, ...]) -> GroupSpec:
    match kind:
        case "audits":
            return audit(1)
        case "synthetic":
            return synthetic_run(1, item_shape)
        case _:
            return sample_set(1, item_shape)


def open_group(root: zarr.Group, path: str) -> zarr.Group:
    """A group below `root`.

    Raises:
        InputError: there is none; the message lists what is beside it.
        DamagedStore: its metadata makes no sense.
    """
    with _metadata_of(path):
        group = root.get(path)
    if isinstance(group, zarr.Group):
        return group
    parent, _, name = path.rpartition("/")
    above = root.get(parent) if parent else root
    with _metadata_of(parent):
        beside = sorted(above.group_keys()) if isinstance(above, zarr.Group) else []
    shown = ", ".join(beside[:10]) + (", ..." if len(beside) > 10 else "")
    raise InputError(f"the store has no {name!r} in /{parent}; there is: {shown or 'nothing'}")


def has_array(group: zarr.Group, name: str) -> bool:
    """Whether something of that name is stored in a group; zarr-python would look at what it is."""
    return sync(group.store.exists(f"{group.path}/{name}/zarr.json"))


def checked_attributes(group: zarr.Group) -> dict[str, Any]:
    """The attributes of a case, a sample set, latents or a synthetic run.

    Raises:
        DamagedStore: they are not the ones that were written.
    """
    attributes: dict[str, Any] = group.attrs.asdict()
    checksum = attributes.pop("checksum", None)
    if checksum != fingerprint(attributes):
        raise DamagedStore(
            f"the attributes of {group.path} are damaged, their checksum does not fit: {REMEDY}"
        )
    return attributes


@contextmanager
def _metadata_of(path: str) -> Iterator[None]:
    """For what zarr-python raises where metadata is no JSON, too deep, or has unknown fields."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedStore(f"the metadata of /{path} is damaged: {REMEDY}") from error


def _volume_attrs(case_id: str, attributes: dict[str, Any], shape: tuple[int, ...]) -> VolumeAttrs:
    z, y, x = shape
    names = [attributes[name] for name in ("patient_key", "split", "intensity")]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{names} are not all text")
    box = attributes["lung_zyx"]
    return VolumeAttrs(
        case_id=case_id,
        patient_key=attributes["patient_key"],
        split=attributes["split"],
        intensity=attributes["intensity"],
        shape=(z, y, x),
        spacing_mm=_triple(attributes["spacing_mm"]),
        origin_mm=_triple(attributes["origin_mm"]),
        direction=np.array(attributes["direction"], np.float64).reshape(3, 3),
        nodules=tuple(_nodule(nodule) for nodule in attributes["nodules"]),
        source=attributes["source"],
        lung_zyx=None if box is None else (_range(box[0], z), _range(box[1], y), _range(box[2], x)),
        lung_planes=tuple(_range(planes, z) for planes in attributes["lung_planes"]),
    )


def _nodule(attributes: dict[str, Any]) -> Nodule:
    d, h, w = attributes["shape"]
    bits = np.frombuffer(base64.b64decode(attributes["voxels"], validate=True), np.uint8)
    # What is missing would be taken for zeros, however much the shape promises.
    if min(d, h, w) < 1 or len(bits) != -(-d * h * w // 8):
        raise ValueError(f"{len(bits)} bytes of voxels for {d} x {h} x {w}")
    mask = np.unpackbits(bits, count=d * h * w, bitorder="little").astype(bool)
    z, y, x = attributes["corner_zyx"]
    return Nodule(
        centre_zyx=_triple(attributes["centre_zyx"]),
        corner_zyx=(z, y, x),
        mask=mask.reshape(d, h, w),
        diameter_mm=float(attributes["diameter_mm"]),
        ratings=tuple(tuple(row) for row in attributes["ratings"]),
    )


def _triple(values: list[float]) -> Triple:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _range(values: list[int], size: int) -> Range:
    start, stop = values
    if not 0 <= start < stop <= size:
        raise ValueError(f"[{start}, {stop}) of {size}")
    return start, stop
