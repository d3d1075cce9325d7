"""Checks a store against the schema, and counts what is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync

from raysynth.errors import DamagedStore, InputError, RaysynthError
from raysynth.store.history import history
from raysynth.store.reader import (
    SampleSet,
    case_attrs,
    case_ids,
    checked_attributes,
    has_array,
    open_group,
    subgroups,
)
from raysynth.store.repository import (
    LATER_GROUPS,
    TOP_GROUPS,
    open_repository,
    open_root,
    reason_of,
)
from raysynth.store.shards import REMEDY, ShardedArray
from storage_schema import v1
from storage_schema.spec import GroupSpec

MAX_DIMENSIONS = 4
"""Axes that the schema's samples can have: latents of a patch have a channel axis as well."""


_LIMITS: dict[str, tuple[float, float]] = {
    "ratings": (0, 6),
    "attributes": (0, 5),
    "split": (0, len(v1.SPLITS) - 1),
    "has_nodule": (0, 1),
    "accepted": (0, 1),
    "found": (0, 1),
    "copied_fraction": (0, 1),
    "exact": (0, 1),
    "flagged": (0, 1),
}
"""Smallest and largest value of index columns."""


@dataclass(frozen=True)
class Problem:
    """One way in which a store breaks the schema.

    Attributes:
        path: of the group or array.
        what: one line for people.
    """

    path: str
    what: str


