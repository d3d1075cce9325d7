from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysynth.case import Label, Nodule
from raysynth.layout.compose import compose, square_box


def nodule(corner: tuple[int, int, int], shape: tuple[int, int, int] = (2, 2, 2)) -> Nodule:
    mask = np.ones(shape, np.bool_)
    mask[0, 0, 0] = False
    return Nodule((0.0, 0.0, 0.0), corner, mask, 3.0, ())


def test_a_nodule_overwrites_whatever_lies_there() -> None:
    anatomy = np.array([Label.LEFT_LUNG, Label.BODY], np.uint8).repeat(32).reshape(4, 4, 4)
    layout = compose(anatomy, [nodule((1, 1, 1))])
    assert np.count_nonzero(layout == Label.NODULE) == 7
    assert layout[1, 1, 1] == Label.LEFT_LUNG  # outside the mask
    assert layout[2, 2, 2] == Label.NODULE
    assert not np.any(anatomy == Label.NODULE)


def test_a_nodule_past_the_edge_is_cut_off() -> None:
    layout = compose(np.zeros((3, 3, 3), np.uint8), [nodule((-1, 2, 2)), nodule((2, 0, 0))])
    assert layout[0, 2, 2] == Label.NODULE
    assert np.count_nonzero(layout == Label.NODULE) == 1 + 3


@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    corner=st.tuples(st.integers(0, 19), st.integers(0, 19)),
    extent=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    margin=st.integers(0, 5),
    min_side=st.integers(1, 6),
)
def test_a_box_is_square_holds_the_mask_and_stays_inside(
    size: tuple[int, int],
    corner: tuple[int, int],
    extent: tuple[int, int],
    margin: int,
    min_side: int,
) -> None:
    mask = np.zeros(size, np.bool_)
    mask[
        corner[0] % size[0] : corner[0] % size[0] + extent[0],
        corner[1] % size[1] : corner[1] % size[1] + extent[1],
    ] = True
    y0, x0, y1, x1 = square_box(mask, margin, min_side)
    assert 0 <= y0 < y1 <= size[0]
    assert 0 <= x0 < x1 <= size[1]
    assert np.count_nonzero(mask[y0:y1, x0:x1]) == np.count_nonzero(mask)
    height, width = (np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (1, 0))
    wanted = max(height + 2 * margin, width + 2 * margin, min_side)
    assert (y1 - y0, x1 - x0) == (min(wanted, size[0]), min(wanted, size[1]))


def test_a_box_sits_in_the_middle_of_its_mask() -> None:
    mask = np.zeros((20, 20), np.bool_)
    mask[8:12, 9:11] = True
    assert square_box(mask) == (8, 8, 12, 12)
    assert square_box(mask, margin_px=2) == (6, 6, 14, 14)


def test_an_empty_mask_has_no_box() -> None:
    with pytest.raises(ValueError, match="empty mask"):
        square_box(np.zeros((4, 4), np.bool_))
