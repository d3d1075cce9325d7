"""LUNA16's rows become nodules by the published rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from raysynth.case import Label
from raysynth.errors import InputError, UnreadableCase
from raysynth.formats.luna16 import (
    Finding,
    anatomy_of,
    nodule_of,
    read_annotations,
    two_means,
)
from raysynth.volume import Volume

SPACING_MM = (2.0, 0.8, 0.5)


def ball(hu_inside: int = 40, hu_outside: int = -800, radius_mm: float = 6.0) -> Volume:
    """A ball of soft tissue in the middle of lung, on mirrored axes."""
    shape = (20, 60, 80)
    centre = (np.array(shape) - 1) / 2
    offsets = (np.indices(shape).T - centre) * SPACING_MM
    inside = radius_mm**2 >= (offsets**2).sum(axis=-1).T
    hu = np.where(inside, hu_inside, hu_outside).astype(np.int16)
    return Volume(hu, SPACING_MM, (-50.0, 30.0, 12.0), np.diag([1.0, -1.0, -1.0]))


def middle_mm(volume: Volume) -> tuple[float, float, float]:
    z, y, x = volume.position_mm((np.array(volume.shape) - 1) / 2)
    return float(z), float(y), float(x)


def test_a_sphere_has_its_volume_and_place() -> None:
    volume = ball()
    nodule = nodule_of(Finding(middle_mm(volume), 16.0), volume, "sphere")
    assert nodule.centre_zyx == pytest.approx((9.5, 29.5, 39.5))
    volume_mm3 = nodule.mask.sum() * np.prod(SPACING_MM)
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.03)
    assert nodule.diameter_mm == 16.0
    assert nodule.ratings == ()


def test_two_means_keeps_the_brighter_voxels_of_the_sphere() -> None:
    volume = ball(radius_mm=6.0)
    nodule = nodule_of(Finding(middle_mm(volume), 16.0), volume)
    (z0, z1), (y0, y1), (x0, x1) = nodule.box_zyx
    whole = np.zeros(volume.shape, bool)
    whole[z0:z1, y0:y1, x0:x1] = nodule.mask
    np.testing.assert_array_equal(whole, volume.hu > 0)


def test_a_sphere_of_one_kind_of_voxel_stays_whole() -> None:
    volume = ball(hu_inside=-750)
    finding = Finding(middle_mm(volume), 10.0)
    masks = [nodule_of(finding, volume, rule).mask for rule in ("sphere", "two_means")]
    np.testing.assert_array_equal(*masks)


def test_two_means_equals_k_means() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        values = np.concatenate(
            [random.normal(-800, 60, random.integers(5, 90)), random.normal(0, 90, 40)]
        )
        centres, _ = kmeans2(
            values[:, None], np.array([[-1000.0], [400.0]]), iter=100, minit="matrix"
        )
        assert two_means(values) == pytest.approx(sorted(centres.ravel()), abs=1e-6)
    assert two_means(np.array([7.0])) == (7.0, 7.0)


def test_a_nodule_smaller_than_a_voxel_has_one() -> None:
    volume = ball()
    nodule = nodule_of(Finding(middle_mm(volume), 0.1), volume, "sphere")
    assert nodule.mask.sum() == 1


def test_a_finding_of_another_scan_is_refused() -> None:
    with pytest.raises(UnreadableCase, match="is the table of these series") as refused:
        nodule_of(Finding((500.0, 0.0, 0.0), 8.0), ball())
    assert refused.value.rule == "annotations-misfit"


@pytest.mark.parametrize("mirrored", [1.0, -1.0])
@pytest.mark.parametrize("values", [(3, 4), (4, 3)])
def test_lungs_are_told_apart_by_where_they_are(mirrored: float, values: tuple[int, int]) -> None:
    labels = np.zeros((2, 4, 10), np.uint8)
    labels[:, :, :3], labels[:, :, 7:], labels[:, 1, 5] = *values, 5
    volume = Volume(
        np.zeros(labels.shape, np.int16), (1, 1, 1), direction=np.diag([1, 1, mirrored])
    )
    layout = anatomy_of(labels, volume)
    left = np.s_[:, :, 7:] if mirrored > 0 else np.s_[:, :, :3]
    assert (layout[left] == Label.LEFT_LUNG).all()
    assert (layout == Label.LEFT_LUNG).sum() == (layout == Label.RIGHT_LUNG).sum() == 24
    assert (layout[:, 1, 5] == Label.TRACHEA).all()


HEADER = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"


def test_rows_belong_to_their_series(tmp_path: Path) -> None:
    table = tmp_path / "annotations.csv"
    table.write_text(HEADER + "1.2,1,2,3,9.5\n1.3,0,0,0,5\n1.2,-4,5,-6,7\n")
    findings = read_annotations(table)
    assert findings["1.2"] == (Finding((3, 2, 1), 9.5), Finding((-6, 5, -4), 7))
    assert len(findings["1.3"]) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has the columns none"),
        ("a,b\n1,2\n", "has the columns a, b: give LUNA16's"),
        (HEADER + "1.2,1,2,x,9\n", "line 2: a coordinate or diameter is no number"),
        (HEADER + "1.2,1,2\n", "line 2: a coordinate or diameter is no number"),
        (HEADER + "1.2,1,2,nan,9\n", "line 2: a nodule of 9 mm"),
        (HEADER + "1.2,1,2,3,0\n", "a nodule of 0 mm"),
        (HEADER + "1.2,1,2,3,1e9\n", "a nodule of 1e"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    table = tmp_path / "annotations.csv"
    table.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_annotations(table)
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_annotations(tmp_path / "none.csv")


def test_the_whole_table(real_data: Path) -> None:
    findings = read_annotations(real_data / "luna16-csv" / "annotations.csv")
    assert sum(len(rows) for rows in findings.values()) == 1186