@dataclass(frozen=True)
class Publication:
    """One run that moved main, or the making of the store.

    Attributes:
        snapshot: its id.
        written_at: UTC, ISO 8601.
        message: one line.
    """

    snapshot: str
    written_at: str
    message: str


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds.

    Attributes:
        snapshot: what main points to.
        cases: number of them.
        patients: number of them.
        nodules: in all cases.
        splits: cases of each split.
        samples: number in each sample set, latent set and synthetic run, by path.
        audits: verdict of each audit, by run.
        quarantined: entries of the quarantine.
        stored_bytes: compressed size of everything, older snapshots included.
        publications: newest first.
        unpublished: branches that keep the work of interrupted runs.
    """

    snapshot: str
    cases: int
    patients: int
    nodules: int
    splits: dict[str, int]
    samples: dict[str, int]
    audits: dict[str, str]
    quarantined: int
    stored_bytes: int
    publications: tuple[Publication, ...]
    unpublished: tuple[str, ...]


def validate(url: str | Path, full: bool = False) -> list[Problem]:
    """Checks the published store: names, types, shapes, codecs, attributes, values, splits.

    Args:
        url: local path or s3:// URL of the store.
        full: read every shard; else the first and the last one of each array.

    Raises:
        InputError: there is no store of this schema version.
    """
    root = open_root(url)
    problems = list(_check_attributes("", v1.root(), root.attrs.asdict()))
    problems += _guard("", _check_history(url))
    problems += _guard("", _check_top(root))
    problems += _guard("quarantine", _check_quarantine(root))
    volumes = _subgroups(root, "volumes")
    for path, group in volumes:
        problems += _guard(path, _check_volume(root, path, group, full))
    problems += _guard("volumes", _check_patients(volumes))
    cases = {path.removeprefix("volumes/") for path, _ in volumes}
    for path, group in sample_groups(root):
        problems += _guard(path, _check_samples(path, group, cases, full))
    for path, group in _subgroups(root, "audits"):
        problems += _guard(path, _check_audit(root, path, group))
    return list(dict.fromkeys(problems))


def summary(url: str | Path) -> StoreSummary:
    """Counts what the published store holds.

    Raises:
        InputError: there is no store of this schema version.
    """
    repository = open_repository(url)
    root = open_root(url)
    cases = [case_attrs(root, case_id) for case_id in case_ids(root)]
    commits = dict(history(repository))
    publications = tuple(
        Publication(snapshot, past.written_at, past.message)
        for snapshot, past in commits.items()
        if past.published or not past.run
    )
    try:
        stored = repository.chunk_storage_stats()
    except icechunk.IcechunkError as error:
        raise DamagedStore(
            f"what is stored cannot be counted: {reason_of(error)}; {REMEDY}"
        ) from error
    entries = open_group(root, "quarantine").attrs.get("entries")
    if not isinstance(entries, list):
        raise DamagedStore(f"the quarantine has lost its entries: {REMEDY}")
    return StoreSummary(
        snapshot=repository.lookup_branch("main"),
        cases=len(cases),
        patients=len({case.patient_key for case in cases}),
        nodules=sum(len(case.nodules) for case in cases),
        splits={name: sum(case.split == name for case in cases) for name in v1.SPLITS},
        samples={path: SampleSet(group).count for path, group in sample_groups(root)},
        audits={
            path.removeprefix("audits/"): str(SampleSet(group).attrs["verdict"])
            for path, group in _subgroups(root, "audits")
        },
        quarantined=len(entries),
        stored_bytes=stored.native_bytes + stored.inlined_bytes,
        publications=publications,
        unpublished=tuple(
            sorted(
                name
                for name in repository.list_branches()
                if repository.lookup_branch(name) not in commits
            )
        ),
    )


def sample_groups(root: zarr.Group) -> list[tuple[str, zarr.Group]]:
    """Path and group of every sample set, latent set and synthetic run."""
    latent_sets = [
        found for path, _ in _subgroups(root, "latents") for found in _subgroups(root, path)
    ]
    return [*_subgroups(root, "samples"), *latent_sets, *_subgroups(root, "synthetic")]


def _check_history(url: str | Path) -> Iterator[Problem]:
    """Reading it checks it."""
    for _ in history(open_repository(url)):
        yield from ()


def _check_top(root: zarr.Group) -> Iterator[Problem]:
    yield from _unknown("", root, set(TOP_GROUPS))
    for name in TOP_GROUPS:
        if name in LATER_GROUPS and name not in root:
            continue
        for array in open_group(root, name).array_keys():
            yield Problem(f"{name}/{array}", "is an array where a group belongs")


def _check_volume(root: zarr.Group, path: str, group: zarr.Group, full: bool) -> Iterator[Problem]:
    hu = ShardedArray(group.store, f"{path}/hu")
    if len(hu.shape) != 3:
        yield Problem(f"{path}/hu", f"has {len(hu.shape)} axes, not (z, y, x)")
        return
    spec = v1.volume(hu.shape)
    if not has_array(group, "layout"):
        spec = spec.without("layout")
    yield from _check_group(path, group, spec)
    attributes = group.attrs.asdict()
    yield from _check_nodules(path, attributes, hu.shape)
    yield from _check_pixels(path, group, full)
    # What all that leaves out, the readers would refuse.
    case_attrs(root, path.removeprefix("volumes/"))


def _check_samples(path: str, group: zarr.Group, cases: set[str], full: bool) -> Iterator[Problem]:
    kind = path.split("/")[0]
    main = ShardedArray(group.store, f"{path}/{'latents' if kind == 'latents' else 'hu'}")
    count, item = main.shape[0], main.shape[1:]
    if not 2 <= len(item) <= MAX_DIMENSIONS:
        yield Problem(main.path, f"has samples of {len(item)} axes")
        return
    make: dict[str, Callable[..., GroupSpec]] = {
        "samples": v1.sample_set,
        "latents": v1.latents,
        "synthetic": v1.synthetic_run,
    }
    yield from _check_group(path, group, make[kind](count, item))
    if kind == "latents":
        yield from _check_latents(path, group, full)
        return
    if kind == "samples":
        attributes: dict[str, Any] = group.attrs.asdict()
        lost = sorted(set(attributes.get("cases", [])) - cases)
        if lost:
            yield Problem(path, f"case {lost[0]} of its attribute cases is not in the store")
    yield from _check_index(path, group, item)
    yield from _check_pixels(path, group, full)


def _check_audit(root: zarr.Group, path: str, group: zarr.Group) -> Iterator[Problem]:
    count = ShardedArray(group.store, f"{path}/index/flagged").shape[0]
    yield from _check_group(path, group, v1.audit(count))
    found = SampleSet(group)
    run = SampleSet(open_group(root, f"synthetic/{path.removeprefix('audits/')}"))
    if count != run.count:
        yield Problem(path, f"is of {count} samples, its run has {run.count}")
    # One of an older run is no damage: it says nothing, and nobody may take it for more.
    source = SampleSet(open_group(root, f"samples/{found.attrs['source_set']}"))
    limits = {
        "region": (0, len(found.attrs["regions"]) - 1),
        "nearest_sample": (0, source.count - 1),
    }
    yield from _check_index(path, group, (), limits)


def _check_group(path: str, group: zarr.Group, spec: GroupSpec) -> Iterator[Problem]:
    """Names, attributes, and every array's metadata."""
    yield from _check_attributes(path, spec, group.attrs.asdict())
    try:
        checked_attributes(group)
    except DamagedStore as error:
        yield Problem(path, str(error))
    names = {array.name for array in spec.arrays}
    yield from _unknown(path, group, {name.split("/")[0] for name in names})
    if "index" in group:
        columns = {name.partition("/")[2] for name in names if "/" in name}
        yield from _unknown(f"{path}/index", open_group(group, "index"), columns)
    for array in spec.arrays:
        stored = _metadata(group.store, f"{path}/{array.name}")
        if stored is None:
            yield Problem(f"{path}/{array.name}", "is missing")
            continue
        for key, expected in array.metadata().items():
            if stored.get(key) != expected:
                yield Problem(
                    f"{path}/{array.name}",
                    f"{key} is {json.dumps(stored.get(key))}, not {json.dumps(expected)}",
                )


