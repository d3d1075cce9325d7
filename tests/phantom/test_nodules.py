"""The readers' contours and ratings can be measured in the voxels of a placed nodule."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from scipy import ndimage

from raysynth.case import ATTRIBUTES
from raysynth.formats.lidc import LidcRecord, nodule_records
from raysynth.phantom.grid import Field, Grid
from raysynth.phantom.nodules import ShapeOnGrid, bank, paint_nodule

GRID = Grid((1.25, 0.8, 0.8), 0.0, (90.0, 80.0, 80.0))
LUNG_HU = -860.0


@lru_cache
def records() -> tuple[LidcRecord, ...]:
    """Middle-sized nodules of the first scans, which read quickly."""
    return tuple(one for one in nodule_records(60) if 9 < one.diameter_mm < 25)[:12]


def rated(record: LidcRecord, **scores: int) -> LidcRecord:
    """The same contours with other ratings, on which all readers agree."""
    ratings = dict.fromkeys(ATTRIBUTES, 3) | {"calcification": 6, "internal_structure": 1}
    ratings |= {"spiculation": 1, "lobulation": 1, "texture": 5, "margin": 5} | scores
    return replace(record, ratings=(tuple(ratings[name] for name in ATTRIBUTES),) * 3)


def painted(record: LidcRecord) -> tuple[Field, np.ndarray]:
    """A noise-free lung with the nodule in its middle, and the nodule's voxels."""
    hu = np.full(GRID.shape, LUNG_HU, np.float32)
    shape = ShapeOnGrid(record, GRID)
    z, y, x = (n // 2 - m // 2 for n, m in zip(GRID.shape, shape.mask.shape, strict=True))
    lungs = np.full(GRID.shape, -50.0, np.float32)
    paint_nodule(hu, lungs, GRID, shape, (z, y, x), np.random.default_rng(0))
    mask = np.zeros(GRID.shape, bool)
    d, h, w = shape.mask.shape
    mask[z : z + d, y : y + h, x : x + w] = shape.mask
    return hu, mask


@pytest.mark.parametrize("index", range(0, 12, 3))
def test_volume_is_the_contours_within_one_voxel_shell(index: int) -> None:
    record = records()[index]
    native = record.mask()
    volume = native.sum() * np.prod(record.spacing_mm)
    shape = ShapeOnGrid(record, GRID)
    resampled = shape.mask.sum() * np.prod(GRID.spacing_mm)
    padded = np.pad(shape.mask, 1)
    shell = ndimage.binary_dilation(padded).sum() - ndimage.binary_erosion(padded).sum()
    assert abs(resampled - volume) < 0.5 * shell * np.prod(GRID.spacing_mm)


def test_texture_shows() -> None:
    record = records()[0]
    means = []
    for texture in (1, 3, 5):
        hu, mask = painted(rated(record, texture=texture))
        means.append(hu[ndimage.binary_erosion(mask)].mean())
    glass, part_solid, solid = means
    assert -700 < glass < -450
    assert glass + 60 < part_solid < solid - 60
    assert -120 < solid < 80


def test_a_part_solid_nodule_has_a_brighter_core() -> None:
    record = max(records(), key=lambda one: one.diameter_mm)
    hu, mask = painted(rated(record, texture=3))
    depth = ndimage.distance_transform_edt(mask, sampling=GRID.spacing_mm)
    core = hu[depth > 0.75 * depth.max()].mean()
    rim = hu[(depth > 0) & (depth < 0.3 * depth.max())].mean()
    assert core > rim + 200


@pytest.mark.parametrize("index", range(0, 12, 4))
def test_margin_shows_as_steepness(index: int) -> None:
    def steepness(margin: int) -> float:
        hu, mask = painted(rated(records()[index], margin=margin))
        slopes = np.gradient(hu, *GRID.spacing_mm)
        rim = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask)
        return float(np.sqrt(sum(s * s for s in slopes))[rim].mean())

    assert steepness(5) > 1.3 * steepness(1)
    assert steepness(5) > steepness(3) > steepness(1)


def test_spiculation_shows_as_strands_outside() -> None:
    record = records()[0]

    def bright_outside(spiculation: int) -> int:
        hu, mask = painted(rated(record, spiculation=spiculation))
        return int(((hu > -650) & ~ndimage.binary_dilation(mask, iterations=2)).sum())

    assert bright_outside(5) > bright_outside(3) + 20
    assert bright_outside(3) > bright_outside(1) + 20


def test_calcium_and_air_show() -> None:
    record = records()[0]
    plain, mask = painted(rated(record))
    inner = ndimage.binary_erosion(mask)
    solid_calcium, _ = painted(rated(record, calcification=3))
    assert solid_calcium[inner].mean() > plain[inner].mean() + 150
    cavity, _ = painted(rated(record, internal_structure=4))
    assert cavity[mask].min() < -600 < plain[inner].min()


def test_no_real_nodule_serves_two_splits() -> None:
    train, val, test = (
        {record.patient_id for record in bank(4.0, split)} for split in ("train", "val", "test")
    )
    assert train
    assert val
    assert test
    assert not train & val
    assert not test & (train | val)
