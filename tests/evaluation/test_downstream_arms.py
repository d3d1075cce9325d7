from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from raysynth.case import Label
from raysynth.config import DownstreamConfig, Imbalance
from raysynth.config.downstream import Task
from raysynth.errors import InputError
from raysynth.evaluation.downstream.arms import Arm, is_rare, plan_arms, samples_of, usable
from raysynth.evaluation.downstream.augment import augmented
from raysynth.evaluation.downstream.examples import Examples, of_texture
from raysynth.evaluation.downstream.folds import make_folds
from tests.evaluation.trial_examples import toy, toy_synthetic

CONFIG = DownstreamConfig(folds=4, ratios=(0.5, 1.0), augmented_copies=2)
RARE = CONFIG.model_copy(update={"imbalance": Imbalance(kept=0.25)})


def arms_of(
    config: DownstreamConfig, real: Examples, synthetic: Examples, fold: int = 0
) -> dict[str, Arm]:
    folds = make_folds(real, config.folds, seed=0)
    arms = plan_arms("classification", real, {"drawn": synthetic}, folds[fold], config, seed=0)
    return {arm.name: arm for arm in arms}


def test_every_arm_has_its_samples() -> None:
    real, drawn = toy(8), toy_synthetic(40)
    arms = arms_of(CONFIG, real, drawn)
    # Two of eight patients test: eighteen of 24 slices are left.
    counts = {
        name: len(samples_of(arm, real, {"drawn": drawn}, seed=0)) for name, arm in arms.items()
    }
    assert counts == {
        "real": 18,
        "+ drawn x0.5": 27,
        "+ drawn x1": 36,
        "duplicated": 36,
        "augmented": 54,
    }
    few, many = arms["+ drawn x0.5"].synthetic, arms["+ drawn x1"].synthetic
    assert np.array_equal(few, many[: len(few)])
    assert len(set(many.tolist())) == 18


def test_samples_on_the_layout_of_a_test_patient_are_left_out() -> None:
    real = toy(8)
    (test, *_) = make_folds(real, CONFIG.folds, seed=0)
    lender = min(test.test)
    drawn = toy_synthetic(60)
    lent = np.where(np.arange(60) < 30, lender, drawn.patient)
    arms = arms_of(CONFIG, real, replace(drawn, patient=lent))
    assert arms["+ drawn x1"].synthetic.min() >= 30
    with pytest.raises(InputError, match=r"ratios 0.5 wants 9 samples of drawn .* 0 can be used"):
        arms_of(CONFIG, real, toy_synthetic(60, lender))


def test_a_patient_of_the_generator_may_not_test() -> None:
    real = toy(8)
    held_out = real.held_out.copy()
    held_out[0] = False  # one slice of a patient whose others are held out
    real = replace(real, held_out=held_out)
    folds = make_folds(real, CONFIG.folds, seed=0)
    (where,) = (fold.number for fold in folds if "p0" in fold.test)
    with pytest.raises(InputError, match="patients of the generator too, p0"):
        arms_of(CONFIG, real, toy_synthetic(40), where)


def test_rare_nodules_are_thinned_and_filled_up_again() -> None:
    real, drawn = toy(16), toy_synthetic(60)
    scores = drawn.scores.copy()
    scores[:20, -1] = 5
    drawn = replace(drawn, scores=scores)
    arms = arms_of(RARE, real, drawn)
    thinned = {name: arm for name, arm in arms.items() if arm.is_thinned}
    assert list(thinned) == ["thinned", "thinned + drawn", "thinned, oversampled"]
    rare = of_texture(real, "non_solid")
    # Twelve training patients have one rare slice of three each; those of three stay.
    assert rare[arms["real"].real].sum() == 12
    for arm in thinned.values():
        assert (~rare[arm.real]).sum() == 24
    assert rare[thinned["thinned"].real].sum() == 3
    filled = thinned["thinned + drawn"]
    assert np.array_equal(filled.real, thinned["thinned"].real)
    assert len(filled.synthetic) == 9
    assert of_texture(drawn, "non_solid")[filled.synthetic].all()
    again = thinned["thinned, oversampled"].real
    assert rare[again].sum() == 12
    assert len(set(again[rare[again]].tolist())) == 3


def test_a_kind_nobody_has_or_draws_is_refused() -> None:
    real, drawn = toy(16), toy_synthetic(60)
    solid = np.full_like(real.scores, 5)
    with pytest.raises(InputError, match="0 training patients have a non_solid nodule"):
        arms_of(RARE, replace(real, scores=solid), drawn)
    with pytest.raises(InputError, match="no usable sample of drawn was asked for"):
        arms_of(RARE, real, replace(drawn, scores=np.full_like(drawn.scores, np.nan)))


def test_tasks_take_what_they_can_use() -> None:
    real = toy(2, each=4)
    box, malignancy, plane = real.box.copy(), real.malignancy.copy(), real.plane.copy()
    box[0], malignancy[1], malignancy[2], plane[4] = -1, 3, np.nan, 5
    scores = real.scores.copy()
    scores[3] = np.nan
    real = replace(real, box=box, malignancy=malignancy, plane=plane, scores=scores)
    left_out = {
        (task, is_real): np.flatnonzero(~usable(task, real, is_real)).tolist()
        for task in get_args(Task)
        for is_real in (True, False)
    }
    # Real nodules need a malignancy that says something, synthetic ones scores to read it off.
    assert left_out == {
        ("classification", True): [0],
        ("classification", False): [0],
        ("malignancy", True): [0, 1, 2],
        ("malignancy", False): [0, 3],
        ("localisation", True): [5],
        ("localisation", False): [5],
        ("segmentation", True): [5],
        ("segmentation", False): [5],
    }


def test_a_slice_that_shows_a_rare_nodule_beside_its_own_is_rare_where_all_of_it_is_seen() -> None:
    real = toy(1, each=3)
    real = replace(real, plane=np.array([0, 0, 1]))
    assert is_rare("classification", real, "non_solid").tolist() == [True, False, False]
    assert is_rare("segmentation", real, "non_solid").tolist() == [True, True, False]


def test_layout_and_box_move_with_the_augmented_image() -> None:
    real = toy(4)
    copies = augmented(real, 2, np.random.default_rng(0))
    assert len(copies) == 2 * len(real)
    assert not np.array_equal(copies.hu[: len(real)], real.hu)
    for hu, layout, (y0, x0, y1, x1) in zip(copies.hu, copies.layout, copies.box, strict=True):
        nodule = layout == Label.NODULE
        inside = nodule[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1]
        assert inside.sum() == nodule.sum() > 0
        assert hu[nodule].mean() > hu[layout == Label.LEFT_LUNG].mean() + 400
    assert np.array_equal(copies.box[:, 2] - copies.box[:, 0], np.tile(real.side, 2))
