from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from raysynth.case import ATTRIBUTES, MAX_READERS, SCORE_RANGES, Nodule
from raysynth.errors import UnreadableCase
from raysynth.formats.dicom import find_series, read_series
from raysynth.formats.lidc import nodule_records, series_nodules
from raysynth.volume import Volume
from tests.formats.pylidc_shims import import_pylidc

TEXTURE = ATTRIBUTES.index("texture")
SERIES_0013 = "1.3.6.1.4.1.14519.5.2.1.6279.6001.174907798609768549012640380786"


@lru_cache(maxsize=1)
def real_nodules(folder: Path) -> dict[str, tuple[Volume, tuple[Nodule, ...]]]:
    """Volume and nodules of each real patient, by the last digits of the public id."""
    found = {}
    for one in find_series(folder)[0]:
        volume, _ = read_series(one.files)
        found[one.patient_id[-4:]] = (volume, series_nodules(one.uid, volume))
    return found


def excess_hu(mask: np.ndarray, corner: np.ndarray, hu: np.ndarray) -> float:
    """Mean inside a mask whose first voxel lies at `corner`, less that of a two-voxel shell."""
    mask = np.pad(mask, 2)
    shell = binary_dilation(mask, np.ones((5, 5, 5))) & ~mask
    window = hu[
        tuple(slice(low - 2, low - 2 + size) for low, size in zip(corner, mask.shape, strict=True))
    ]
    return float(window[mask].mean() - window[shell].mean())


def test_finds_the_nodules_of_the_real_patients(lidc_dicom: Path) -> None:
    found = real_nodules(lidc_dicom)
    readers = {
        patient: [len(nodule.ratings) for nodule in nodules]
        for patient, (_, nodules) in found.items()
    }
    assert readers == {"0001": [4], "0003": [1, 4, 4, 4], "0013": [2, 4, 4]}
    for _, nodules in found.values():
        for nodule in nodules:
            assert nodule.mask.dtype == bool
            for axis in range(3):
                kept = nodule.mask.any(axis=tuple({0, 1, 2} - {axis}))
                assert kept[0]
                assert kept[-1]
            centre = np.argwhere(nodule.mask).mean(axis=0) + nodule.corner_zyx
            np.testing.assert_allclose(nodule.centre_zyx, centre)


def test_masks_lie_on_the_nodules_and_on_no_mirror_image_of_them(lidc_dicom: Path) -> None:
    solid = [
        (nodule.mask, np.array(nodule.corner_zyx), volume.hu)
        for volume, nodules in real_nodules(lidc_dicom).values()
        for nodule in nodules
        if np.median([row[TEXTURE] for row in nodule.ratings]) >= 4
    ]
    assert len(solid) == 7
    excess = [excess_hu(*each) for each in solid]
    assert min(excess) > 100
    for axis in range(3):
        mirrored, below, above = [], [], []
        for mask, corner, hu in solid:
            other = corner.copy()
            other[axis] = hu.shape[axis] - corner[axis] - mask.shape[axis]
            mirrored.append(excess_hu(np.flip(mask, axis), other, hu))
            step = 2 * np.eye(3, dtype=int)[axis]
            below.append(excess_hu(mask, corner - step, hu))
            above.append(excess_hu(mask, corner + step, hu))
        assert np.mean(mirrored) < 0.2 * np.mean(excess)
        # Nor is it off by a little: two voxels either way fit worse.
        assert max(np.mean(below), np.mean(above)) < 0.98 * np.mean(excess)


def test_higher_consensus_gives_smaller_masks(lidc_dicom: Path) -> None:
    volume, _ = real_nodules(lidc_dicom)["0013"]
    voxels = [
        [int(nodule.mask.sum()) for nodule in series_nodules(SERIES_0013, volume, level)]
        for level in (0.25, 0.5, 0.75, 1.0)
    ]
    assert (np.diff(voxels, axis=0) <= 0).all()
    assert (np.array(voxels) > 0).all()


