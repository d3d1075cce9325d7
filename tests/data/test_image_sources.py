"""LUNA16, image folders and plain DICOM go into the store as LIDC does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from raysynth.case import LUNG_LABELS, Label
from raysynth.data.ingest import ingest
from raysynth.data.sources import list_cases, read_case
from raysynth.errors import InputError, UnreadableCase
from raysynth.formats.lidc import patients_of_series
from raysynth.preprocess.case import prepare
from raysynth.store.reader import case_ids
from raysynth.store.reader import read_case as stored_case
from raysynth.store.repository import open_root
from raysynth.store.splits import assign_splits
from raysynth.store.validate import validate
from tests.data.tiny import tiny_config
from tests.formats.dicom_files import small_volume, write_series
from tests.formats.lidc_crops import a_record, write_crop

SHAPE = (8, 20, 24)


def write(path: Path, values: np.ndarray, direction: tuple[float, ...] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing((1.0, 1.5, 2.0))
    image.SetOrigin((-10.0, 5.0, 100.0))
    if direction is not None:
        image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))


def slab() -> np.ndarray:
    hu = np.full(SHAPE, -900, np.int16)
    hu[:, 3:17, 4:20] = 40
    return hu


def organs() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 5:9, 5:9], labels[2:6, 10:14, 5:9], labels[3, 12, 15] = 5, 1, 7
    return labels


CLASSES = {5: "liver", 1: "spleen", 7: "nodule"}


def config_of(work_dir: Path, **source: Any) -> Any:
    return tiny_config(work_dir, source=source)


@pytest.mark.ray
def test_a_folder_of_images_with_labels(tmp_path: Path, local_ray: None) -> None:
    mirrored = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
    write(tmp_path / "scans" / "Doe" / "a.nii.gz", slab())
    write(tmp_path / "labels" / "Doe" / "a.nrrd", organs())
    write(tmp_path / "scans" / "b.mha", slab(), mirrored)
    config = config_of(
        tmp_path,
        kind="images",
        path=tmp_path / "scans",
        labels=tmp_path / "labels",
        class_map=CLASSES,
        needs_lung=False,
    )
    assert ingest(config).cases == 2
    root = open_root(config.store_url)
    cases = [stored_case(root, case_id) for case_id in case_ids(root)]
    (labelled,) = (case for case in cases if case.nodules)
    assert labelled.layout is not None
    np.testing.assert_array_equal(labelled.layout == Label.LIVER, organs() == 5)
    np.testing.assert_array_equal(labelled.layout == Label.SPLEEN, organs() == 1)
    assert (labelled.layout[2:6, 8:12, 8:14] == Label.BODY)[organs()[2:6, 8:12, 8:14] == 0].all()
    assert labelled.nodules[0].box_zyx == ((3, 4), (12, 13), (15, 16))
    assert labelled.volume.spacing_mm == pytest.approx((2.0, 1.5, 1.0))
    for case in cases:
        np.testing.assert_array_equal(case.volume.hu, slab())
        assert case.volume.origin_mm == pytest.approx((100.0, 5.0, -10.0))
    assert {tuple(np.diagonal(case.volume.direction)) for case in cases} == {(1, 1, 1), (1, -1, -1)}
    assert validate(config.store_url, full=True) == []
    names = "".join(path for path, _ in root.members(max_depth=None))
    assert "Doe" not in names


def test_grey_values_without_a_unit_say_so(tmp_path: Path) -> None:
    write(tmp_path / "scans" / "a.mha", np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE))
    source = {"kind": "images", "path": tmp_path / "scans", "needs_lung": False}
    (ref,), _ = list_cases(config_of(tmp_path, **source))
    with pytest.raises(UnreadableCase) as refused:
        read_case(ref)
    assert refused.value.rule == "not-hu"
    (ref,), _ = list_cases(config_of(tmp_path, **source, intensity="relative"))
    case = prepare(read_case(ref), needs_lung=False)
    assert case.intensity == "relative"
    assert case.layout is not None
    assert not case.layout.any()


def test_crops_of_lidc_are_cases_of_one_slice(tmp_path: Path) -> None:
    records = [a_record(), a_record(skip=40)]
    for record in records:
        write_crop(tmp_path / "crops", record)
    config = config_of(tmp_path, kind="lidc_slices", path=tmp_path / "crops")
    refs, refused = list_cases(config)
    assert not refused
    assert sorted(ref.split for ref in refs) == sorted(
        assign_splits([record.patient_id for record in records], config.data.split).values()
    )
    for ref in refs:
        assert "LIDC" not in repr(ref)
        case = prepare(read_case(ref), needs_lung=False)
        assert case.intensity == "relative"
        assert case.layout is not None
        assert np.isin(case.layout, LUNG_LABELS).mean() > 0.5
        assert (case.layout == Label.NODULE).sum() == case.nodules[0].mask.sum()
        assert len(case.nodules[0].ratings) == 4
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="give the unpacked folder"):
        list_cases(config_of(tmp_path, kind="lidc_slices", path=empty))


@pytest.mark.parametrize(
    ("labels", "rule"),
    [(organs()[:, :, ::2], "labels-misfit"), (organs() * 3, "unknown-label")],
)
def test_labels_that_do_not_fit_are_explained(
    tmp_path: Path, labels: np.ndarray, rule: str
) -> None:
    write(tmp_path / "scans" / "a.mha", slab())
    write(tmp_path / "labels" / "a.mha", np.ascontiguousarray(labels))
    source = {"path": tmp_path / "scans", "labels": tmp_path / "labels", "class_map": CLASSES}
    (ref,), _ = list_cases(config_of(tmp_path, kind="images", **source))
    with pytest.raises(UnreadableCase) as refused:
        read_case(ref)
    assert refused.value.rule == rule


def test_folders_without_what_they_should_hold(tmp_path: Path) -> None:
    write(tmp_path / "labels" / "a.mha", organs())
    (tmp_path / "scans").mkdir()
    source = {"kind": "images", "path": tmp_path / "scans"}
    with pytest.raises(InputError, match=r"holds no volume \(.nii"):
        list_cases(config_of(tmp_path, **source))
    write(tmp_path / "scans" / "b.mha", slab())
    with pytest.raises(InputError, match="1 label maps have no volume of their name"):
        list_cases(config_of(tmp_path, **source, labels=tmp_path / "labels"))
    with pytest.raises(InputError, match=r"annotations.csv cannot be read as a table"):
        list_cases(config_of(tmp_path, kind="luna16", path=tmp_path / "scans"))


def test_volumes_of_one_name_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nrrd", "deep/a.mha", "b.mha", "c.mha"):
        write(tmp_path / "scans" / name, slab())
    for name in ("b.mha", "c.mha", "c.nrrd"):
        write(tmp_path / "labels" / name, organs())
    source = {"path": tmp_path / "scans", "labels": tmp_path / "labels", "class_map": CLASSES}
    refs, refused = list_cases(config_of(tmp_path, kind="images", **source))
    files = {ref.files[0].relative_to(tmp_path).as_posix(): len(ref.files) for ref in refs}
    assert files == {"scans/b.mha": 2, "scans/deep/a.mha": 1}
    assert [one.rule for one in refused] == ["same-name"] * 2
    assert {one.source for one in refused}.isdisjoint(ref.case_id for ref in refs)
    assert sorted(one.reason[:29] for one in refused) == [
        "1 volumes and 2 label maps ha",
        "2 volumes and 0 label maps ha",
    ]


def test_a_luna16_series_that_lies_in_two_folders_is_refused(tmp_path: Path) -> None:
    for name in ("subset0/1.2.3.mhd", "subset1/1.2.3.mhd", "subset1/1.2.4.mhd"):
        write(tmp_path / name, slab())
    (tmp_path / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    refs, refused = list_cases(config_of(tmp_path, kind="luna16", path=tmp_path))
    assert [ref.series_uid for ref in refs] == ["1.2.4"]
    assert [one.rule for one in refused] == ["same-name"]


def test_dicom_that_nobody_annotated(tmp_path: Path) -> None:
    write_series(tmp_path / "scans", small_volume())
    (ref,), refused = list_cases(config_of(tmp_path, kind="dicom", path=tmp_path / "scans"))
    assert not refused
    case = read_case(ref)
    np.testing.assert_array_equal(case.volume.hu, small_volume().hu)
    assert case.nodules == ()


@pytest.mark.parametrize("rule", ["two_means", "sphere"])
def test_real_luna16_nodules_are_dense(tmp_path: Path, real_data: Path, rule: str) -> None:
    source = {"kind": "luna16", "path": real_data / "luna16-style", "nodule_mask": rule}
    (ref,), _ = list_cases(config_of(tmp_path, **source))
    assert ref.series_uid in patients_of_series()
    case = prepare(read_case(ref))
    assert len(case.nodules) >= 2
    for nodule in case.nodules:
        box = tuple(slice(*side) for side in nodule.box_zyx)
        hu = case.volume.hu[box]
        inside, around = hu[nodule.mask].mean(), hu[~nodule.mask].mean()
        assert inside > around + 100, (rule, inside, around)


def test_outlines_of_a_cut_series_are_refused(tmp_path: Path, real_data: Path) -> None:
    """The real sample has 36 planes, and LIDC's readers saw nodules beyond them."""
    source = {"kind": "luna16", "path": real_data / "luna16-style", "nodule_mask": "lidc"}
    (ref,), _ = list_cases(config_of(tmp_path, **source))
    with pytest.raises(UnreadableCase, match="is a part of the series missing"):
        read_case(ref)


