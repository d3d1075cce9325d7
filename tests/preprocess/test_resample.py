from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysynth.preprocess.resample import (
    grid_positions,
    label_weights,
    linear_weights,
    resample,
    resample_labels,
)
from raysynth.volume import Triple, Volume

SPACING = (2.5, 0.8, 0.9)
GRADIENT = np.array([11.0, -7.0, 5.0])
"""HU per mm of the ramp below, in (z, y, x)."""


def ramp(shape: tuple[int, int, int], direction: NDArray[np.float64]) -> Volume:
    """HU that rise linearly with the position in the patient."""
    empty = Volume(np.zeros(shape, np.int16), SPACING, (10.0, -20.0, 30.0), direction)
    positions = empty.position_mm(np.moveaxis(np.indices(shape).astype(np.float64), 0, -1))
    return Volume(
        np.rint(positions @ GRADIENT).astype(np.int16), SPACING, empty.origin_mm, direction
    )


def oblique() -> NDArray[np.float64]:
    angle = np.radians(20)
    rotation = np.eye(3)
    rotation[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return rotation @ np.diag([1.0, -1.0, 1.0])


@pytest.mark.parametrize("direction", [np.eye(3), oblique()], ids=["straight", "oblique"])
@pytest.mark.parametrize("spacing_mm", [(0.7, 0.7, 0.7), (4.0, 1.7, 1.3), (2.5, 0.8, 0.9)])
def test_a_ramp_keeps_its_value_at_every_place(
    direction: NDArray[np.float64], spacing_mm: Triple
) -> None:
    shape = (14, 40, 42)
    new = resample(ramp(shape, direction), spacing_mm)
    positions = new.position_mm(np.moveaxis(np.indices(new.shape).astype(np.float64), 0, -1))
    error = np.abs(new.hu - positions @ GRADIENT)
    inner = tuple(
        slice(margin, size - margin)
        for size, margin in zip(
            new.shape,
            (2 if wide > old else 0 for wide, old in zip(spacing_mm, SPACING, strict=True)),
            strict=True,
        )
    )
    assert error[inner].max() <= 1.01  # rounded twice


def test_the_same_spacing_changes_nothing() -> None:
    volume = ramp((5, 6, 7), np.eye(3))
    same = resample(volume, SPACING)
    np.testing.assert_array_equal(same.hu, volume.hu)
    assert same.origin_mm == pytest.approx(volume.origin_mm)


def test_a_pattern_finer_than_the_new_voxels_fades_to_its_mean() -> None:
    checkers = (np.indices((4, 64, 64)).sum(axis=0) % 2 * 1000).astype(np.int16)
    coarse = resample(Volume(checkers, (1.0, 1.0, 1.0)), (1.0, 4.0, 4.0))
    assert np.abs(coarse.hu[:, 2:-2, 2:-2] - 500).max() <= 5


def test_a_ball_keeps_its_place_and_its_volume() -> None:
    z, y, x = np.indices((20, 60, 60)) * np.reshape(SPACING, (3, 1, 1, 1))
    centre = np.array([24.0, 27.0, 20.0])
    ball = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 <= 10.0**2
    for spacing_mm in ((1.0, 1.0, 1.0), (3.0, 2.0, 2.0)):
        labels = resample_labels(ball.astype(np.uint8) * 5, SPACING, spacing_mm)
        twin = resample(Volume(np.zeros(ball.shape, np.int16), SPACING), spacing_mm)
        assert labels.shape == twin.shape
        assert set(np.unique(labels)) == {0, 5}
        found = twin.position_mm(np.argwhere(labels == 5).mean(axis=0))
        np.testing.assert_allclose(found, centre, atol=0.3)
        volume_mm3 = np.count_nonzero(labels) * np.prod(spacing_mm)
        assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.06)


def test_shrinking_labels_keeps_the_one_that_covers_most() -> None:
    layout = np.zeros((1, 4, 4), np.uint8)
    layout[0, :, :2] = 1
    layout[0, :, 2:] = 2
    layout[0, 0, 0] = 3
    shrunk = resample_labels(layout, (1.0, 1.0, 1.0), (1.0, 2.0, 2.0))
    assert shrunk.tolist() == [[[1, 2], [1, 2]]]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), spacing=st.floats(0.3, 5.0), new=st.floats(0.3, 5.0))
def test_weights_sum_to_one_and_no_old_voxel_is_forgotten(
    size: int, spacing: float, new: float
) -> None:
    positions = grid_positions(size, spacing, new)
    assert positions[0] >= -1e-4
    assert positions[-1] <= (size - 1) * spacing + 1e-4
    for weights in (linear_weights, label_weights):
        matrix = weights(size, spacing, positions, new).toarray()
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-5)
    if new <= spacing:
        nearest = np.floor(positions / spacing + 0.5 + 1e-9)
        assert set(nearest.astype(int)) == set(range(size))


def test_nothing_counts_outside_the_grid() -> None:
    positions = np.array([-2.0, -0.6, -0.4, 3.4, 3.6])
    sums = linear_weights(4, 1.0, positions, 1.0).toarray().sum(axis=1)
    assert sums.tolist() == [0, 0, 1, 1, 0]
