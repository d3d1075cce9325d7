"""Figures of hand-made tables, and what bootstrap and tests make of them."""

from __future__ import annotations

import numpy as np
import pytest

from raysynth.evaluation.downstream.figures import figures_of
from raysynth.evaluation.downstream.localisation import boxes_of, match
from raysynth.evaluation.downstream.segmentation import lesions_found
from raysynth.evaluation.downstream.tables import (
    Table,
    area_under_roc,
    average_precision,
    classification_figures,
    localisation_figures,
    segmentation_figures,
)


def ones(count: int) -> np.ndarray:
    return np.ones(count)


def test_classification_by_hand() -> None:
    table = {
        "score": np.array([0.9, 0.8, 0.4, 0.6, 0.2, 0.1]),
        "label": np.array([1, 1, 1, 0, 0, 0]),
    }
    figures = classification_figures(table, ones(6))
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["precision"] == figures["recall"] == pytest.approx(2 / 3)
    assert figures["specificity"] == figures["f1"] == pytest.approx(2 / 3)
    assert figures["auc"] == pytest.approx(8 / 9)
    # A patient drawn twice counts twice, one that is not drawn not at all.
    weighed = classification_figures(table, np.array([2, 0, 1, 0, 3, 0]))
    assert weighed["accuracy"] == pytest.approx(5 / 6)
    assert weighed["auc"] == 1
    assert np.isnan(classification_figures(table, np.array([0, 0, 0, 1, 1, 1]))["auc"])


def test_ties_count_half_in_the_auc() -> None:
    score, label = np.array([0.5, 0.5, 0.5]), np.array([True, False, False])
    assert area_under_roc(score, label, ones(3)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("hits", "num_true", "expected"),
    [
        ([1, 1], 2, 1.0),
        ([1, 0], 2, 0.5),
        ([0, 1], 1, 0.5),
        ([0, 0], 2, 0.0),
        ([], 2, 0.0),
        # Recall 1/4 at precision 1, then 2/4 and 3/4 at the best later precision, 3/4.
        ([1, 0, 1, 1], 4, 0.25 + 0.5 * 0.75),
        ([1, 0, 1, 0, 0], 2, 0.5 + 0.5 * 2 / 3),
    ],
)
def test_average_precision_by_hand(hits: list[int], num_true: int, expected: float) -> None:
    score = np.linspace(0.9, 0.1, len(hits))
    hit = np.array(hits, bool)
    assert average_precision(score, hit, ones(len(hits)), num_true) == pytest.approx(expected)
    mixed = np.random.default_rng(0).permutation(len(hits))
    again = average_precision(score[mixed], hit[mixed], ones(len(hits)), num_true)
    assert again == pytest.approx(expected)


def test_without_true_boxes_there_is_no_average_precision() -> None:
    assert np.isnan(average_precision(np.array([0.5]), np.array([False]), ones(1), 0))


