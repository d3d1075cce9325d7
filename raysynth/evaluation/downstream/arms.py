"""What the networks of a trial are trained on: real samples, more of them, or synthetic too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raysynth.config.downstream import DownstreamConfig, Imbalance, Task
from raysynth.config.sampling import TextureClass
from raysynth.errors import InputError
from raysynth.evaluation.downstream.augment import augmented
from raysynth.evaluation.downstream.examples import Examples, concatenate, of_texture
from raysynth.evaluation.downstream.folds import Fold, refuse_leaks
from raysynth.evaluation.downstream.volumes import Volumes
from raysynth.seeding import seed_of

Rows = NDArray[np.int64]

MIDDLE = 3.0
"""Readers' mean malignancy: below it benign, above malignant; what is rated so is left out."""

REAL, DUPLICATED, AUGMENTED = "real", "duplicated", "augmented"
THINNED, OVERSAMPLED = "thinned", "thinned, oversampled"


def _none() -> Rows:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Arm:
    """The training samples of one network.

    Attributes:
        name: as in the tables.
        real: rows of the real examples; may be repeated.
        origin: of the synthetic examples, if any.
        synthetic: their rows.
        copies: augmented copies made of every real sample.
        is_thinned: whether it belongs to the imbalanced arms, which are judged on the rare nodules.
    """

    name: str
    real: Rows
    origin: str = ""
    synthetic: Rows = field(default_factory=_none)
    copies: int = 0
    is_thinned: bool = False


def plan_arms(
    task: Task,
    real: Examples,
    synthetic: Mapping[str, Examples],
    fold: Fold,
    config: DownstreamConfig,
    seed: int,
) -> list[Arm]:
    """All arms of one fold of a task; `real` comes first, and `thinned` first of the thinned ones.

    Arms differ in their samples alone. A network takes as many steps in one as in another, so
    `duplicated` says what comes of more samples without anything new, which is chance.

    Raises:
        InputError: too few samples for an arm, or a test patient among those who teach.
    """
    rows = np.flatnonzero(usable(task, real, is_real=True) & ~fold.tests(real.patient))
    if not len(rows):
        raise InputError(
            f"downstream.tasks {task}: no real training sample in fold {fold.number}; leave the "
            "task out, or ingest more patients"
        )
    pools = {name: lent(task, of, fold, seed) for name, of in synthetic.items()}
    refuse_leaks(
        fold.test,
        training=real.patient[rows].tolist(),
        generator=real.patient[~real.held_out].tolist(),
        layouts=[key for name, pool in pools.items() for key in synthetic[name].patient[pool]],
    )
    arms = [Arm(REAL, rows)]
    for origin, pool in pools.items():
        for ratio in config.ratios:
            wanted = round(ratio * len(rows))
            _enough(task, origin, ratio, wanted, pool)
            arms.append(Arm(f"+ {origin} x{ratio:g}", rows, origin, pool[:wanted]))
    arms.append(Arm(DUPLICATED, np.tile(rows, 2)))
    if config.augmented_copies:
        arms.append(Arm(AUGMENTED, rows, copies=config.augmented_copies))
    if config.imbalance is not None:
        arms += _thinned(task, config.imbalance, rows, real, synthetic, pools, seed)
    if task == "malignancy":
        for arm in arms:
            _both_kinds(real.malignancy[arm.real])
    return arms


def usable(task: Task, examples: Examples, is_real: bool) -> NDArray[np.bool_]:
    """Which slices a task can take; of an image that was cut for two nodules it may want one."""
    match task:
        case "classification":
            return examples.boxed
        case "malignancy":
            said: NDArray[np.bool_] = np.isfinite(examples.scores.sum(axis=1))
            if is_real:
                rating = examples.malignancy
                said = np.isfinite(rating) & np.not_equal(rating, MIDDLE)
            return examples.boxed & said
        case _:
            first = np.zeros(len(examples), bool)
            first[np.unique(examples.plane, return_index=True)[1]] = True
            return first


