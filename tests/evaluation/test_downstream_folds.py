from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from raysynth.errors import InputError
from raysynth.evaluation.downstream.examples import NOBODY
from raysynth.evaluation.downstream.folds import make_folds, refuse_leaks
from tests.evaluation.trial_examples import toy


def test_every_held_out_patient_tests_once_and_nobody_else_does() -> None:
    real = toy(12)
    held_out = np.char.not_equal(real.patient, "p3") & np.char.not_equal(real.patient, "p7")
    folds = make_folds(replace(real, held_out=held_out), 4, seed=0)
    tested = [key for fold in folds for key in fold.test]
    assert sorted(tested) == sorted(set(real.patient[held_out].tolist()))
    assert {len(fold.test) for fold in folds} == {2, 3}
    masks = [fold.tests(real.patient) for fold in folds]
    assert (np.sum(masks, axis=0) == held_out).all()


def test_folds_depend_on_the_patients_and_the_seed_alone() -> None:
    real = toy(12)
    mixed = real.take(np.random.default_rng(0).permutation(len(real)))
    assert make_folds(mixed.take(np.arange(30)), 3, 0)[0].test <= set(real.patient.tolist())
    assert make_folds(mixed, 3, seed=0) == make_folds(real, 3, seed=0)
    assert make_folds(real, 3, seed=1) != make_folds(real, 3, seed=0)


def test_patients_with_nodules_are_spread_evenly() -> None:
    real = toy(12)
    showing = np.isin(real.patient, ["p0", "p4", "p8"])
    box = np.where(showing[:, None], real.box, -1)
    folds = make_folds(replace(real, box=box), 3, seed=0)
    assert [len(fold.test & {"p0", "p4", "p8"}) for fold in folds] == [1, 1, 1]
    with pytest.raises(InputError, match=r"downstream\.folds 4, but 3 patients with a nodule"):
        make_folds(replace(real, box=box), 4, seed=0)


def test_who_tests_has_not_taught() -> None:
    refuse_leaks({"a", "b"}, training=["c"], generator=[], layouts=["d", NOBODY])
    refuse_leaks({"a", NOBODY}, layouts=[NOBODY])
    with pytest.raises(InputError, match="1 of 2 test patients are among the patients of the gen"):
        refuse_leaks({"a", "b"}, training=["c"], generator=["b", "b", "c"])
    with pytest.raises(InputError, match="patients of the layouts too, a for one"):
        refuse_leaks({"a", "b"}, layouts=["a"])