def test_one_reader_draws_within_what_any_reader_drew() -> None:
    anybody = series_nodules(SERIES_0013, grid_0013(), 1e-6)
    agreed = series_nodules(SERIES_0013, grid_0013(), 1.0)
    alone = series_nodules(SERIES_0013, grid_0013(), None)
    sizes = [[int(nodule.mask.sum()) for nodule in each] for each in (agreed, alone, anybody)]
    assert (np.diff(sizes, axis=0) >= 0).all()
    assert sizes[0] != sizes[1] != sizes[2]
    for one, whole in zip(alone, anybody, strict=True):
        held = np.argwhere(one.mask) + one.corner_zyx - whole.corner_zyx
        assert whole.mask[tuple(held.T)].all()
        assert one.ratings == whole.ratings
    again = series_nodules(SERIES_0013, grid_0013(), None)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(alone, again, strict=True))


def grid_0013(**changes: object) -> Volume:
    """A volume on the grid of LIDC-IDRI-0013, without its pixels."""
    grid = {
        "hu": np.zeros((125, 512, 512), dtype=np.int16),
        "spacing_mm": (2.5, 0.585938, 0.585938),
        "origin_mm": (-350.850006, -150.0, -148.5),
    }
    return Volume(**(grid | changes))  # type: ignore[arg-type]


def test_nodules_move_with_the_grid() -> None:
    whole = series_nodules(SERIES_0013, grid_0013())
    upper = series_nodules(
        SERIES_0013,
        grid_0013(
            hu=np.zeros((100, 512, 512), dtype=np.int16), origin_mm=(-350.850006 + 50, -150, -148.5)
        ),
    )
    assert [one.corner_zyx[0] - 20 for one in whole] == [one.corner_zyx[0] for one in upper]
    assert [one.corner_zyx[1:] for one in whole] == [one.corner_zyx[1:] for one in upper]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spacing_mm": (2.5, 0.7, 0.7)}, "readers drew on 512 x 512 of 0.585938"),
        ({"spacing_mm": (1.25, 0.585938, 0.585938)}, "slices lie"),
        ({"origin_mm": (-351.9, -150.0, -148.5)}, "slices lie up to 0.42 planes"),
        ({"hu": np.zeros((60, 512, 512), dtype=np.int16)}, "outside"),
        ({"hu": np.zeros((125, 256, 256), dtype=np.int16)}, r"\(256, 256\) pixels"),
    ],
)
def test_another_grid_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UnreadableCase, match=reason) as caught:
        series_nodules(SERIES_0013, grid_0013(**changes))
    assert caught.value.rule == "annotations-misfit"


def test_a_series_that_nobody_read_is_not_nodule_free() -> None:
    with pytest.raises(UnreadableCase, match="was its SeriesInstanceUID changed") as caught:
        series_nodules("1.2.3", grid_0013())
    assert caught.value.rule == "not-annotated"


def test_the_whole_database() -> None:
    records = nodule_records()
    marks = np.array([len(one.annotations) for one in records])
    # methods.md, section 0.
    assert len(records) == 2651
    assert [int((marks == n).sum()) for n in (1, 2, 3, 4)] == [771, 488, 481, 897]
    assert marks.sum() == 6859
    diameters = [one.diameter_mm for one in records]
    np.testing.assert_allclose(
        np.percentile(diameters, [5, 25, 50, 75, 95]), [4.7, 6.1, 7.8, 11.1, 26.0], atol=0.05
    )
    scores = np.array([row for one in records for row in one.ratings])
    highest = [SCORE_RANGES[name][1] for name in ATTRIBUTES]
    assert (scores.max(axis=0) <= highest).all()
    # Annotation 3761 alone has a score outside its scale.
    assert [tuple(place) for place in np.argwhere(scores == 0)[:, 1:]] == [(1,)]
    assert max(len(one.ratings) for one in records) == MAX_READERS
    places = np.array([one.relative_zyx for one in records])
    assert places.min() > 0
    assert places.max() < 1
    assert len({(one.scan_id, one.number) for one in records}) == len(records)