def _check_attributes(path: str, spec: GroupSpec, attributes: dict[str, Any]) -> Iterator[Problem]:
    for attribute in spec.attributes:
        if attribute.name not in attributes:
            if attribute.required:
                yield Problem(path or "/", f"attribute {attribute.name} is missing")
            continue
        value = attributes[attribute.name]
        if attribute.choices and value not in attribute.choices:
            yield Problem(
                path, f"{attribute.name} is {value!r}, not one of {', '.join(attribute.choices)}"
            )
        if attribute.name in ("spacing_mm", "pixel_mm", "field_of_view_mm"):
            numbers = value if isinstance(value, list) else [value]
            if not all(isinstance(n, int | float) and n > 0 for n in numbers):
                yield Problem(path, f"{attribute.name} is {value!r}: lengths are positive")


def _check_nodules(
    path: str, attributes: dict[str, Any], shape: tuple[int, ...]
) -> Iterator[Problem]:
    for number, nodule in enumerate(attributes.get("nodules", [])):
        inside = all(
            corner >= 0 and corner + size <= whole
            for corner, size, whole in zip(
                nodule["corner_zyx"], nodule["shape"], shape, strict=True
            )
        )
        if not inside:
            yield Problem(path, f"nodule {number} reaches out of the volume")
        rows = nodule["ratings"]
        fits = len(rows) <= v1.NUM_READERS and all(len(row) == len(v1.ATTRIBUTES) for row in rows)
        if not fits or any(score not in range(7) for row in rows for score in row):
            yield Problem(path, f"nodule {number} has ratings that are no LIDC scores: {rows}")


def _check_index(
    path: str,
    group: zarr.Group,
    item: tuple[int, ...],
    own_limits: Mapping[str, tuple[float, float]] | None = None,
) -> Iterator[Problem]:
    index = SampleSet(group).index
    attributes: dict[str, Any] = group.attrs.asdict()
    last_case = len(attributes.get("cases", [])) - 1
    limits = _LIMITS | {"case": (0, last_case), "source_case": (-1, last_case)}
    limits |= own_limits or {}
    for name, values in index.items():
        low, high = limits.get(name, (-math.inf, math.inf))
        right = ~((values < low) | (values > high))
        what = f"allowed are {low} to {high}"
        if name == "box":
            right = _boxes_inside(values, item)
            what = f"a box lies within {item}, or is all -1"
        if not right.all():
            row = int(np.flatnonzero(~right.reshape(len(right), -1).all(axis=1))[0])
            yield Problem(f"{path}/index/{name}", f"row {row} is {values[row].tolist()}: {what}")


