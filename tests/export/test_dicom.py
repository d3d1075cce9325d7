"""Exported DICOM: other readers find the same voxels at the same place, and no patient."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from monai.transforms import LoadImage
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage

from raysynth.case import Label
from raysynth.errors import InputError, UnreadableCase
from raysynth.export.dicom import CODES, dicom_files, read_marks, write_dicom
from raysynth.export.verify import verify
from raysynth.export.writing import RunFacts
from raysynth.formats.dicom import find_series, read_series
from raysynth.volume import Volume
from storage_schema.v1 import LABELS
from tests.formats.dicom_files import small_volume, write_series

SHAPE = (9, 12, 16)
PASSPORT = {
    "run": "tiny",
    "row": 7,
    "bundle": "b" * 64,
    "passport": {"software": "raysynth 0.1"},
    "contains_real_pixels": False,
    "request": {"prompt": "a spiculated nodule, 9 mm \N{MULTIPLICATION SIGN} 7 mm"},
}
DECIMALS = 1e-9
"""Of millimetres and directions: DICOM's decimals have 16 characters."""


def turned(about_x: float, about_z: float) -> NDArray[np.float64]:
    """Directions of a scan that lies obliquely, in (z, y, x)."""
    (c, s), (d, t) = ((math.cos(angle), math.sin(angle)) for angle in (about_x, about_z))
    in_plane = np.array([[1, 0, 0], [0, d, -t], [0, t, d]])
    tilted: NDArray[np.float64] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ in_plane
    return tilted


DIRECTIONS = {"straight": np.eye(3), "oblique": turned(0.2, -0.15)}


@pytest.fixture(params=DIRECTIONS)
def volume(request: pytest.FixtureRequest) -> Volume:
    hu = np.random.default_rng(0).integers(-1024, 3072, SHAPE).astype(np.int16)
    return Volume(hu, (2.5, 0.7, 0.8125), (-301.2, -120.0, 140 / 3), DIRECTIONS[request.param])


@pytest.fixture
def layout() -> NDArray[np.uint8]:
    """Every label, and planes without any."""
    drawn = np.random.default_rng(1).choice(np.array(list(Label), np.uint8), SHAPE)
    drawn[[0, 4]] = 0
    return drawn


def series_of(files: list[Path]) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in files]


def test_planes_hold_hounsfield_units_at_their_place(volume: Volume, tmp_path: Path) -> None:
    files = write_dicom(tmp_path, volume, None, PASSPORT)
    assert [path.name for path in files] == [f"image_{n:04d}.dcm" for n in range(1, 10)]
    for plane, image in enumerate(series_of(files)):
        assert image.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert image.SOPClassUID == CTImageStorage
        np.testing.assert_array_equal(
            image.pixel_array * image.RescaleSlope + image.RescaleIntercept, volume.hu[plane]
        )
        assert list(image.PixelSpacing) == [0.7, 0.8125]
        assert image.SliceThickness == 2.5
        # DICOM's own equation, with rows along y and columns along x.
        right, down = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
        corner = np.array(image.ImagePositionPatient, float)
        for row, column in ((0, 0), (11, 3)):
            place = corner + right * 0.8125 * column + down * 0.7 * row
            expected = volume.position_mm((plane, row, column))[::-1]
            np.testing.assert_allclose(place, expected, atol=DECIMALS)


def test_simpleitk_reads_the_same_volume(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    write_dicom(tmp_path, volume, layout, PASSPORT)
    ours = pydicom.dcmread(tmp_path / "image_0001.dcm").SeriesInstanceUID
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path), ours)
    image = sitk.ReadImage(names)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume.hu)
    np.testing.assert_allclose(image.GetSpacing(), volume.spacing_mm[::-1], atol=1e-6)
    np.testing.assert_allclose(image.GetOrigin(), volume.origin_mm[::-1], atol=1e-6)
    expected = volume.direction[::-1, ::-1].ravel()
    np.testing.assert_allclose(image.GetDirection(), expected, atol=1e-6)


def test_monai_reads_the_same_volume(volume: Volume, tmp_path: Path) -> None:
    write_dicom(tmp_path, volume, None, PASSPORT)
    image = LoadImage(reader="PydicomReader", image_only=True)(tmp_path)
    np.testing.assert_array_equal(np.asarray(image).T, volume.hu)
    # Its matrices are in (x, y, z) and RAS.
    spread = volume.direction * np.asarray(volume.spacing_mm)
    flip = np.diag([-1, -1, 1])
    np.testing.assert_allclose(image.affine[:3, :3], flip @ spread[::-1, ::-1], atol=1e-6)
    np.testing.assert_allclose(image.affine[:3, 3], flip @ volume.origin_mm[::-1], atol=1e-6)


