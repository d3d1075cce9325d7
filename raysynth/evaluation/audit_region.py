"""Audits one region of a run, by Ray tasks: cut what is compared, look it up, and judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.config import AuditConfig
from raysynth.errors import InputError
from raysynth.evaluation.audit_pictures import (
    Items,
    Look,
    cut_real,
    cut_synthetic,
    joined,
    with_masks_of,
)
from raysynth.evaluation.intervals import MIN_PATIENTS, Interval
from raysynth.evaluation.leaks import Leak, Side, leak_of
from raysynth.evaluation.statistics import clopper_pearson
from raysynth.layout.morphology import Mask
from raysynth.metrics.memorization import (
    CRITERIA,
    Array,
    Nearest,
    Scale,
    Threshold,
    feature_distances,
    is_exact,
    least_held_out,
    nearest,
    pixel_distances,
    threshold_of,
)
from raysynth.progress import Progress
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from storage_schema.v1 import SPLITS

MAX_REFERENCE = 300
"""Training samples that tell how far apart different patients are."""

MAX_LEAK_SAMPLES = 4096
"""Of the run, for figures over the whole of it; each is compared with every patient."""

BATCH = 64

LIKELY_NCC = 0.95
"""From here on a correlation is worth counting (methods F.12)."""


@dataclass(frozen=True)
class RegionAudit:
    """What one region of a run shows.

    Attributes:
        samples: of the run that were compared.
        train: training samples, and `train_patients` their patients.
        held_out: likewise.
        duplicates: held-out samples that are copies of training samples: the split leaks, and they
            set no threshold.
        threshold: of the copy score.
        flagged: samples above it.
        copy_rate: share of them, with its exact 95 % `interval`.
        exact: of these, the same picture as a training sample.
        by_criterion: flagged ones that each criterion would flag by itself.
        likely_ncc: samples whose correlation with a training sample is above .95; and the share of
            held-out ones for which it is, `likely_ncc_held_out`.
        below_first_percentile: share of samples that are nearer than 99 % of held-out ones, by
            criterion; .01: no leak.
        leaks: by embedding.
    """

    samples: int
    train: int
    train_patients: int
    held_out: int
    held_out_patients: int
    duplicates: int
    threshold: Threshold
    flagged: int
    copy_rate: float
    interval: Interval
    exact: int
    by_criterion: dict[str, int]
    likely_ncc: int
    likely_ncc_held_out: float
    below_first_percentile: dict[str, float]
    leaks: dict[str, Leak]


@dataclass(frozen=True)
class Scores:
    """Of every compared sample, in the order of `rows`."""

    rows: NDArray[np.int64]
    distance: NDArray[np.float64]
    nearest_row: NDArray[np.int64]
    score: NDArray[np.float64]
    exact: NDArray[np.bool_]
    flagged: NDArray[np.bool_]


@dataclass(frozen=True)
class Bank:
    """Items in the order of their patients, and the numbers of these, from 0 on; None: nobody's."""

    items: Items
    patients: NDArray[np.int64] | None = None

    @property
    def num_patients(self) -> int:
        """How many patients they are of."""
        return 0 if self.patients is None else int(self.patients[-1]) + 1


