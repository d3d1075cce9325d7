"""What no model made and figures are read beside: neighbouring slices, and pasted nodules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.config import EvaluationConfig
from raysynth.evaluation.measure import Measures
from raysynth.evaluation.sets import load_extractors
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from raysynth.window import measurable
from storage_schema.v1 import SPLITS

MAX_NODULES_A_HOST = 4
"""Nodules that are pasted into one slice in turn."""


def next_to(
    rows: NDArray[np.int64], samples: SampleSet, is_reference: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which of the rows are the slice after one of the reference's, of the same case."""
    before = rows - 1
    case = samples.index["case"]
    same_case: NDArray[np.bool_] = np.isin(before, rows) & (case[before] == case[rows])
    return same_case & is_reference[before]


def neighbour_pairs(
    rows: NDArray[np.int64], samples: SampleSet, is_reference: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in `rows` of some slices of the reference, and of the slices after them.

    No slice is on both sides: every other row of the set may be a first one.
    """
    first = is_reference & (np.arange(samples.count) % 2 == 0)
    after = np.flatnonzero(next_to(rows, samples, first))
    return np.searchsorted(rows, rows[after] - 1), after


def measure_pasted(
    real: SampleSet, patients: NDArray[np.int64], count: int, config: EvaluationConfig
) -> tuple[Measures, NDArray[np.int64]]:
    """Measures training slices whose nodule is covered by another training patient's.

    The square around the donor's nodule is copied as it is: what a generator adds that blends a
    nodule in is what it is better than this. Where slices are few, each gets several nodules in
    turn.

    Args:
        real: the sample set.
        patients: number of each sample's patient.
        count: samples wanted at most.
        config: extractors.

    Returns:
        What was measured, and the patient of each host.
    """
    import ray

    task = ray.remote(num_cpus=1)(_measure_shards)
    handle = ray.put(real)
    chosen = _boxed_training_rows(real)
    rng = np.random.default_rng(seed_of("copy and paste", real.count))
    measures, futures = Measures(), []
    hosts: list[int] = []
    for _ in range(MAX_NODULES_A_HOST):
        order = rng.permutation(list(chosen)).tolist()
        for one, other in zip(order, [*order[1:], *order[:1]], strict=True):
            wanted = chosen[one][: count - len(hosts)]
            if pairs := _pairs(real, patients, wanted, chosen[other], rng):
                futures.append(task.remote(handle, pairs, len(hosts), config))
                hosts += [host for host, _ in pairs]
    for future in futures:
        measures.merge(ray.get(future))
    return measures, patients[np.array(hosts, np.int64)]


def paste(
    host: NDArray[np.generic],
    donor: NDArray[np.generic],
    host_box: Sequence[int],
    donor_box: Sequence[int],
) -> tuple[NDArray[np.generic], tuple[int, int, int, int]]:
    """A host's image with the donor's box over the middle of its own, and where that came to lie.

    What would lie outside the image is left out.

    Args:
        host: image (y, x).
        donor: image of the same size.
        host_box: pixels (y0, x0, y1, x1) around the host's nodule.
        donor_box: likewise.
    """
    size = np.array(host.shape)
    start, stop = np.array(donor_box[:2]), np.array(donor_box[2:])
    shift = (np.array(host_box[:2]) + host_box[2:]) // 2 - (start + stop) // 2
    low, high = np.maximum(start, -shift), np.minimum(stop, size - shift)
    low, high = np.maximum(low, 0), np.minimum(high, size)
    (y0, x0), (y1, x1) = low, high
    (v0, u0), (v1, u1) = low + shift, high + shift
    pasted = host.copy()
    pasted[v0:v1, u0:u1] = donor[y0:y1, x0:x1]
    return pasted, (int(v0), int(u0), int(v1), int(u1))


def _boxed_training_rows(real: SampleSet) -> dict[int, list[int]]:
    """Training slices with a nodule, by shard."""
    wanted = (real.index["box"][:, 0] >= 0) & (real.index["split"] == SPLITS.index("train"))
    rows: dict[int, list[int]] = {}
    for row in np.flatnonzero(wanted).tolist():
        rows.setdefault(row // real.rows_per_shard, []).append(row)
    return rows


def _pairs(
    real: SampleSet,
    patients: NDArray[np.int64],
    hosts: Sequence[int],
    donors: Sequence[int],
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """For each host a donor of another patient whose box covers the host's nodule, if any does."""
    sides = real.index["box"][:, 2] - real.index["box"][:, 0]
    candidates = np.array(donors)
    pairs = []
    for host in hosts:
        others = candidates[patients[candidates] != patients[host]]
        covering = others[sides[others] >= sides[host]]
        if len(covering):
            pairs.append((host, int(rng.choice(covering))))
    return pairs


def _measure_shards(
    real: SampleSet, pairs: Sequence[tuple[int, int]], first_row: int, config: EvaluationConfig
) -> Measures:
    """Pastes and measures pairs whose hosts are of one shard, and whose donors of one."""
    measures = Measures()
    hosts, donors = zip(*pairs, strict=True)
    to_boxes, of_boxes = (real.index["box"][list(rows)] for rows in (hosts, donors))
    hu, layout = (
        [
            paste(host, donor, to_box, of_box)
            for host, donor, to_box, of_box in zip(
                _read_rows(real, name, hosts),
                _read_rows(real, name, donors),
                to_boxes,
                of_boxes,
                strict=True,
            )
        ]
        for name in ("hu", "layout")
    )
    measures.update(
        first_row,
        measurable(np.stack([image for image, _ in hu]), real.attrs["intensity"]),
        np.stack([labels for labels, _ in layout]),
        np.array([box for _, box in hu], np.int16),
        real.pixel_mm,
        load_extractors(config),
        (),
    )
    return measures


def _read_rows(real: SampleSet, name: str, rows: Sequence[int]) -> NDArray[Any]:
    """Some rows of one shard."""
    start, stop = real.shard_rows(rows[0] // real.rows_per_shard)
    wanted: NDArray[Any] = real.read(name, start, stop)[np.array(rows) - start]
    return wanted
