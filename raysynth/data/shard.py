"""Cuts a sample set from the stored volumes: planned first, then one Ray Data task a shard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import nan
from typing import Any

import numpy as np
import zarr

from raysynth.case import Case, Label
from raysynth.config import ExperimentConfig
from raysynth.config.data import Samples, SliceSamples
from raysynth.data.units import write_units
from raysynth.errors import InputError
from raysynth.preprocess.patches import PatchBatch, PatchPlan, cut_patches, plan_patches
from raysynth.preprocess.slices import SliceBatch, SlicePlan, cut_slices, plan_slices
from raysynth.seeding import fingerprint
from raysynth.store.reader import (
    SampleSet,
    VolumeAttrs,
    case_attrs,
    case_ids,
    open_group,
    read_case,
)
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import SPLITS, sample_set

Plan = SlicePlan | PatchPlan

Shard = tuple[int, list[Plan]]
"""First row of a shard, and the plans of all its rows."""


@dataclass(frozen=True)
class ShardSummary:
    """What a sample set has.

    Attributes:
        samples: in the set.
        nodule_samples: those that were aimed at a nodule.
        shards: stored objects of each array.
        seconds: wall time; next to nothing if the set was there already.
        snapshot: of the store that has the whole set.
    """

    samples: int
    nodule_samples: int
    shards: int
    seconds: float
    snapshot: str


def shard(config: ExperimentConfig) -> ShardSummary:
    """Cuts the recipe's sample set, unless the store has it, and publishes it.

    The same command resumes after any crash: committed shards wait on the run's branch.

    Raises:
        InputError: the store has no cases, nothing can be cut from them, or a set of that name was
            cut otherwise.
    """
    started = time.monotonic()
    samples = config.data.samples
    parent = main_snapshot(config.store_url)
    root = open_root(config.store_url, parent)
    cases = [case_attrs(root, case_id) for case_id in case_ids(root)]
    if not cases:
        raise InputError(f"store {config.store_url} has no cases: run ingest first")
    identity = fingerprint(
        {
            "samples": samples.model_dump(mode="json"),
            "cases": [
                (case.case_id, case.split, [int(nodule.mask.sum()) for nodule in case.nodules])
                for case in cases
            ],
        }
    )
    if not _is_there(root, samples, identity):
        plans = _plan(cases, samples)
        with StoreRun(config.store_url, verb="shard", fingerprint=identity) as run:
            if run.is_new:
                _declare(run, cases, plans, samples, identity, parent)
            group = SampleSet(open_group(run.root, f"samples/{samples.name}"))
            ranges = [group.shard_rows(number) for number in range(group.num_shards)]
            units = {f"rows-{start}": (start, plans[start:stop]) for start, stop in ranges}
            cut = partial(_cut_shard, samples=samples)
            write_units(run, units, cut, stage="shard", noun="shards")
            parent = run.publish(f"{len(plans)} samples in samples/{samples.name}")
    done = SampleSet(open_group(open_root(config.store_url, parent), f"samples/{samples.name}"))
    return ShardSummary(
        samples=done.count,
        nodule_samples=int((done.index["nodule"] >= 0).sum()),
        shards=done.num_shards,
        seconds=time.monotonic() - started,
        snapshot=parent,
    )


def _is_there(root: zarr.Group, samples: Samples, identity: str) -> bool:
    group = root.get(f"samples/{samples.name}")
    if group is None:
        return False
    if group.attrs["fingerprint"] != identity:
        raise InputError(
            f"the store's sample set {samples.name!r} was cut with other settings or from other "
            f"cases: give this one another name by data.samples.name"
        )
    return True


def _plan(cases: list[VolumeAttrs], samples: Samples) -> list[Plan]:
    """All samples in the order of their rows: by split, case and plane.

    So a shard is cut from few cases, and training on one split reads few others. Case ids are
    hashes: neighbours have nothing to do with each other.
    """
    cases = sorted(cases, key=lambda case: (SPLITS.index(case.split), case.case_id))
    plans = [plan for case in cases for plan in _plan_case(case, samples)]
    if not plans:
        raise InputError(
            f"none of the store's {len(cases)} cases shows a lung or nodule to cut {samples.kind} "
            "of: check data.samples, or ingest other cases"
        )
    return plans


def _plan_case(case: VolumeAttrs, samples: Samples) -> Sequence[Plan]:
    if isinstance(samples, SliceSamples):
        return plan_slices(case, samples)
    return plan_patches(case, samples)


def _declare(
    run: StoreRun,
    cases: list[VolumeAttrs],
    plans: list[Plan],
    samples: Samples,
    identity: str,
    parent: str,
) -> None:
    """Commits the set's group, its empty arrays, and the index columns that the plan decides."""
    names = sorted({plan.case_id for plan in plans})
    rank = {case_id: number for number, case_id in enumerate(names)}
    split = {case.case_id: SPLITS.index(case.split) for case in cases}
    intensities = {case.intensity for case in cases if case.case_id in rank}
    attributes = {
        "kind": samples.kind,
        "pixel_mm": samples.pixel_mm,
        "intensity": "hu" if intensities == {"hu"} else "relative",
        "cases": names,
        "parent_snapshot": parent,
        "fingerprint": identity,
        "settings": samples.settings(),
        "spacing_mm": samples.spacing_mm,
        "field_of_view_mm": samples.field_of_view_mm,
    }
    diameters_mm = {
        (case.case_id, number): nodule.diameter_mm
        for case in cases
        for number, nodule in enumerate(case.nodules)
    }
    columns: dict[str, list[int] | list[float]] = {
        "case": [rank[plan.case_id] for plan in plans],
        "nodule": [plan.nodule for plan in plans],
        "diameter_mm": [diameters_mm.get((plan.case_id, plan.nodule), nan) for plan in plans],
        "split": [split[plan.case_id] for plan in plans],
    }
    spec = sample_set(len(plans), samples.shape)

    def build(root: zarr.Group) -> None:
        group = create_sample_set(root, f"samples/{samples.name}", spec, attributes)
        set_index(group, columns)

    run.declare(build, f"{len(plans)} samples planned")


def _cut_shard(root: zarr.Group, unit: Shard, samples: Samples) -> None:
    """Cuts and writes all rows of a shard, which nobody else writes."""
    first_row, plans = unit
    batches = [
        _cut_case(read_case(root, case_id), list(of_case), samples)
        for case_id, of_case in groupby(plans, key=lambda plan: plan.case_id)
    ]
    arrays = {}
    for name in vars(batches[0]):
        path = name if name in ("hu", "layout") else f"index/{name}"
        arrays[path] = np.concatenate([getattr(batch, name) for batch in batches])
    nodules = (arrays["layout"] == Label.NODULE).reshape(len(plans), -1).any(axis=1)
    arrays["index/has_nodule"] = nodules.astype(np.uint8)
    write_rows(open_group(root, f"samples/{samples.name}"), first_row, arrays)


def _cut_case(case: Case, plans: list[Any], samples: Samples) -> SliceBatch | PatchBatch:
    if isinstance(samples, SliceSamples):
        return cut_slices(case, plans, samples)
    return cut_patches(case, plans, samples)
