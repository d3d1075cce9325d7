"""What a store's volumes hold: intensities, counted by dask in blocks of planes, and nodules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import dask.bag
import numpy as np
from numpy.typing import NDArray

from raysynth.case import ATTRIBUTES, SCORE_RANGES, Nodule
from raysynth.store.reader import VolumeAttrs, case_attrs, case_ids, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.shards import ShardedArray
from storage_schema.v1 import LABELS, SPLITS

BIN_HU = 50
HU_EDGES = np.arange(-1200, 3001, BIN_HU)
"""Bounds of the histogram's bins; what lies outside counts in the outermost ones."""

MAX_SCORE = max(high for _, high in SCORE_RANGES.values())

SIZE_EDGES_MM = (0.0, 6.0, 8.0, 15.0)
"""Lower bounds of the size classes; 5 % of LIDC's nodules reach 26 mm."""

TEXTURES = ("not rated", "non-solid", "part-solid", "solid")
"""Classes of the readers' median texture score: 0, below 2, below 4, up to 5."""


@dataclass(frozen=True)
class StoreStatistics:
    """Counts over all volumes.

    Attributes:
        snapshot: what was looked at.
        histograms: by label name, where there are voxels: how many in each bin of `HU_EDGES`.
        mean_hu: by label name.
        spacing_mm: voxel size (z, y, x) of every case, (cases, 3).
        diameter_mm: of every nodule, (nodules,).
        joint_ratings: rows of readers by the scores they gave: entry (a, b, i, j) counts those with
            score i of attribute a and score j of attribute b, (9, 9, 7, 7); 0 = not rated.
        strata: nodules by (split, size, texture), as `SPLITS`, `SIZE_EDGES_MM` and `TEXTURES`.
    """

    snapshot: str
    histograms: dict[str, NDArray[np.int64]]
    mean_hu: dict[str, float]
    spacing_mm: NDArray[np.float64]
    diameter_mm: NDArray[np.float64]
    joint_ratings: NDArray[np.int64]
    strata: NDArray[np.int64]

    @property
    def histogram(self) -> NDArray[np.int64]:
        """Voxels of all labels in each bin of `HU_EDGES`."""
        return sum(self.histograms.values(), np.zeros(len(HU_EDGES) - 1, np.int64))


def statistics(url: str) -> StoreStatistics:
    """Counts every voxel of a store, on the Ray cluster if there is one, else in threads."""
    snapshot = main_snapshot(url)
    root = open_root(url, snapshot)
    names = case_ids(root)
    cases = [case_attrs(root, name) for name in names]
    table = _count_voxels(url, snapshot, names)
    sums = table[:, -1]
    counts = {name: table[label, :-1] for label, name in LABELS.items() if table[label, :-1].any()}
    means = {
        name: float(sums[label] / counts[name].sum())
        for label, name in LABELS.items()
        if name in counts
    }
    nodules = [(case, nodule) for case in cases for nodule in case.nodules]
    readers = [row for _, nodule in nodules for row in nodule.ratings]
    return StoreStatistics(
        snapshot,
        counts,
        means,
        np.array([case.spacing_mm for case in cases], np.float64).reshape(-1, 3),
        np.array([nodule.diameter_mm for _, nodule in nodules], np.float64),
        joint_ratings(np.array(readers, np.int64).reshape(-1, len(ATTRIBUTES))),
        _strata(nodules),
    )


def joint_ratings(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each pair of scores was given together, by pair of attributes.

    Args:
        rows: scores of one reader each, (n, attributes), 0 to `MAX_SCORE`.

    Returns:
        Counts (attributes, attributes, MAX_SCORE + 1, MAX_SCORE + 1).
    """
    given = (rows[:, :, None] == np.arange(MAX_SCORE + 1)).astype(np.int64)
    table: NDArray[np.int64] = np.einsum("nai,nbj->abij", given, given)
    return table


def _strata(nodules: Sequence[tuple[VolumeAttrs, Nodule]]) -> NDArray[np.int64]:
    table = np.zeros((len(SPLITS), len(SIZE_EDGES_MM), len(TEXTURES)), np.int64)
    for case, nodule in nodules:
        size = int(np.digitize(nodule.diameter_mm, SIZE_EDGES_MM)) - 1
        scores = [row[ATTRIBUTES.index("texture")] for row in nodule.ratings]
        rated = [score for score in scores if score]
        texture = int(np.digitize(np.median(rated), (0, 2, 4))) if rated else 0
        table[SPLITS.index(case.split), size, texture] += 1
    return table


def _count_voxels(url: str, snapshot: str, names: Sequence[str]) -> NDArray[np.int64]:
    """By label: voxels in each bin and, last, the sum of their HU."""
    counted = np.zeros((max(LABELS) + 1, len(HU_EDGES)), np.int64)
    if names:
        bag = dask.bag.from_sequence(names, partition_size=1)  # type: ignore[no-untyped-call]
        tables = bag.map(partial(_count_case, url=url, snapshot=snapshot))
        counted += tables.sum().compute(scheduler=_scheduler())
    return counted


def _count_case(case_id: str, url: str, snapshot: str) -> NDArray[np.int64]:
    """The counts of one volume, read by as many planes as a shard has."""
    volume = open_group(open_root(url, snapshot), f"volumes/{case_id}")
    hu = ShardedArray(volume.store, f"{volume.path}/hu")
    layout = ShardedArray(volume.store, f"{volume.path}/layout") if "layout" in volume else None
    bounds = [*range(0, hu.shape[0], hu.shard[0]), hu.shape[0]]
    table = np.zeros((max(LABELS) + 1, len(HU_EDGES)), np.int64)
    for start, stop in pairwise(bounds):
        values = hu.read(start, stop).ravel()
        if layout is not None:
            labels = layout.read(start, stop).ravel()
        else:
            labels = np.zeros(values.shape, np.uint8)
        bins = np.clip((values.astype(np.intp) - HU_EDGES[0]) // BIN_HU, 0, len(HU_EDGES) - 2)
        counts = np.bincount(labels * np.intp(len(HU_EDGES)) + bins, minlength=table.size)
        table += counts.reshape(table.shape)
        # Exact: sums of integers below 2^53.
        table[:, -1] += np.bincount(labels, values, minlength=len(table)).astype(np.int64)
    return table


def _scheduler() -> Callable[..., Any] | str:
    import ray

    if not ray.is_initialized():
        return "threads"
    from ray.util.dask import ray_dask_get

    return ray_dask_get
