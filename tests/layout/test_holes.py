from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from raysynth.case import Label
from raysynth.layout.holes import (
    MARGIN_PX,
    _stroke,
    box_hole,
    draw_hole,
    free_hole,
    organ_hole,
)

ORGANS = (Label.LIVER, Label.LEFT_KIDNEY, Label.RIGHT_KIDNEY)


def abdomen() -> np.ndarray:
    layout = np.full((64, 64), Label.BODY, np.uint8)
    layout[5:15, 10:30], layout[40:50, 10:20], layout[40:52, 44:54] = ORGANS
    return layout


def test_organs_share_one_mask() -> None:
    layout = abdomen()
    hole = organ_hole(layout, ORGANS)
    np.testing.assert_array_equal(hole, layout != Label.BODY)
    np.testing.assert_array_equal(organ_hole(layout, ORGANS[:1]), layout == Label.LIVER)


def test_a_box_has_its_margin_and_ends_at_the_edge() -> None:
    hole = box_hole(abdomen() == Label.LIVER, 8)
    expected = np.zeros((64, 64), bool)
    expected[0:23, 2:38] = True
    np.testing.assert_array_equal(hole, expected)
    ball = np.linalg.norm(np.indices((9, 9, 9)) - 4, axis=0) <= 2
    assert box_hole(ball, 1).sum() == 7**3
    with pytest.raises(ValueError, match="no box"):
        box_hole(np.zeros((4, 4), bool), 1)


@pytest.mark.parametrize("shape", [(64, 64), (32, 64), (24, 24, 24)])
def test_strokes_are_brushed(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        hole = free_hole(shape, rng)
        assert hole.shape == shape
        shares.append(hole.mean())
        assert 1 <= ndimage.label(hole, np.ones((3,) * len(shape)))[1] <= 4
    assert 0.003 < np.mean(shares) < 0.3
    assert min(shares) > 0
    assert max(shares) < 0.7


def test_a_stroke_is_all_within_its_radius() -> None:
    hole = np.zeros((20, 24), bool)
    start, stop = np.array([4.2, 3.1]), np.array([15.0, 21.7])
    _stroke(hole, start, stop, 2.5)
    line = np.linspace(start, stop, 2000)
    pixels = np.indices(hole.shape).reshape(2, -1).T
    distance = np.linalg.norm(pixels[:, None] - line, axis=2).min(axis=1).reshape(hole.shape)
    assert hole[distance < 2.499].all()
    assert not hole[distance > 2.501].any()


def test_kinds_are_drawn_as_often_as_said() -> None:
    rng, layout = np.random.default_rng(1), abdomen()
    organs = [organ_hole(layout, [label]) for label in ORGANS]
    single = several = box = 0
    for _ in range(2000):
        hole = draw_hole(layout, ORGANS, rng)
        inside = (hole <= (layout != Label.BODY)).all()
        if any(np.array_equal(hole, organ) for organ in organs):
            single += 1
        elif inside and np.array_equal(hole, organ_hole(layout, np.unique(layout[hole]))):
            several += 1
        elif is_box(hole):
            box += 1
    # A fifth of the holes from organs are unions, of two or three.
    assert single / 2000 == pytest.approx(0.5 * 0.8, abs=0.035)
    assert several / 2000 == pytest.approx(0.5 * 0.2, abs=0.03)
    assert box / 2000 == pytest.approx(0.25, abs=0.03)


def is_box(hole: np.ndarray) -> bool:
    return np.array_equal(hole, box_hole(hole, 0))


def test_margins_lie_in_their_range() -> None:
    rng = np.random.default_rng(2)
    layout = np.zeros((100, 100), np.uint8)
    layout[45:55, 45:55] = Label.LIVER
    sides = {
        int(hole.any(axis=1).sum())
        for hole in (draw_hole(layout, ORGANS, rng) for _ in range(1000))
        if is_box(hole) and hole[45:55, 45:55].all() and hole.sum() > 100
    }
    assert sides == {10 + 2 * margin for margin in range(MARGIN_PX[0], MARGIN_PX[1] + 1)}


def test_without_organs_holes_are_free() -> None:
    layout = np.full((32, 32), Label.BODY, np.uint8)
    one, other = (draw_hole(layout, ORGANS, np.random.default_rng(4)) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert one.any()