def _boxes_inside(box: NDArray[np.int16], size: tuple[int, ...]) -> NDArray[np.bool_]:
    start, stop = box[:, : len(size)], box[:, len(size) :]
    inside = ((start >= 0) & (start < stop) & (stop <= size)).all(axis=1)
    none: NDArray[np.bool_] = (box == -1).all(axis=1)
    return none | inside


def _check_pixels(path: str, group: zarr.Group, full: bool) -> Iterator[Problem]:
    for first_row, hu in _shards(group, "hu", full):
        if (hu == v1.NOT_WRITTEN_HU).any():
            yield Problem(f"{path}/hu", f"near row {first_row}: {v1.NOT_WRITTEN_HU} is no HU")
    if not has_array(group, "layout"):
        return
    for first_row, layout in _shards(group, "layout", full):
        values = np.flatnonzero(np.bincount(layout.ravel(), minlength=256))
        unknown = sorted(set(values.tolist()) - set(v1.LABELS))
        if unknown:
            yield Problem(f"{path}/layout", f"near row {first_row}: {unknown[0]} is no label")


def _check_latents(path: str, group: zarr.Group, full: bool) -> Iterator[Problem]:
    for first_row, latents in _shards(group, "latents", full):
        if not np.isfinite(latents).all():
            yield Problem(f"{path}/latents", f"near row {first_row}: a latent is not finite")


def _shards(group: zarr.Group, name: str, full: bool) -> Iterator[tuple[int, NDArray]]:
    """First row and rows of every shard, or of the first and the last."""
    array = ShardedArray(group.store, f"{group.path}/{name}")
    count = math.ceil(array.shape[0] / array.shard[0])
    for shard in range(count) if full else sorted({0, count - 1} if count else set()):
        start = shard * array.shard[0]
        yield start, array.read(start, min(start + array.shard[0], array.shape[0]))


def _check_patients(volumes: list[tuple[str, zarr.Group]]) -> Iterator[Problem]:
    splits: dict[str, str] = {}
    for path, group in volumes:
        attributes: dict[str, Any] = group.attrs.asdict()
        patient, split = (str(attributes.get(name, "")) for name in ("patient_key", "split"))
        if splits.setdefault(patient, split) != split:
            yield Problem(
                path, f"is {split}, another case of its patient is {splits[patient]}: a leak"
            )


def _check_quarantine(root: zarr.Group) -> Iterator[Problem]:
    spec = v1.quarantine()
    attributes: dict[str, Any] = open_group(root, spec.path).attrs.asdict()
    yield from _check_attributes(spec.path, spec, attributes)
    for number, entry in enumerate(attributes.get("entries", [])):
        if not isinstance(entry, dict):
            yield Problem(spec.path, f"entry {number} is no object")
        elif set(entry) != {"source", "rule", "reason", "when"}:
            yield Problem(spec.path, f"entry {number} has {sorted(entry)}")


def _guard(path: str, check: Iterator[Problem]) -> list[Problem]:
    """What the check finds; where it cannot go on, the reason is the last problem."""
    found: list[Problem] = []
    try:
        # One by one: what came before an error counts.
        for problem in check:
            found.append(problem)
    except RaysynthError as error:
        found.append(Problem(path, str(error)))
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        found.append(Problem(path, f"cannot be read: {type(error).__name__} {error}"))
    return found


def _unknown(path: str, group: zarr.Group, known: set[str]) -> Iterator[Problem]:
    for name in sorted(set(group.keys()) - known):
        yield Problem(f"{path}/{name}".lstrip("/"), "is not part of the schema")


def _subgroups(root: zarr.Group, path: str) -> list[tuple[str, zarr.Group]]:
    try:
        group = open_group(root, path)
    except InputError:  # `_check_top` says so
        return []
    return [(f"{path}/{name}", sub) for name, sub in subgroups(group)]


def _metadata(store: Store, path: str) -> dict[str, Any] | None:
    buffer = sync(store.get(f"{path}/zarr.json", default_buffer_prototype()))
    return None if buffer is None else json.loads(buffer.to_bytes())