def test_first_scans_alone_are_the_same_records() -> None:
    few = nodule_records(max_scans=20)
    assert few == nodule_records()[: len(few)]
    assert {one.scan_id for one in few} <= set(range(1, 21))


def test_every_record_has_a_shape_of_its_size() -> None:
    records = nodule_records()[::20]
    volumes = [record.mask().sum() * np.prod(record.spacing_mm) for record in records]
    assert min(volumes) > 0
    diameters = [record.diameter_mm for record in records]
    assert np.corrcoef(np.log(volumes), np.log(diameters))[0, 1] > 0.9


def test_record_and_real_series_agree(lidc_dicom: Path) -> None:
    _, nodules = real_nodules(lidc_dicom)["0013"]
    records = [one for one in nodule_records() if one.series_uid == SERIES_0013]
    for nodule, record in zip(nodules, records, strict=True):
        np.testing.assert_array_equal(nodule.mask, record.mask())
        assert nodule.diameter_mm == record.diameter_mm
        assert nodule.ratings == record.ratings
        np.testing.assert_allclose(nodule.centre_zyx, record.centre_zyx, atol=4)


def compare_with_pylidc(scan_ids: list[int], pylidc: object) -> int:
    """Asserts that our groups, masks and diameters are pylidc's; returns how many it compared."""
    mine: dict[int, list] = {scan_id: [] for scan_id in scan_ids}
    for record in nodule_records():
        if record.scan_id in mine:
            mine[record.scan_id].append(record)
    compared = 0
    for scan_id in scan_ids:
        scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.id == scan_id).one()
        groups = scan.cluster_annotations(verbose=False)
        assert len(groups) == len(mine[scan_id]), scan_id
        for group, record in zip(groups, mine[scan_id], strict=True):
            # What each reader scored tells the annotations apart well enough.
            assert [tuple(one.feature_vals())[3:] for one in group] == [
                one.scores[3:] for one in record.annotations
            ]
            diameter_mm = np.mean([one.diameter for one in group])
            np.testing.assert_allclose(record.diameter_mm, diameter_mm)
            centre = np.mean([one.centroid for one in group], axis=0)[[2, 0, 1]]
            np.testing.assert_allclose(record.centre_zyx, centre)
            if len(group) <= MAX_READERS:
                mask = np.moveaxis(pylidc.utils.consensus(group, ret_masks=False)[0], 2, 0)
                where = np.argwhere(mask)
                box = tuple(map(slice, where.min(axis=0), where.max(axis=0) + 1))
                np.testing.assert_array_equal(record.mask(), mask[box])
                compared += 1
    return compared


@pytest.fixture
def lidc_scan_ids() -> list[int]:
    """The three real scans, one with touching nodules, and some more."""
    touching = next(one.scan_id for one in nodule_records() if len(one.annotations) > MAX_READERS)
    with_holes = next(
        one.scan_id
        for one in nodule_records()
        if any(not contour.includes for each in one.annotations for contour in each.contours)
    )
    return sorted({12, 14, 24, touching, with_holes, *range(1, 1019, 130)})


def test_agrees_with_pylidc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lidc_scan_ids: list[int]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pylidc = import_pylidc(monkeypatch)
    assert compare_with_pylidc(lidc_scan_ids, pylidc) >= 30
    assert not (tmp_path / ".pylidcrc").exists()


@pytest.mark.slow
def test_agrees_with_pylidc_on_every_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth of them, or all with RAYSYNTH_ALL_FAULTS=1 (6 minutes)."""
    pylidc = import_pylidc(monkeypatch)
    if os.environ.get("RAYSYNTH_ALL_FAULTS"):
        assert compare_with_pylidc(list(range(1, 1019)), pylidc) == 2651 - 14
    else:
        assert compare_with_pylidc(list(range(1, 1019, 10)), pylidc) == 236
