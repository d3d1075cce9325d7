"""What intensities a store's volumes hold, counted by dask in blocks of planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from raysynth.store.reader import case_ids, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.shards import ShardedArray
from storage_schema.v1 import LABELS

HU_EDGES = np.arange(-1200, 3001, 50)
"""Bounds of the histogram's bins; what lies outside counts in the outermost ones."""

Slab = tuple[str, int, int]
"""Case, first plane and the one after the last."""


@dataclass(frozen=True)
class StoreStatistics:
    """Counts over all volumes.

    Attributes:
        snapshot: what was looked at.
        histogram: voxels in each bin of `HU_EDGES`.
        voxels: by label name, where there are any.
        mean_hu: by label name.
    """

    snapshot: str
    histogram: NDArray[np.int64]
    voxels: dict[str, int]
    mean_hu: dict[str, float]


def statistics(url: str) -> StoreStatistics:
    """Counts every voxel of a store, on the Ray cluster if there is one, else in threads."""
    snapshot = main_snapshot(url)
    slabs = _slabs(url, snapshot)
    if not slabs:
        return StoreStatistics(snapshot, np.zeros(len(HU_EDGES) - 1, np.int64), {}, {})
    # dask's Ray scheduler fails on da.from_zarr, so every block opens the store itself.
    blocks = da.arange(len(slabs), chunks=1).map_blocks(
        partial(_count, url=url, snapshot=snapshot, slabs=slabs),
        dtype=np.int64,
        new_axis=[1, 2],
        chunks=((1,) * len(slabs), max(LABELS) + 1, len(HU_EDGES)),
    )
    table = blocks.sum(axis=0).compute(scheduler=_scheduler())
    per_label, sums = table[:, :-1].sum(axis=1), table[:, -1]
    seen = {name: label for label, name in LABELS.items() if per_label[label]}
    return StoreStatistics(
        snapshot,
        table[:, :-1].sum(axis=0),
        {name: int(per_label[label]) for name, label in seen.items()},
        {name: float(sums[label] / per_label[label]) for name, label in seen.items()},
    )


def _slabs(url: str, snapshot: str) -> list[Slab]:
    """All volumes in blocks of one shard's planes."""
    root = open_root(url, snapshot)
    slabs = []
    for case_id in case_ids(root):
        hu = ShardedArray(root.store, f"volumes/{case_id}/hu")
        bounds = [*range(0, hu.shape[0], hu.shard[0]), hu.shape[0]]
        slabs += [(case_id, start, stop) for start, stop in pairwise(bounds)]
    return slabs


def _count(
    block: NDArray[np.int64], url: str, snapshot: str, slabs: list[Slab]
) -> NDArray[np.int64]:
    """Of one slab, by label: voxels in each bin and, last, the sum of their HU."""
    case_id, start, stop = slabs[int(block[0])]
    volume = open_group(open_root(url, snapshot), f"volumes/{case_id}")
    hu = ShardedArray(volume.store, f"{volume.path}/hu").read(start, stop).ravel()
    if "layout" in volume:
        layout = ShardedArray(volume.store, f"{volume.path}/layout").read(start, stop).ravel()
    else:
        layout = np.zeros(hu.shape, np.uint8)
    bins = np.clip(np.digitize(hu, HU_EDGES) - 1, 0, len(HU_EDGES) - 2)
    shape = (max(LABELS) + 1, len(HU_EDGES))
    table = np.bincount(layout * np.intp(shape[1]) + bins, minlength=shape[0] * shape[1])
    table = table.reshape(shape)
    # Exact: sums of integers below 2^53.
    table[:, -1] = np.bincount(layout, hu, minlength=shape[0])
    return table[None]


def _scheduler() -> Callable[..., Any] | str:
    import ray

    if not ray.is_initialized():
        return "threads"
    from ray.util.dask import ray_dask_get

    return ray_dask_get