def test_boxes_find_each_true_one_once() -> None:
    true = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], float)
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 26.5], [40, 40, 50, 50]], float)
    score, hit = match(boxes, np.array([0.6, 0.9, 0.5, 0.4]), true)
    assert score[:4].tolist() == [0.9, 0.6, 0.5, 0.4]
    assert np.isnan(score[4:]).all()
    # The better box takes the first nodule (IoU .9), the exact one comes too late; .65 is no .7.
    assert hit.T.tolist() == [
        [True, False, True, False, True, True],
        [True, False, True, False, True, True],
        [True, False, False, False, True, False],
    ]
    figures = localisation_figures({"score": score, "hit": hit}, ones(6))
    assert figures["ap50"] == figures["ap60"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert (figures["ar50"], figures["ar60"], figures["ar70"]) == (1, 1, 0.5)


def test_slices_without_boxes_or_nodules_match_nothing() -> None:
    none, some = np.empty((0, 4)), np.array([[0, 0, 10, 10.0]])
    assert match(none, np.empty(0), some)[1].tolist() == [[False] * 3]
    assert match(some, np.array([0.5]), none)[1].tolist() == [[False] * 3]
    assert match(none, np.empty(0), none)[1].shape == (0, 3)


def test_a_box_without_pixels_of_its_own_is_a_nodule_too() -> None:
    layout = np.zeros((20, 20), np.uint8)
    layout[2:6, 3:5] = 5
    apart = boxes_of(layout, np.array([10, 10, 14, 14]))
    assert apart.tolist() == [[2, 2, 6, 6], [10, 10, 14, 14]]
    assert len(boxes_of(layout, np.array([2, 2, 6, 6]))) == 1
    assert boxes_of(np.zeros_like(layout), np.full(4, -1)).shape == (0, 4)


def test_dice_is_of_patients_and_lesions_are_found_from_a_tenth_on() -> None:
    table = {
        "patient": np.array([0, 0, 1, 2]),
        "both": np.array([4, 0, 5, 0]),
        "drawn": np.array([4, 2, 5, 7]),
        "true": np.array([4, 6, 5, 0]),
        "lesions": np.array([1, 1, 1, 0]),
        "found": np.array([1, 0, 1, 0]),
    }
    figures = segmentation_figures(table, ones(4))
    # 2 x 4 / (6 + 10), and 1; whoever has no nodule has no Dice.
    assert figures["dice"] == pytest.approx((0.5 + 1) / 2)
    assert figures["lesion_sensitivity"] == pytest.approx(2 / 3)
    weighed = segmentation_figures(table, np.array([3, 3, 1, 0]))
    assert weighed["dice"] == pytest.approx((3 * 0.5 + 1) / 4)


def test_a_lesion_is_held_against_all_that_touches_it() -> None:
    true, drawn = np.zeros((30, 30), bool), np.zeros((30, 30), bool)
    true[0:4, 0:5] = True  # 20 pixels
    drawn[3:5, 4:5] = True  # one of them, and one beside
    assert lesions_found(drawn, true) == (1, 0)
    drawn[2:4, 0:2] = True
    assert lesions_found(drawn, true) == (1, 1)
    true[20:24, 20:24] = True
    assert lesions_found(drawn, true) == (2, 1)
    assert lesions_found(drawn, np.zeros_like(true)) == (0, 0)


def _runs(right: float, folds: int = 8, seed: int = 0) -> list[list[Table]]:
    """Tables of a classifier that is right so often, four patients a fold."""
    rng = np.random.default_rng(seed)
    tables = []
    for fold in range(folds):
        label = np.tile([0.0, 1.0], 100)
        said = np.where(rng.uniform(size=200) < right, label, 1 - label)
        patient = np.repeat([f"{fold}-{number}" for number in range(4)], 50)
        tables.append({"patient": patient, "label": label, "score": said})
    return [tables]


def test_what_is_better_is_told_from_what_is_not() -> None:
    arms = {"real": _runs(0.8), "better": _runs(0.9, seed=1), "alike": _runs(0.8, seed=2)}
    figures = figures_of(arms, classification_figures, 200, seed=0)
    accuracy = {name: of["accuracy"] for name, of in figures.items()}
    assert accuracy["real"].difference is None
    assert accuracy["real"].mean == pytest.approx(0.8, abs=0.02)
    better, alike = accuracy["better"].difference, accuracy["alike"].difference
    assert better is not None
    assert alike is not None
    assert (better.sign, alike.sign) == (1, 0)
    assert better.interval is not None
    assert better.value is not None
    assert better.interval[0] < better.value < better.interval[1]
    assert better.value == pytest.approx(0.1, abs=0.03)
    assert better.signed_rank.p == pytest.approx(2**-7)
    assert better.signed_rank_p == pytest.approx(2**-6)
    assert better.rank_sum.effect > 0.9
    swapped = figures_of(
        {"better": arms["better"], "real": arms["real"]}, classification_figures, 200, 0
    )
    worse = swapped["real"]["accuracy"].difference
    assert worse is not None
    assert worse.sign == -1


def test_the_same_predictions_differ_in_nothing() -> None:
    figures = figures_of({"real": _runs(0.8), "again": _runs(0.8)}, classification_figures, 50, 0)
    difference = figures["again"]["accuracy"].difference
    assert difference is not None
    assert difference.value == 0
    assert difference.interval == (0, 0)
    assert difference.signed_rank_p == 1


def test_a_fold_without_samples_is_left_out_and_patients_need_not_be_in_every_table() -> None:
    real, other = _runs(0.8), _runs(0.9, seed=1)
    for runs in (real, other):
        runs[0][3] = {name: column[:0] for name, column in runs[0][3].items()}
    other[0][0] = {name: column[50:] for name, column in other[0][0].items()}
    figures = figures_of({"real": real, "other": other}, classification_figures, 50, 0)
    assert figures["real"]["accuracy"].folds[3] is None
    difference = figures["other"]["accuracy"].difference
    assert difference is not None
    assert difference.signed_rank.n == 7
