from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysynth.volume import RELATIVE_RANGE
from raysynth.window import LUNG_WINDOW_HU, denormalize, measurable, normalize

WINDOWS = [(-1000.0, 2500.0), (-1000.0, 400.0), (-1350.0, 150.0)]


@given(
    window_hu=st.tuples(st.floats(-2000, 0), st.floats(1, 4000)),
    hu=st.lists(st.integers(-32768, 32767), min_size=1),
)
def test_hu_survive_the_round_trip_inside_the_window(
    window_hu: tuple[float, float], hu: list[int]
) -> None:
    values = np.array(hu, np.int16)
    normalized = normalize(values, window_hu)
    assert normalized.dtype == np.float32
    assert np.abs(normalized).max() <= 1 + 1e-6
    clipped = np.clip(values.astype(np.float64), *window_hu)
    assert np.abs(denormalize(normalized, window_hu) - clipped).max() <= 0.5 + 2e-3


@pytest.mark.parametrize("window_hu", WINDOWS)
def test_every_whole_hu_inside_comes_back_exactly(window_hu: tuple[float, float]) -> None:
    values = np.arange(int(window_hu[0]), int(window_hu[1]) + 1, dtype=np.int16)
    back = denormalize(normalize(values, window_hu), window_hu)
    assert back.dtype == np.int16
    np.testing.assert_array_equal(back, values)


def test_the_ends_of_the_window_are_minus_one_and_one() -> None:
    values = np.array([-3000, -1000, -300, 400, 3000], np.int16)
    np.testing.assert_allclose(normalize(values, (-1000, 400)), [-1, -1, 0, 1, 1], atol=1e-6)


def test_overshooting_networks_are_clipped() -> None:
    values = np.array([-1.7, 1.2], np.float32)
    assert denormalize(values, (-1000, 400)).tolist() == [-1000, 400]


@pytest.mark.parametrize("window_hu", WINDOWS)
def test_tensors_give_what_arrays_give(window_hu: tuple[float, float]) -> None:
    values = np.arange(-1500, 3000, 7, dtype=np.int16)
    normalized = normalize(torch.from_numpy(values), window_hu)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.numpy(), normalize(values, window_hu), atol=1e-6)
    back = denormalize(normalized, window_hu)
    assert back.dtype == torch.int16
    np.testing.assert_array_equal(back.numpy(), denormalize(normalized.numpy(), window_hu))


def test_measures_see_all_greys_that_have_no_unit() -> None:
    greys = np.linspace(*RELATIVE_RANGE, 256).round().astype(np.int16)
    seen = measurable(greys, "relative")
    assert (seen[0], seen[-1]) == LUNG_WINDOW_HU
    assert len(np.unique(seen)) == 256
    np.testing.assert_array_equal(measurable(greys, "hu"), greys)