def test_real_images_are_read(tmp_path: Path, real_data: Path) -> None:
    """An abdomen with its organs."""
    folder = real_data / "small-volumes"
    for name, target in (("example_ct_sm", "scans"), ("example_seg", "labels")):
        (tmp_path / target).mkdir()
        file = folder / "totalsegmentator" / f"{name}.nii.gz"
        (tmp_path / target / "abdomen.nii.gz").write_bytes(file.read_bytes())
    drawn = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
    other = dict.fromkeys(range(1, 118), "ignore")
    classes = other | {1: "spleen", 2: "right_kidney", 3: "left_kidney", 5: "liver"}
    source = {"path": tmp_path / "scans", "labels": tmp_path / "labels", "class_map": classes}
    (ref,), _ = list_cases(config_of(tmp_path, kind="images", needs_lung=False, **source))
    case = prepare(read_case(ref), needs_lung=False)
    assert case.layout is not None
    counts = np.bincount(case.layout.ravel(), minlength=21)
    assert counts[Label.SPLEEN] == (drawn == 1).sum() > 9000
    assert counts[Label.LIVER] == (drawn == 5).sum() > 38000
    left, right = (np.argwhere(case.layout == label).mean(axis=0) for label in (17, 18))
    assert case.volume.position_mm(left)[2] > case.volume.position_mm(right)[2]
    assert case.volume.hu[case.layout == Label.LIVER].mean() == pytest.approx(100, abs=80)
