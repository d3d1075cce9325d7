from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import LUNG_LABELS, Label
from raysynth.formats.dicom import find_series, read_series
from raysynth.formats.lidc import series_nodules
from raysynth.layout.anatomy import segment_anatomy
from raysynth.volume import Volume
from tests.layout.conftest import Chest


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def layout(chest: Chest) -> NDArray[np.uint8]:
    return segment_anatomy(chest.volume)


def test_every_label_lies_where_the_chest_was_built(
    chest: Chest, layout: NDArray[np.uint8]
) -> None:
    assert layout.dtype == np.uint8
    assert dice(layout == Label.LEFT_LUNG, chest.left) > 0.98
    assert dice(layout == Label.RIGHT_LUNG, chest.right) > 0.98
    assert dice(layout == Label.TRACHEA, chest.trachea) > 0.9
    assert dice(layout != Label.BACKGROUND, chest.body) > 0.99


def test_the_table_is_no_part_of_the_body(chest: Chest, layout: NDArray[np.uint8]) -> None:
    off_the_skin = chest.table & ~ndimage.binary_dilation(chest.body, iterations=4)
    assert not layout[off_the_skin].any()


def test_a_nodule_on_the_pleura_lies_in_the_lung(chest: Chest, layout: NDArray[np.uint8]) -> None:
    # A ball of 10 mm enters its base by 1.2 mm: that rim of it stays chest wall.
    lung = layout == Label.RIGHT_LUNG
    assert np.mean(lung[chest.pleural_nodule]) > 0.75
    near_lung = ndimage.binary_dilation(lung, np.ones((3, 3, 3)))
    assert np.mean(near_lung[chest.pleural_nodule]) > 0.95


def test_touching_lungs_are_parted_down_the_middle(build_chest: Callable[..., Chest]) -> None:
    touching = build_chest(touching=True)
    layout = segment_anatomy(touching.volume)
    assert dice(layout == Label.LEFT_LUNG, touching.left) > 0.96
    assert dice(layout == Label.RIGHT_LUNG, touching.right) > 0.96


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_stored_backwards_gets_the_same_labels_in_the_patient(
    chest: Chest, layout: NDArray[np.uint8], axis: int
) -> None:
    direction = np.eye(3)
    direction[axis, axis] = -1
    backwards = Volume(np.flip(chest.volume.hu, axis), chest.volume.spacing_mm, direction=direction)
    np.testing.assert_array_equal(segment_anatomy(backwards), np.flip(layout, axis))


def test_a_field_of_view_that_cuts_the_body_loses_no_lung(chest: Chest) -> None:
    cut = slice(50, -50)  # through the flanks, 2 cm beside the lungs
    volume = replace(chest.volume, hu=chest.volume.hu[:, :, cut])
    layout = segment_anatomy(volume)
    assert dice(layout == Label.LEFT_LUNG, chest.left[:, :, cut]) > 0.98
    assert dice(layout == Label.RIGHT_LUNG, chest.right[:, :, cut]) > 0.97


@pytest.mark.parametrize("spacing_mm", [(5.0, 2.8, 2.8), (5.0, 0.9, 0.9)])
def test_coarse_and_fine_voxels(
    build_chest: Callable[..., Chest], spacing_mm: tuple[float, float, float]
) -> None:
    other = build_chest(spacing_mm)
    layout = segment_anatomy(other.volume)
    assert dice(layout == Label.LEFT_LUNG, other.left) > 0.96
    assert dice(layout == Label.TRACHEA, other.trachea) > 0.8


def test_without_lungs_there_is_body_alone(build_chest: Callable[..., Chest]) -> None:
    slab = build_chest(with_lungs=False)
    layout = segment_anatomy(slab.volume)
    assert set(np.unique(layout)) == {Label.BACKGROUND, Label.BODY}
    assert dice(layout == Label.BODY, slab.body) > 0.99


def test_air_alone_is_background() -> None:
    air = Volume(np.full((4, 32, 32), -1000, np.int16), (2.5, 1.0, 1.0))
    assert not segment_anatomy(air).any()


def test_real_scans(lidc_dicom: Path) -> None:
    series, _ = find_series(lidc_dicom)
    assert len(series) == 3
    for scan in series:
        volume, _ = read_series(scan.files)
        layout = segment_anatomy(volume)
        litres = np.bincount(layout.ravel(), minlength=6) * np.prod(volume.spacing_mm) / 1e6
        left, right = litres[Label.LEFT_LUNG], litres[Label.RIGHT_LUNG]
        assert 1.5 < left + right < 7, scan.uid
        assert min(left, right) > 0.6, scan.uid
        assert 0.015 < litres[Label.TRACHEA] < 0.1, scan.uid
        _check_back(volume, layout)
        for nodule in series_nodules(scan.uid, volume):
            around = tuple(slice(start - 1, stop + 1) for start, stop in nodule.box_zyx)
            lung = np.isin(layout[around], LUNG_LABELS)
            near_lung = ndimage.binary_dilation(lung, np.ones((3, 3, 3)))[1:-1, 1:-1, 1:-1]
            assert np.mean(near_lung[nodule.mask]) > 0.95, (scan.uid, nodule.centre_zyx)


def _check_back(volume: Volume, layout: NDArray[np.uint8]) -> None:
    """The back is the last tissue above the table: under it lies air, and then a thin shell.

    A table in the body would make the body's last row jump from column to column.
    """
    body = layout != Label.BACKGROUND
    middle = body.shape[2] // 2
    central = body[:, :, middle - 20 : middle + 20]
    last = body.shape[1] - 1 - np.argmax(central[:, ::-1], axis=1)
    steps_mm = np.abs(np.diff(last, axis=1)) * volume.spacing_mm[1]
    assert np.mean(steps_mm > 5) < 0.01
    tissue = np.take_along_axis(volume.hu[:, :, middle - 20 : middle + 20], last[:, None], axis=1)
    assert np.median(tissue) > -400
