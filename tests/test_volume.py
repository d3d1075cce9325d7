"""Geometry: voxel coordinates to LPS millimetres and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysynth.volume import Volume

coordinate = st.floats(-500, 500)


@given(index=st.tuples(coordinate, coordinate, coordinate), angle=st.floats(0, 6.3))
def test_positions_invert(index: tuple[float, float, float], angle: float) -> None:
    cos, sin = np.cos(angle), np.sin(angle)
    oblique = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    volume = Volume(np.zeros((2, 3, 4), np.int16), (2.5, 0.7, 0.8), (10.0, -20.0, 30.0), oblique)
    assert volume.index_of(volume.position_mm(index)) == pytest.approx(index, abs=1e-6)


def test_a_step_along_an_axis_is_its_spacing() -> None:
    volume = Volume(np.zeros((2, 3, 4), np.int16), (2.5, 0.7, 0.8), (1.0, 2.0, 3.0))
    step = volume.position_mm((1, 1, 1)) - volume.position_mm((0, 0, 0))
    assert step == pytest.approx([2.5, 0.7, 0.8])


@pytest.mark.parametrize(
    ("hu", "spacing", "message"),
    [
        (np.zeros((2, 2), np.int16), (1.0, 1.0, 1.0), "2 axes"),
        (np.zeros((2, 2, 2), np.float32), (1.0, 1.0, 1.0), "float32"),
        (np.zeros((2, 2, 2), np.int16), (1.0, 0.0, 1.0), "must be positive"),
    ],
)
def test_what_is_no_volume_is_refused(hu: np.ndarray, spacing: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Volume(hu, spacing)
