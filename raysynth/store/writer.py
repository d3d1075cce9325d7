"""Writes groups and whole shards. Drivers declare, workers fill what they own."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from raysynth.case import LUNG_LABELS, Case, Nodule
from raysynth.seeding import fingerprint
from raysynth.store.shards import ShardedArray
from storage_schema.spec import ITEM_BYTES, ArraySpec, GroupSpec
from storage_schema.v1 import volume


def create_volume(root: zarr.Group, case: Case) -> zarr.Group:
    """Makes the group of a case: attributes and empty arrays at full size.

    Args:
        root: writable root group.
        case: with its layout, if it has one: the extent of the lungs is taken from it.
    """
    spec = volume(case.volume.shape)
    if case.layout is None:
        spec = spec.without("layout")
    return _create(root, f"volumes/{case.case_id}", spec, volume_attributes(case))


def write_volume(group: zarr.Group, case: Case) -> None:
    """Fills the arrays that `create_volume` made."""
    _array(group, "hu").write(0, case.volume.hu)
    if case.layout is not None:
        _array(group, "layout").write(0, case.layout)


def create_sample_set(
    root: zarr.Group, path: str, spec: GroupSpec, attributes: Mapping[str, Any]
) -> zarr.Group:
    """Makes the group of a sample set, of its latents or of a synthetic run, with empty arrays.

    Args:
        root: writable root group.
        path: of the new group, for example `samples/slices`.
        spec: `storage_schema.v1.sample_set`, `latents` or `synthetic_run` of the right size.
        attributes: what the spec asks for; more are kept as well.
    """
    return _create(root, path, spec, attributes)


def write_rows(group: zarr.Group, first_row: int, arrays: Mapping[str, NDArray]) -> None:
    """Writes whole shards of some arrays, by the one worker that owns them.

    Args:
        group: of a sample set, its latents or a synthetic run, writable.
        first_row: where the rows go; the first row of a shard.
        arrays: name (`hu`, `index/seed`...) -> rows, all equally many: whole shards, the last of
            which may end with the array.
    """
    counts = {len(rows) for rows in arrays.values()}
    assert len(counts) == 1, f"arrays of unequal length: {counts}"
    for name, rows in arrays.items():
        _array(group, name).write(first_row, rows)


def set_index(group: zarr.Group, columns: Mapping[str, ArrayLike], first_row: int = 0) -> None:
    """Writes index columns, by the driver. Those that are not given must be written by workers.

    Args:
        group: of a sample set or a synthetic run, writable.
        columns: name without `index/` -> one value or row of values a sample.
        first_row: where they go, as for `write_rows`.
    """
    arrays = {}
    for name, values in columns.items():
        given = np.asarray(values)
        converted = given.astype(_array(group, f"index/{name}").dtype)
        exact = converted.dtype.kind == "f" or np.array_equal(converted, given)
        assert exact, f"index/{name} cannot hold its values as {converted.dtype}"
        arrays[f"index/{name}"] = converted
    write_rows(group, first_row, arrays)


def update_quarantine(
    root: zarr.Group, entries: Iterable[Mapping[str, str]], readable: Collection[str] = ()
) -> None:
    """Adds what was refused, by the driver, and lets go what could be read after all.

    What is there already (same source and rule) keeps its time; if nothing changes, nothing is
    written.

    Args:
        root: writable root group.
        entries: `source` (keyed hash), `rule`, `reason` and `when` (UTC, ISO 8601).
        readable: sources that are in the store now.
    """
    group = _group(root, "quarantine")
    before: list[dict[str, str]] = list(group.attrs["entries"])  # type: ignore[arg-type]
    after = {
        (entry["source"], entry["rule"]): entry
        for entry in before
        if entry["source"] not in readable
    }
    for entry in entries:
        assert entry.keys() == {"source", "rule", "reason", "when"}, sorted(entry)
        after.setdefault((entry["source"], entry["rule"]), dict(entry))
    if list(after.values()) != before:
        group.attrs["entries"] = list(after.values())


def volume_attributes(case: Case) -> dict[str, Any]:
    """Attributes of a case's group, ready for JSON."""
    geometry = case.volume
    lung_zyx, lung_planes = _lung_extent(case.layout)
    return {
        "spacing_mm": [float(value) for value in geometry.spacing_mm],
        "origin_mm": [float(value) for value in geometry.origin_mm],
        "direction": [float(value) for value in geometry.direction.ravel()],
        "patient_key": case.patient_key,
        "split": case.split,
        "intensity": case.intensity,
        "source": case.source,
        "nodules": [_nodule_json(nodule) for nodule in case.nodules],
        "lung_zyx": lung_zyx,
        "lung_planes": lung_planes,
    }


def _nodule_json(nodule: Nodule) -> dict[str, Any]:
    bits = np.packbits(nodule.mask.ravel(), bitorder="little")
    return {
        "centre_zyx": [float(value) for value in nodule.centre_zyx],
        "corner_zyx": [int(value) for value in nodule.corner_zyx],
        "shape": list(nodule.mask.shape),
        "voxels": base64.b64encode(bits.tobytes()).decode(),
        "diameter_mm": float(nodule.diameter_mm),
        "ratings": [[int(score) for score in row] for row in nodule.ratings],
    }


def _lung_extent(
    layout: NDArray[np.uint8] | None,
) -> tuple[list[list[int]] | None, list[list[int]]]:
    """Half-open bounding box of the lungs, and ranges of planes that show any of them."""
    if layout is None:
        return None, []
    lung = np.isin(layout, LUNG_LABELS)
    planes = lung.any(axis=(1, 2))
    if not planes.any():
        return None, []
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hit = np.flatnonzero(lung.any(axis=others))
        box.append([int(hit[0]), int(hit[-1]) + 1])
    edges = np.flatnonzero(np.diff(planes, prepend=False, append=False))
    return box, [[int(start), int(stop)] for start, stop in edges.reshape(-1, 2)]


def _create(
    root: zarr.Group, path: str, spec: GroupSpec, attributes: Mapping[str, Any]
) -> zarr.Group:
    # Icechunk does not notice every flipped bit of what it keeps of a group.
    attributes = {name: value for name, value in attributes.items() if name != "checksum"}
    attributes["checksum"] = fingerprint(attributes)
    missing = [a.name for a in spec.attributes if a.required and a.name not in attributes]
    if missing:
        raise ValueError(f"{path}: a {spec.kind} has attributes {missing} as well")
    # NaN is no JSON: other readers would refuse the whole group.
    json.dumps(attributes, allow_nan=False)
    group = root.create_group(path, attributes=attributes)
    for array in spec.arrays:
        _create_array(group, array)
    return group


def _create_array(group: zarr.Group, spec: ArraySpec) -> None:
    group.create_array(
        spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunk,
        shards=spec.shard,
        fill_value=spec.fill,
        compressors=[
            BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=ITEM_BYTES[spec.dtype]),
            Crc32cCodec(),
        ],
        dimension_names=spec.dims,
    )


def _array(group: zarr.Group, name: str) -> ShardedArray:
    return ShardedArray(group.store, f"{group.path}/{name}")


def _group(root: zarr.Group, name: str) -> zarr.Group:
    group = root[name]
    assert isinstance(group, zarr.Group), name
    return group
