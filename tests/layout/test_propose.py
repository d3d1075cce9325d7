from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysynth.case import Label
from raysynth.layout.propose import admissible_centres, place_nodule


def plane() -> NDArray[np.uint8]:
    layout = np.full((40, 60), Label.BODY, np.uint8)
    layout[5:35, 4:28] = Label.RIGHT_LUNG
    layout[5:35, 28:50] = Label.LEFT_LUNG  # touching
    layout[18:22, 10:14] = Label.NODULE
    layout[0, :] = Label.BACKGROUND
    return layout


@settings(max_examples=40, deadline=None)
@given(radius=st.floats(0.0, 10.0), number=st.integers(0, 10**6))
def test_a_disc_on_an_admissible_centre_lies_wholly_in_one_lung(radius: float, number: int) -> None:
    layout = plane()
    centres = np.argwhere(admissible_centres(layout, radius))
    y, x = centres[number % len(centres)]
    placed = place_nodule(layout, (int(y), int(x)), radius)
    rows, columns = np.ogrid[:40, :60]
    disc = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    assert len(np.unique(layout[disc])) == 1
    np.testing.assert_array_equal((placed == Label.NODULE) & (layout != Label.NODULE), disc)


def test_a_larger_nodule_has_fewer_places_and_a_huge_one_none() -> None:
    layout = plane()
    counts = [np.count_nonzero(admissible_centres(layout, radius)) for radius in (1, 3, 6, 30)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_the_image_edge_bounds_the_lung() -> None:
    layout = np.full((9, 9), Label.LEFT_LUNG, np.uint8)
    assert np.argwhere(admissible_centres(layout, 4.0)).tolist() == [[4, 4]]


def test_a_juxtapleural_nodule_is_clipped_at_the_pleura_and_at_the_other_lung() -> None:
    layout = plane()
    assert admissible_centres(layout, 50.0, juxtapleural=True)[5, 27]
    placed = place_nodule(layout, (5, 27), 4.0)
    new = (placed == Label.NODULE) & (layout != Label.NODULE)
    assert new.any()
    assert set(layout[new]) == {Label.RIGHT_LUNG}


def test_a_nodule_outside_the_lung_is_refused() -> None:
    with pytest.raises(ValueError, match="not a lung's"):
        place_nodule(plane(), (1, 1), 3.0)
