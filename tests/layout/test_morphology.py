"""Fast forms equal the library's slow ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from raysynth.layout.morphology import (
    IN_PLANE,
    block_mean,
    dilate,
    erode,
    fill_holes,
    grow,
    open_planes,
    refine,
)


@pytest.fixture(params=[(1, 1, 1), (5, 9, 7), (20, 40, 30)])
def mask(request: pytest.FixtureRequest) -> np.ndarray:
    noise = np.random.default_rng(3).normal(size=request.param)
    return ndimage.gaussian_filter(noise, 1.0) > -0.05


def test_dilation_and_erosion_are_scipys(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(dilate(mask), ndimage.binary_dilation(mask))
    np.testing.assert_array_equal(erode(mask), ndimage.binary_erosion(mask, border_value=1))
    in_plane = ndimage.binary_dilation(mask, IN_PLANE)
    np.testing.assert_array_equal(dilate(mask, (1, 2)), in_plane)


@pytest.mark.parametrize("steps", [1, 3])
def test_opening_is_scipys(mask: np.ndarray, steps: int) -> None:
    before = mask.copy()
    opened = open_planes(mask, radius_mm=2.0 * steps, spacing_mm=(5.0, 2.0, 2.5))
    np.testing.assert_array_equal(opened, ndimage.binary_opening(mask, IN_PLANE, steps))
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 3, 3), (2, 3, 1), (4, 2, 5)])
def test_block_means_are_means_of_blocks(factors: tuple[int, int, int]) -> None:
    shape = tuple(3 * factor for factor in factors)
    hu = np.random.default_rng(4).integers(-1024, 3071, shape).astype(np.int16)
    fz, fy, fx = factors
    expected = hu.reshape(3, fz, 3, fy, 3, fx).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(block_mean(hu, factors), expected, rtol=1e-5, atol=1e-3)
    # Cut by one row and column, the last blocks repeat their edge.
    cut = hu[:, : shape[1] - (fy > 1), : shape[2] - (fx > 1)]
    padded = np.pad(cut, ((0, 0), (0, int(fy > 1)), (0, int(fx > 1))), mode="edge")
    np.testing.assert_array_equal(block_mean(cut, factors), block_mean(padded, factors))
    assert refine(block_mean(cut, factors), factors, cut.shape).shape == cut.shape


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.5, 0.7, 0.8), (40.0, 3.0, 9.0)])
@pytest.mark.parametrize("radius_mm", [0.0, 3.0, 5.0, 10.0])
def test_a_ball_reaches_as_far_as_scipys_distances(
    radius_mm: float, spacing_mm: tuple[float, float, float]
) -> None:
    for shape in [(1, 1, 1), (3, 4, 2), (12, 30, 25)]:
        mask = np.random.default_rng(5).random(shape) > 0.997
        mask.flat[0] = True
        distance_mm = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
        np.testing.assert_array_equal(grow(mask, radius_mm, spacing_mm), distance_mm <= radius_mm)
        assert not grow(np.zeros_like(mask), radius_mm, spacing_mm).any()


def test_holes_are_filled_as_scipy_fills_them(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))
    in_plane = ndimage.binary_fill_holes(mask, IN_PLANE)
    np.testing.assert_array_equal(fill_holes(mask, IN_PLANE), in_plane)
