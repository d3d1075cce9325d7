"""What no model made and figures are read beside: neighbouring slices, and pasted nodules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.condition import Box
from raysynth.config import EvaluationConfig
from raysynth.evaluation.measure import Measures
from raysynth.evaluation.sets import PIXELS_AT_ONCE, load_extractors
from raysynth.sampling.adherence import within
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from raysynth.window import measurable
from storage_schema.v1 import SPLITS

MAX_NODULES_A_HOST = 4
"""Nodules that are pasted into one sample in turn."""


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
    real: SampleSet,
    patients: NDArray[np.int64],
    count: int,
    config: EvaluationConfig,
    parts: Sequence[int] = (),
) -> tuple[Measures, NDArray[np.int64]]:
    """Measures training samples whose nodule is covered by another training patient's.

    The square (cube) around the donor's nodule is copied as it is: what a generator adds that
    blends a nodule in is what it is better than this. Where samples are few, each gets several
    nodules in turn.

    Args:
        real: the sample set.
        patients: number of each sample's patient.
        count: samples wanted at most.
        config: extractors.
        parts: labels of the region `generated`, see `raysynth.evaluation.regions.cut_regions`.

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
                futures.append(task.remote(handle, pairs, len(hosts), config, parts))
                hosts += [host for host, _ in pairs]
    for future in futures:
        measures.merge(ray.get(future))
    return measures, patients[np.array(hosts, np.int64)]


def paste(
    host: NDArray[np.generic],
    donor: NDArray[np.generic],
    host_box: Sequence[int],
    donor_box: Sequence[int],
) -> tuple[NDArray[np.generic], Box]:
    """A host's image with the donor's box over the middle of its own, and where that came to lie.

    What would lie outside the image is left out.

    Args:
        host: image (y, x) or volume (z, y, x).
        donor: of the same shape.
        host_box: half-open pixels around the host's nodule, first corner first.
        donor_box: likewise.
    """
    size, axes = np.array(host.shape), host.ndim
    start, stop = np.array(donor_box[:axes]), np.array(donor_box[axes:])
    shift = (np.array(host_box[:axes]) + host_box[axes:]) // 2 - (start + stop) // 2
    low, high = np.maximum(start, -shift), np.minimum(stop, size - shift)
    low, high = np.maximum(low, 0), np.minimum(high, size)
    place: Box = (*(low + shift).tolist(), *(high + shift).tolist())
    pasted = host.copy()
    pasted[within(place)] = donor[within((*low.tolist(), *high.tolist()))]
    return pasted, place


def _boxed_training_rows(real: SampleSet) -> dict[int, list[int]]:
    """Training samples with a nodule, by shard."""
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
    sides = real.index["box"][:, len(real.shape)] - real.index["box"][:, 0]
    candidates = np.array(donors)
    pairs = []
    for host in hosts:
        others = candidates[patients[candidates] != patients[host]]
        covering = others[sides[others] >= sides[host]]
        if len(covering):
            pairs.append((host, int(rng.choice(covering))))
    return pairs


def _measure_shards(
    real: SampleSet,
    pairs: Sequence[tuple[int, int]],
    first_row: int,
    config: EvaluationConfig,
    parts: Sequence[int],
) -> Measures:
    """Pastes and measures pairs whose hosts are of one shard, and whose donors of one."""
    measures = Measures()
    hosts, donors = zip(*pairs, strict=True)
    of_hosts, of_donors = (_read_rows(real, rows) for rows in (hosts, donors))
    block = max(1, PIXELS_AT_ONCE // int(np.prod(real.shape)))
    for start in range(0, len(pairs), block):
        some = slice(start, start + block)
        hu, layout = (
            [
                paste(host, donor, real.index["box"][one], real.index["box"][other])
                for host, donor, (one, other) in zip(to[some], of[some], pairs[some], strict=True)
            ]
            for to, of in zip(of_hosts, of_donors, strict=True)
        )
        measures.update(
            first_row + start,
            measurable(np.stack([image for image, _ in hu]), real.attrs["intensity"]),
            np.stack([labels for labels, _ in layout]),
            np.array([box for _, box in hu], np.int16),
            real.pixel_mm,
            load_extractors(config, len(real.shape)),
            (),
            made_of=parts,
        )
    return measures


def _read_rows(real: SampleSet, rows: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """HU and layouts of some rows of one shard."""
    start, stop = real.shard_rows(rows[0] // real.rows_per_shard)
    wanted = np.array(rows) - start
    return real.read("hu", start, stop)[wanted], real.read("layout", start, stop)[wanted]