def is_rare(task: Task, examples: Examples, texture: TextureClass) -> NDArray[np.bool_]:
    """Which slices were cut for such a nodule or, where tasks see all of a slice, show one."""
    cut_for = of_texture(examples, texture)
    if task in ("classification", "malignancy"):
        return cut_for
    return np.isin(examples.plane, examples.plane[cut_for])


def lent(task: Task, synthetic: Examples, fold: Fold, seed: int) -> Rows:
    """Rows of an origin that a fold may train on, in random order, so a prefix is a sample."""
    rows = np.flatnonzero(usable(task, synthetic, is_real=False) & ~fold.tests(synthetic.patient))
    return np.random.default_rng(seed_of("synthetic", seed, fold.number)).permutation(rows)


def samples_of(arm: Arm, real: Examples, synthetic: Mapping[str, Examples], seed: int) -> Examples:
    """The training slices of an arm."""
    parts = [real.take(arm.real)]
    if arm.copies:
        parts.append(augmented(parts[0], arm.copies, np.random.default_rng(seed)))
    if len(arm.synthetic):
        parts.append(synthetic[arm.origin].take(arm.synthetic))
    return concatenate(parts)


def volumes_of(arm: Arm, real: Examples, synthetic: Mapping[str, Examples], seed: int) -> Volumes:
    """The training volumes of an arm."""
    volumes = own = Volumes.of(real, arm.real)
    if arm.copies:
        volumes += own.augmented(arm.copies, np.random.default_rng(seed))
    if len(arm.synthetic):
        volumes += Volumes.of(synthetic[arm.origin], arm.synthetic)
    return volumes


def _thinned(
    task: Task,
    imbalance: Imbalance,
    rows: Rows,
    real: Examples,
    synthetic: Mapping[str, Examples],
    pools: Mapping[str, Rows],
    seed: int,
) -> list[Arm]:
    """Arms without most of one kind of nodule, as they are and filled up in two ways.

    Whole patients lose their rare nodules: neighbouring slices of one would be hardly fewer.
    """
    texture = imbalance.texture
    rare = rows[is_rare(task, real, texture)[rows]]
    patients = sorted(set(real.patient[rare].tolist()), key=lambda key: seed_of("rare", seed, key))
    if len(patients) < 2:
        raise InputError(
            f"downstream.imbalance: {len(patients)} training patients have a {texture} nodule with "
            "scores; choose another texture, or leave imbalance out"
        )
    kept = patients[: max(1, round(imbalance.kept * len(patients)))]
    stays = np.isin(real.patient[rare], kept)
    removed = len(rare) - int(np.count_nonzero(stays))
    thinned = rows[~np.isin(rows, rare[~stays])]
    arms = [Arm(THINNED, thinned, is_thinned=True)]
    for origin, pool in pools.items():
        fitting = pool[is_rare(task, synthetic[origin], texture)[pool]]
        if not len(fitting):
            raise InputError(
                f"downstream.imbalance: no usable sample of {origin} was asked for with a "
                f"{texture} nodule; draw some (sampling.cohort.texture)"
            )
        name = f"{THINNED} + {origin}"
        arms.append(Arm(name, thinned, origin, fitting[:removed], is_thinned=True))
    again = np.resize(rare[stays], removed)
    return [*arms, Arm(OVERSAMPLED, np.concatenate([thinned, again]), is_thinned=True)]


def _both_kinds(malignancy: NDArray[np.float32]) -> None:
    if len(np.unique(malignancy > MIDDLE)) < 2:
        raise InputError(
            f"downstream.tasks malignancy: the {len(malignancy)} rated nodule slices of an arm's "
            "training patients are all benign or all malignant; leave the task out, or ingest more "
            "patients"
        )


def _enough(task: Task, origin: str, ratio: float, wanted: int, pool: Rows) -> None:
    if wanted > len(pool):
        raise InputError(
            f"downstream.ratios {ratio:g} wants {wanted} samples of {origin} for {task}, and "
            f"{len(pool)} can be used: draw more (sampling.num_samples), or lower the ratio"
        )