def audit_region(
    look: Look,
    sets: Mapping[str, SampleSet],
    patients: NDArray[np.int64],
    hole: Mask | None,
    config: AuditConfig,
    seed: int,
    view: Progress,
) -> tuple[RegionAudit, Scores]:
    """Compares a run with training and held-out samples.

    Args:
        look: how they are shown.
        sets: `real` and `synthetic`.
        patients: number of each real sample's patient.
        hole: of a model that fills planned holes, what was filled (n, y, x).
        config: the policy.
        seed: of all drawing.
        view: advances by the run's samples.

    Raises:
        InputError: too few held-out or training samples or patients.
    """
    import ray

    seed = seed_of("audit", seed, look.region)
    run = _cut_run(sets["synthetic"], look, hole)
    banks = _banks(look, sets["real"], patients, run, config, seed)
    handles = [ray.put((bank.items, bank.patients)) for bank in banks]
    train, held_out = banks
    reference = _reference(look, sets["real"], train, run, seed)
    scale = Scale.of(_look_up_all(reference, handles[0]).distance)
    near_held_out = _look_up_all(Bank(held_out.items), handles[0])
    threshold, duplicates = _threshold(scale.scores(near_held_out.distance), near_held_out, config)
    near = _look_up_all(Bank(run), handles[0], view)
    scores = _scores(run.rows, near, train.items.rows, scale, threshold)
    flagged = int(scores.flagged.sum())
    by_criterion = (scale.by_criterion(near.distance) > threshold.score).sum(axis=0)
    found = RegionAudit(
        samples=len(run),
        train=len(train.items),
        train_patients=train.num_patients,
        held_out=len(held_out.items),
        held_out_patients=held_out.num_patients,
        duplicates=duplicates,
        threshold=threshold,
        flagged=flagged,
        copy_rate=flagged / len(run),
        interval=clopper_pearson(flagged, len(run)),
        exact=int(scores.exact.sum()),
        by_criterion=dict(zip(CRITERIA, map(int, by_criterion), strict=True)),
        likely_ncc=int((near.distance[:, 2] < 1 - LIKELY_NCC).sum()),
        likely_ncc_held_out=float((near_held_out.distance[:, 2] < 1 - LIKELY_NCC).mean()),
        below_first_percentile={
            name: float((ours < np.quantile(theirs, 0.01)).mean())
            for name, ours, theirs in zip(
                CRITERIA, near.distance.T, near_held_out.distance.T, strict=True
            )
            if np.isfinite(theirs).all()
        },
        leaks=_leaks(run, banks, handles, config.num_bootstrap, seed),
    )
    return found, scores


def _start(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """One Ray task of one core a call."""
    import ray

    task: Any = ray.remote(num_cpus=1)(function)
    return [task.remote(*call) for call in calls]


def _cut_real(
    samples: SampleSet, look: Look, wanted: NDArray[np.bool_], flipped: bool
) -> Items | None:
    """One task a shard that has any of the rows."""
    import ray

    handle = ray.put(samples)
    calls = [
        (handle, start, stop, look, wanted[start:stop], flipped)
        for start, stop in map(samples.shard_rows, range(samples.num_shards))
        if wanted[start:stop].any()
    ]
    return joined(ray.get(_start(cut_real, calls)))


def _cut_run(samples: SampleSet, look: Look, hole: Mask | None) -> Items:
    import ray

    handle = ray.put(samples)
    calls = [
        (handle, start, stop, look, None if hole is None else hole[start:stop])
        for start, stop in map(samples.shard_rows, range(samples.num_shards))
    ]
    run = joined(ray.get(_start(cut_synthetic, calls)))
    assert run is not None
    return run


def _banks(
    look: Look,
    samples: SampleSet,
    patients: NDArray[np.int64],
    run: Items,
    config: AuditConfig,
    seed: int,
) -> tuple[Bank, Bank]:
    """Training and held-out items."""
    learned = samples.index["split"] == SPLITS.index("train")
    train = _cut_real(samples, look, learned, flipped=False)
    held_out = _cut_real(samples, look, ~learned, flipped=True)
    train, held_out = _enough(look, train, held_out, patients, config, samples.group.path)
    return _by_patient(train, patients), _by_patient(with_masks_of(held_out, run, seed), patients)


def _reference(look: Look, samples: SampleSet, train: Bank, run: Items, seed: int) -> Bank:
    """Some training items, ready to be looked up among those of other patients."""
    assert train.patients is not None
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(train.items))[:MAX_REFERENCE])
    items = train.items.take(chosen)
    if items.pictures.features is not None:
        wanted = np.zeros(samples.count, bool)
        wanted[items.rows] = True
        flipped = _cut_real(samples, look, wanted, flipped=True)
        assert flipped is not None
        items = flipped.take(np.searchsorted(flipped.rows, items.rows))
    return Bank(with_masks_of(items, run, seed), train.patients[chosen])


def _look_up_all(queries: Bank, train: Any, view: Progress | None = None) -> Nearest:
    """The nearest training items of all queries, of other patients where they have any."""
    import ray

    items, patients = queries.items, queries.patients
    calls = [
        (items.take(part), None if patients is None else patients[part], train)
        for part in _batches(len(items))
    ]
    parts = []
    for future in _start(_look_up, calls):
        parts.append(ray.get(future))
        if view is not None:
            view.advance(len(parts[-1].distance))
    return Nearest(
        np.concatenate([part.distance for part in parts]),
        np.concatenate([part.row for part in parts]),
    )


