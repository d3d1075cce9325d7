"""Who tests: folds of patients whom neither the trained networks nor the generator have seen."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError
from raysynth.evaluation.downstream.examples import NOBODY, Examples
from raysynth.seeding import seed_of


@dataclass(frozen=True)
class Fold:
    """One part of the held-out patients, who test what all others have taught."""

    number: int
    test: frozenset[str]

    def tests(self, patient: NDArray[np.str_]) -> NDArray[np.bool_]:
        """Which samples are of test patients, or were drawn on the layout of one."""
        return np.isin(patient, sorted(self.test))


def make_folds(real: Examples, count: int, seed: int) -> list[Fold]:
    """Deals the held-out patients into folds, those who have a nodule to show first.

    The order is by a hash of seed and patient: other patients' samples, their number or their order
    change nothing, and every fold has nearly the same number of patients with a nodule.

    Raises:
        InputError: fewer held-out patients with a nodule than folds.
    """
    held_out = set(real.patient[real.held_out].tolist())
    showing = set(real.patient[real.held_out & real.showing].tolist())
    if len(showing) < count:
        raise InputError(
            f"downstream.folds {count}, but {len(showing)} patients with a nodule were held out "
            "from the generator: lower downstream.folds, or raise data.split.test and train the "
            "generator again"
        )
    order = sorted(held_out, key=lambda key: (key not in showing, seed_of("fold", seed, key)))
    return [Fold(number, frozenset(order[number::count])) for number in range(count)]


def refuse_leaks(test: Collection[str], **others: Iterable[str]) -> None:
    """Makes sure that nobody who tests has taught.

    Args:
        test: keys of the patients of a test fold.
        others: keys of patients by what they were used for, such as `training` or `generator`.

    Raises:
        InputError: a patient is on both sides.
    """
    for use, patients in others.items():
        shared = set(test).intersection(patients) - {NOBODY}
        if shared:
            raise InputError(
                f"{len(shared)} of {len(set(test))} test patients are among the patients of the "
                f"{use} too, {min(shared)} for one: figures of such a trial would be of memory; "
                "split by patient (data.split), and train the generator on that split"
            )