def test_ingest_takes_an_exported_series_as_it_was(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    write_dicom(tmp_path, volume, layout, PASSPORT)
    (found,), refused = find_series(tmp_path)
    assert not refused
    assert found.patient_id == "SYN-tiny-00000007"
    read, _ = read_series(found.files)
    np.testing.assert_array_equal(read.hu, volume.hu)
    np.testing.assert_allclose(read.spacing_mm, volume.spacing_mm, atol=1e-6)
    np.testing.assert_allclose(read.origin_mm, volume.origin_mm, atol=1e-6)
    np.testing.assert_allclose(read.direction, volume.direction, atol=1e-6)


def test_highdicom_reads_the_layout_segment_by_segment(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    files = write_dicom(tmp_path, volume, layout, PASSPORT)
    assert files[-1].name == "segmentation.dcm"
    images = series_of(files[:-1])
    found = highdicom.seg.segread(files[-1])
    assert found.FrameOfReferenceUID == images[0].FrameOfReferenceUID
    assert found.StudyInstanceUID == images[0].StudyInstanceUID
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == images[0].SeriesInstanceUID
    planes = found.get_pixels_by_source_instance(
        [image.SOPInstanceUID for image in images], assert_missing_frames_are_empty=True
    )
    names = {label: LABELS[label] for label in Label if label}
    assert [segment.SegmentLabel for segment in found.SegmentSequence] == list(names.values())
    for number, label in enumerate(names):
        np.testing.assert_array_equal(planes[..., number] == 1, layout == label)
    # The same by place alone; volumes of highdicom begin at the head.
    series = highdicom.get_volume_from_series(images)
    np.testing.assert_array_equal(series.array, volume.hu[::-1])
    placed = found.get_volume(combine_segments=True, allow_missing_positions=True)
    numbers = np.zeros(256, np.uint8)
    numbers[list(names)] = range(1, len(names) + 1)
    np.testing.assert_array_equal(placed.match_geometry(series).array, numbers[layout][::-1])


def test_a_slice_is_a_series_of_one_image(layout: NDArray[np.uint8], tmp_path: Path) -> None:
    hu = np.arange(-96, 96, dtype=np.int16).reshape(1, 12, 16)
    image, segmentation = write_dicom(
        tmp_path, Volume(hu, (1.0, 0.7, 0.7)), layout[:1] + 1, PASSPORT
    )
    np.testing.assert_array_equal(read_marks(image).pixels, hu[0])
    np.testing.assert_array_equal(read_marks(segmentation).pixels, layout[:1] + 1)


def test_without_a_label_there_is_no_segmentation(volume: Volume, tmp_path: Path) -> None:
    files = write_dicom(tmp_path, volume, np.zeros(SHAPE, np.uint8), PASSPORT)
    assert len(files) == len(list(tmp_path.iterdir())) == SHAPE[0]


def test_every_file_says_that_it_is_synthetic(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    mixed = PASSPORT | {"contains_real_pixels": True}
    for passport, told in ((PASSPORT, "no patient"), (mixed, "rest a real scan")):
        files = write_dicom(tmp_path, volume, layout, passport)
        for path, dataset in zip(files, series_of(files), strict=True):
            assert dataset.SyntheticData == "YES"
            assert dataset.ImageType[0] == "DERIVED"
            assert dataset.PatientID == "SYN-tiny-00000007"
            assert dataset.PatientName.family_name == "Synthetic"
            assert told in dataset.SeriesDescription
            maker = dataset.ContributingEquipmentSequence[0]
            assert maker.PurposeOfReferenceCodeSequence[0].CodeMeaning == "Synthesizing Equipment"
            assert "b" * 64 in maker.ContributionDescription
            own = read_marks(path).passport
            assert own is not None
            assert passport.items() <= own.items()


def test_nobody_is_named_and_no_day(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    empty = {"DA": {"", "19700101"}, "TM": {"", "000000"}, "DT": {""}, "AS": {""}}
    for dataset in series_of(write_dicom(tmp_path, volume, layout, PASSPORT)):
        for element in dataset.iterall():
            if element.VR in empty:
                assert str(element.value or "") in empty[element.VR], element
        for name in ("PatientBirthDate", "PatientSex", "ReferringPhysicianName", "AccessionNumber"):
            assert not dataset[name].value, name
        assert "InstitutionName" not in dataset


def test_uids_follow_from_the_passport(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    written: dict[str, list[bytes]] = {}
    uids: dict[str, set[str]] = {}
    others = {"other row": {"row": 8}, "other bundle": {"bundle": "c" * 64}, "again": {}}
    for name, change in {"first": {}, **others}.items():
        (tmp_path / name).mkdir()
        files = write_dicom(tmp_path / name, volume, layout, PASSPORT | change)
        written[name] = [path.read_bytes() for path in files]
        own = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
        datasets = series_of(files)
        uids[name] = {dataset[part].value for dataset in datasets for part in own}
        uids[name].add(datasets[-1].DimensionIndexSequence[0].DimensionOrganizationUID)
    assert written["again"] == written["first"]
    # Of each plane and the segmentation one, two series, a study, a frame, and dimensions.
    assert len(uids["first"]) == SHAPE[0] + 1 + 2 + 1 + 1 + 1
    assert len(set().union(*uids.values())) == 3 * len(uids["first"])
    for uid in uids["first"]:
        assert pydicom.uid.UID(uid).is_valid
        assert uid.startswith("2.25.")
        assert int(uid.removeprefix("2.25.")) < 2**128


KNOWN = (
    "</(0008,001c)> - Attribute with an even group number is not a recognized standard attribute"
)
"""Synthetic Data came into DICOM after this validator's dictionary."""


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
def test_a_validator_finds_no_error(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    files = write_dicom(tmp_path, volume, layout, PASSPORT)
    for path in (files[0], files[-1]):
        told = subprocess.run(
            ["dciodvfy", "-new", path], capture_output=True, text=True, check=False
        ).stderr
        assert {"CTImage", "Segmentation"} & set(told.splitlines()), told
        errors = [line for line in told.splitlines() if line.startswith("Error")]
        assert [line for line in errors if KNOWN not in line] == []


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
def test_the_validator_does_find_errors(volume: Volume, tmp_path: Path) -> None:
    path = write_dicom(tmp_path, volume, None, PASSPORT)[0]
    image = pydicom.dcmread(path)
    del image.FrameOfReferenceUID
    image.save_as(path)
    told = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, check=False)
    assert "Error" in told.stderr.replace(KNOWN, "")


def test_every_label_has_a_code() -> None:
    assert CODES.keys() == set(Label) - {Label.BACKGROUND}
    values = [kind.value for _, kind in CODES.values()]
    assert len(set(values)) == len(values)


def test_any_altered_byte_is_found(
    volume: Volume, layout: NDArray[np.uint8], tmp_path: Path
) -> None:
    files = write_dicom(tmp_path, volume, layout, PASSPORT)
    assert {one.verdict for one in verify(tmp_path)} == {"valid"}
    places = np.random.default_rng(2)
    for path in (files[3], files[-1]):
        whole = path.read_bytes()
        pad = 8 if path == files[-1] else 0  # bits behind the last segment mean nothing
        for place in places.integers(0, len(whole) - pad, 20):
            flipped = bytearray(whole)
            flipped[place] ^= 0x10
            path.write_bytes(flipped)
            assert verify(path)[0].verdict != "valid", f"byte {place} of {path.name}"
        path.write_bytes(whole)


def rescaled(dataset: pydicom.Dataset) -> None:
    dataset.RescaleIntercept = -1024


def named(dataset: pydicom.Dataset) -> None:
    dataset.PatientName = "Doe^Jane"


def moved(dataset: pydicom.Dataset) -> None:
    dataset.ImagePositionPatient = [0, 0, 0]


def unmarked(dataset: pydicom.Dataset) -> None:
    del dataset.SyntheticData


def stripped(dataset: pydicom.Dataset) -> None:
    dataset.remove_private_tags()


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (rescaled, "altered"),
        (named, "altered"),
        (moved, "altered"),
        (unmarked, "unmarked"),
        (stripped, "unmarked"),
    ],
)
def test_altered_tags_are_found(change: Any, verdict: str, tmp_path: Path) -> None:
    path = write_dicom(tmp_path, small_volume(), None, PASSPORT)[2]
    dataset = pydicom.dcmread(path)
    dataset.save_as(path)
    assert verify(path)[0].verdict == "valid"
    change(dataset)
    dataset.save_as(path)
    assert verify(path)[0].verdict == verdict


def test_voxels_that_were_altered_are_named(tmp_path: Path) -> None:
    volume = small_volume()
    files = write_dicom(tmp_path, volume, (volume.hu > -700).astype(np.uint8), PASSPORT)
    for path in (files[0], files[-1]):
        dataset = pydicom.dcmread(path)
        dataset.PixelData = bytes([dataset.PixelData[0] ^ 1]) + dataset.PixelData[1:]
        dataset.save_as(path)
        assert verify(path)[0].reason == "its voxels"


def test_what_is_no_export_is_unmarked_or_refused(tmp_path: Path) -> None:
    scan = write_series(tmp_path / "scan", small_volume())[0]
    assert read_marks(scan).passport is None
    assert not read_marks(scan).is_synthetic
    whole = write_dicom(tmp_path, small_volume(), None, PASSPORT)[0].read_bytes()
    broken = tmp_path / "broken.dcm"
    for content in (b"", b"no DICOM", whole[:400], whole[:-50]):
        broken.write_bytes(content)
        with pytest.raises(UnreadableCase):
            read_marks(broken)
    dataset = pydicom.dcmread(scan)
    dataset.SOPClassUID = SegmentationStorage
    dataset.save_as(broken)
    with pytest.raises(UnreadableCase, match="nor a segmentation as exported"):
        read_marks(broken)


def test_grey_values_without_a_unit_are_refused(tmp_path: Path) -> None:
    facts = RunFacts("run", 1, (4, 4), (1.0, 1.0), "relative", {})
    with pytest.raises(InputError, match="no known unit"):
        dicom_files(tmp_path, facts)


def test_a_layout_of_another_kind_is_an_error(volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout of"):
        write_dicom(tmp_path, volume, np.ones((1, 2, 3), np.uint8), PASSPORT)
    with pytest.raises(ValueError, match="255"):
        write_dicom(tmp_path, volume, np.full(SHAPE, 255, np.uint8), PASSPORT)
    assert not list(tmp_path.iterdir())