def _threshold(
    scores: NDArray[np.float64], near: Nearest, config: AuditConfig
) -> tuple[Threshold, int]:
    """The threshold, and held-out items that are copies themselves: they are not honest."""
    copies = is_exact(near.distance)
    needed = least_held_out(config.false_alarms)
    if np.count_nonzero(~copies) < needed:
        raise InputError(
            f"{int(copies.sum())} of {len(copies)} held-out samples are copies of training ones: "
            f"{needed} others are needed; let no patient be in two splits"
        )
    return threshold_of(scores[~copies], config.false_alarms), int(copies.sum())


def _leaks(
    run: Items, banks: tuple[Bank, Bank], handles: Sequence[Any], num_draws: int, seed: int
) -> dict[str, Leak]:
    """By embedding."""
    import ray

    few = np.sort(np.random.default_rng(seed).permutation(len(run))[:MAX_LEAK_SAMPLES])
    calls = [(run.take(few[part]), *handles) for part in _batches(len(few))]
    parts = ray.get(_start(_distances, calls))
    found = {}
    for embedding in parts[0][0]:
        train, held_out = (_side(parts, i, embedding, bank) for i, bank in enumerate(banks))
        found[embedding] = leak_of(train, held_out, num_draws, seed)
    return found


def _side(parts: Sequence[Any], number: int, embedding: str, bank: Bank) -> Side:
    assert bank.patients is not None
    to_patient, to_run = zip(*(part[number][embedding] for part in parts), strict=True)
    return Side(np.concatenate(to_patient), np.min(to_run, axis=0), bank.patients)


def _enough(
    look: Look,
    train: Items | None,
    held_out: Items | None,
    patients: NDArray[np.int64],
    config: AuditConfig,
    path: str,
) -> tuple[Items, Items]:
    what = {"nodule": "nodule crops", "slice": "samples", "generated": "organs"}[look.region]
    needed = {"train": 1, "held-out": least_held_out(config.false_alarms)}
    for name, items in (("train", train), ("held-out", held_out)):
        count = 0 if items is None else len(items)
        people = 0 if items is None else len(np.unique(patients[items.rows]))
        if count < needed[name] or people < MIN_PATIENTS:
            raise InputError(
                f"{path} has {count} {name} {what} of {people} patients; false alarms of "
                f"{config.false_alarms:g} need {needed[name]} of {MIN_PATIENTS} at least: ingest "
                "more patients, change data.split, or raise audit.false_alarms"
            )
    assert train is not None
    assert held_out is not None
    return train, held_out


def _by_patient(items: Items, patients: NDArray[np.int64]) -> Bank:
    _, number = np.unique(patients[items.rows], return_inverse=True)
    order = np.argsort(number, kind="stable")
    return Bank(items.take(order), number[order])


def _batches(count: int) -> list[slice]:
    return [slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


Stored = tuple[Items, NDArray[np.int64]]
"""A bank as tasks get it."""


def _look_up(queries: Items, patients: NDArray[np.int64] | None, bank: Stored) -> Nearest:
    kin = None if patients is None else patients[:, None] == bank[1][None]
    return nearest(queries.pictures, bank[0].pictures, kin)


def _distances(queries: Items, *banks: Stored) -> list[dict[str, tuple[Array, Array]]]:
    """Of each bank and embedding: least distances to its patients, and of its items to these."""
    found = []
    for items, patients in banks:
        starts = np.searchsorted(patients, np.arange(patients[-1] + 1))
        tables = {
            "embedding": feature_distances(queries.pictures, items.pictures),
            "pixel": pixel_distances(queries.pictures, items.pictures),
        }
        found.append(
            {
                name: (np.minimum.reduceat(table, starts, axis=1), table.min(axis=0))
                for name, table in tables.items()
                if table is not None
            }
        )
    return found


def _scores(
    rows: NDArray[np.int64],
    near: Nearest,
    bank_rows: NDArray[np.int64],
    scale: Scale,
    threshold: Threshold,
) -> Scores:
    score = scale.scores(near.distance)
    # Of the three nearest ones, the one by which it is most suspicious.
    telling = scale.by_criterion(near.distance).argmax(axis=1)
    flagged = score > threshold.score
    return Scores(
        rows=rows,
        distance=near.distance,
        nearest_row=bank_rows[near.row[np.arange(len(rows)), telling]],
        score=score,
        exact=is_exact(near.distance) & flagged,
        flagged=flagged,
    )
