"""Somebody else's label maps become layouts and nodules, or are refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from raysynth.case import Label
from raysynth.errors import UnreadableCase
from raysynth.layout.compose import overlay
from raysynth.layout.foreign import nodules_of, translate
from raysynth.volume import Volume

SHAPE = (6, 20, 30)


def grid(mirrored: float = 1.0) -> Volume:
    return Volume(
        np.zeros(SHAPE, np.int16), (2.0, 1.0, 0.5), direction=np.diag([1.0, 1.0, mirrored])
    )


def test_values_are_translated_and_others_refused() -> None:
    labels = np.zeros(SHAPE, np.int32)
    labels[1, 2:4], labels[2, 5:9], labels[3, 1] = 700, 5, 9
    layout = translate(labels, {700: "spleen", 5: "liver", 9: "ignore"}, grid())
    assert (layout[labels == 700] == Label.SPLEEN).all()
    assert (layout[labels == 5] == Label.LIVER).all()
    assert not layout[labels == 9].any()
    with pytest.raises(UnreadableCase, match=r"has values 9, 700 that .*class_map does not") as no:
        translate(labels, {5: "liver"}, grid())
    assert no.value.rule == "unknown-label"


@pytest.mark.parametrize("mirrored", [1.0, -1.0])
@pytest.mark.parametrize("touching", [True, False])
def test_one_label_for_both_lungs_is_parted(mirrored: float, touching: bool) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 5:15, 2:28] = 1
    if not touching:
        labels[:, :, 13:17] = 0
    layout = translate(labels, {1: "lung"}, grid(mirrored))
    right_to_left = layout if mirrored > 0 else layout[:, :, ::-1]
    assert (right_to_left[1:5, 5:15, 2:13] == Label.RIGHT_LUNG).all()
    assert (right_to_left[1:5, 5:15, 17:28] == Label.LEFT_LUNG).all()
    assert ((layout > 0) == (labels > 0)).all()


@pytest.mark.parametrize("mirrored", [1.0, -1.0])
def test_lungs_are_sided_together_whatever_their_values(mirrored: float) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 5:15, 2:12], labels[1:5, 5:15, 16:24], labels[3, 8, 8] = 3, 4, 7
    layout = translate(labels, {3: "lung", 4: "lung", 7: "nodule"}, grid(mirrored))
    right, left = Label.RIGHT_LUNG, Label.LEFT_LUNG
    low, high = (right, left) if mirrored > 0 else (left, right)
    assert (layout[labels == 3] == low).all()
    assert (layout[labels == 4] == high).all()
    assert layout[3, 8, 8] == Label.NODULE


@pytest.mark.parametrize("mirrored", [1.0, -1.0])
def test_a_lone_lung_stays_whole(mirrored: float) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 5:15, 2:14] = 1
    layout = translate(labels, {1: "lung"}, grid(mirrored))
    assert (layout[labels == 1] == (Label.RIGHT_LUNG if mirrored > 0 else Label.LEFT_LUNG)).all()


def test_parts_of_the_nodule_label_are_nodules() -> None:
    layout = np.zeros(SHAPE, np.uint8)
    layout[1:3, 4:8, 10:18] = Label.NODULE  # 4 mm x 4 mm
    layout[5, 15, 25] = Label.NODULE
    large, small = nodules_of(layout, grid())
    assert large.box_zyx == ((1, 3), (4, 8), (10, 18))
    assert large.centre_zyx == pytest.approx((1.5, 5.5, 13.5))
    assert large.diameter_mm == pytest.approx(2 * np.sqrt(16 / np.pi))
    assert small.mask.shape == (1, 1, 1)
    assert small.ratings == ()


def test_drawn_lungs_replace_those_found() -> None:
    anatomy = np.full(SHAPE, Label.BODY, np.uint8)
    anatomy[:, :, :10], anatomy[:, 0] = Label.LEFT_LUNG, Label.TRACHEA
    outlines = np.zeros(SHAPE, np.uint8)
    outlines[2, 5:9, 3:6], outlines[4] = Label.RIGHT_LUNG, Label.LIVER
    layout = overlay(anatomy, outlines)
    assert not (layout == Label.LEFT_LUNG).any()
    assert (layout == Label.RIGHT_LUNG).sum() == 12
    assert (layout[4] == Label.LIVER).all()
    assert (layout[0, 0] == Label.TRACHEA).all()
    organs = np.where(outlines == Label.LIVER, outlines, 0).astype(np.uint8)
    assert (overlay(anatomy, organs)[0, 5, :10] == Label.LEFT_LUNG).all()
