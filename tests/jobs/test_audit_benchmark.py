"""What the audit's benchmark plants is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.benchmarks.audit import TARGETS, Slices, flipped, plant, shifted
from raysynth.evaluation.regions import cut_crops
from raysynth.metrics.memorization import flips


def _slices() -> Slices:
    rng = np.random.default_rng(0)
    hu = rng.integers(-900, 300, (5, 64, 64)).astype(np.int16)
    box = np.array([[20, 30, 29, 40]] * 5, np.int16)
    return Slices(hu, box, np.arange(5), "hu")


@pytest.mark.parametrize("version", range(8))
def test_a_box_turns_with_its_slice(version: int) -> None:
    slices = _slices()
    image, box = flipped(slices.hu[0], slices.box[0], version)
    y0, x0, y1, x1 = box
    inside = slices.hu[0, 20:29, 30:40]
    assert {inside.shape, inside.T.shape} >= {(y1 - y0, x1 - x0)}
    assert np.array_equal(np.sort(image[y0:y1, x0:x1].ravel()), np.sort(inside.ravel()))
    assert any(np.array_equal(image, turned[0]) for turned in flips(slices.hu[:1]))


def test_a_shift_moves_the_slice_under_its_box() -> None:
    slices = _slices()
    moved = shifted(slices.hu[0], np.array([4, -4]), "hu")
    np.testing.assert_array_equal(moved[4:, :-4], slices.hu[0, :-4, 4:])
    assert (moved[:4] == -1000).all()


@pytest.mark.parametrize("kind", TARGETS)
def test_copies_are_near_their_originals(kind: str) -> None:
    slices = _slices()
    copies = plant(kind, slices, 20, np.random.default_rng(1))  # type: ignore[arg-type]
    assert copies.hu.shape == (20, 64, 64)
    originals = slices.hu[copies.patient]
    if kind == "exact":
        np.testing.assert_array_equal(copies.hu, originals)
    if kind == "noise":
        difference = np.abs(copies.hu - originals)
        assert difference.max() == 5
    assert len(cut_crops(copies.hu, copies.box, 44)) == 20
