from __future__ import annotations

import os
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
)

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom import find_series, read_series
from raysynth.formats.dicom_slice import KEPT_TAGS, PADDING_HU
from raysynth.volume import AIR_HU, Volume
from tests.formats.dicom_files import (
    SERIES_UID,
    SYNTAXES,
    in_syntax,
    small_volume,
    write_series,
)


def sitk_volume(files: tuple[Path, ...]) -> Volume:
    """The series as SimpleITK reads it, in our order of axes, before any replacement of padding."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent)))
    image = reader.Execute()
    direction = np.array(image.GetDirection()).reshape(3, 3)[::-1, ::-1]
    hu = sitk.GetArrayFromImage(image).astype(np.int16)
    return Volume(hu, image.GetSpacing()[::-1], image.GetOrigin()[::-1], direction)


def assert_same_geometry(ours: Volume, theirs: Volume) -> None:
    np.testing.assert_allclose(ours.spacing_mm, theirs.spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(ours.origin_mm, theirs.origin_mm, atol=1e-6)
    np.testing.assert_allclose(ours.direction, theirs.direction, atol=1e-6)


def test_real_series_equal_simpleitk_voxel_by_voxel(lidc_dicom: Path) -> None:
    series, refused = find_series(lidc_dicom)
    assert [one.patient_id[-4:] for one in series] == ["0003", "0013", "0001"]
    assert refused == []
    for one in series:
        volume, tags = read_series(one.files)
        expected = sitk_volume(one.files)
        padding = expected.hu <= PADDING_HU
        assert (expected.hu[padding] == -2048).all()
        assert 0.1 < padding.mean() < 0.3  # the corners around the round field of view
        np.testing.assert_array_equal(volume.hu, np.where(padding, AIR_HU, expected.hu))
        assert_same_geometry(volume, expected)
        assert set(tags) <= set(KEPT_TAGS)
        assert tags["Manufacturer"] == "GE"
        assert tags["SliceThickness"] == 2.5


def test_written_series_comes_back_with_its_geometry(tmp_path: Path) -> None:
    volume = small_volume()
    files = write_series(tmp_path, volume)
    random.Random(0).shuffle(files)
    again, tags = read_series(files)
    np.testing.assert_array_equal(again.hu, volume.hu)
    assert_same_geometry(again, volume)
    assert_same_geometry(again, sitk_volume(tuple(files)))
    assert tags == {
        "Manufacturer": "Toshiba",
        "SliceThickness": 2.5,
        "KVP": 120.0,
        "ConvolutionKernel": "I30f\\3",
    }


def test_prone_patient_keeps_the_direction_of_rows_and_columns(tmp_path: Path) -> None:
    standard = small_volume()
    volume = Volume(
        standard.hu, standard.spacing_mm, standard.origin_mm, np.diag([1.0, -1.0, -1.0])
    )
    files = write_series(tmp_path, volume)
    again, _ = read_series(files)
    np.testing.assert_array_equal(again.hu, volume.hu)
    assert_same_geometry(again, volume)
    assert_same_geometry(again, sitk_volume(tuple(files)))


def test_planes_ascend_to_the_head_even_where_the_cross_product_descends(tmp_path: Path) -> None:
    standard = small_volume()
    mirrored = Volume(
        standard.hu, standard.spacing_mm, standard.origin_mm, np.diag([1.0, -1.0, 1.0])
    )
    again, _ = read_series(write_series(tmp_path, mirrored))
    np.testing.assert_array_equal(again.hu, mirrored.hu)
    assert_same_geometry(again, mirrored)


def test_fractional_slope_equals_simpleitk(tmp_path: Path) -> None:
    def edit(tags: Dataset, plane: int) -> None:
        tags.RescaleSlope = 0.5 + 0.001
        tags.RescaleIntercept = -1000.25

    files = write_series(tmp_path, small_volume(), edit=edit)
    import SimpleITK as sitk

    expected = sitk.GetArrayFromImage(sitk.ReadImage([str(path) for path in reversed(files)]))
    volume, _ = read_series(files)
    np.testing.assert_array_equal(volume.hu, np.rint(expected))


def test_twelve_bit_pixels_lose_what_lies_above_them(tmp_path: Path) -> None:
    volume = small_volume()

    def edit(tags: Dataset, plane: int) -> None:
        stored = np.frombuffer(tags.PixelData, "<u2") & 0x0FFF
        tags.BitsStored, tags.HighBit, tags.PixelRepresentation = 12, 11, 0
        tags.PixelData = (stored | 0xA000).astype("<u2").tobytes()

    files = write_series(tmp_path, volume, edit=edit)
    np.testing.assert_array_equal(read_series(files)[0].hu, volume.hu)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_coding_equals_simpleitk(tmp_path: Path, syntax: str) -> None:
    volume = small_volume()
    files = [tmp_path / f"{plane}.dcm" for plane in range(len(volume.hu))]
    for plane, path in enumerate(files):
        path.write_bytes(in_syntax(volume, plane, syntax))
    again, _ = read_series(files)
    np.testing.assert_array_equal(again.hu, volume.hu)
    np.testing.assert_array_equal(sitk_volume(tuple(files)).hu, volume.hu)


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (JPEG2000Lossless, partial(imagecodecs.jpeg2k_encode, codecformat="j2k", level=0)),
        (JPEGLosslessSV1, lambda values: imagecodecs.ljpeg_encode(values.view(np.uint16))),
    ],
)
def test_compressed_negative_values(
    tmp_path: Path, syntax: str, encode: Callable[[np.ndarray], bytes]
) -> None:
    volume = small_volume()

    def edit(tags: Dataset, plane: int) -> None:
        tags.RescaleIntercept = 0
        tags.file_meta.TransferSyntaxUID = syntax
        tags.PixelData = encapsulate([bytes(encode(volume.hu[plane]))])
        tags["PixelData"].is_undefined_length = True

    files = write_series(tmp_path, volume, edit=edit)
    assert volume.hu.min() < 0
    np.testing.assert_array_equal(read_series(files)[0].hu, volume.hu)


@pytest.mark.parametrize(
    ("maker", "kernel", "kept"),
    [
        ("GE MEDICAL SYSTEMS", "BONEPLUS", {"Manufacturer": "GE", "ConvolutionKernel": "BONEPLUS"}),
        ("SIEMENS", "Br40d\\3", {"Manufacturer": "Siemens", "ConvolutionKernel": "Br40d\\3"}),
        ("Doe^Jane", "Jane Doe", {}),
        ("Germany", "DOE", {}),
        ("Philips of Mrs. Doe", "YA", {"Manufacturer": "Philips", "ConvolutionKernel": "YA"}),
    ],
)
def test_only_known_words_are_kept(
    tmp_path: Path, maker: str, kernel: str, kept: dict[str, str]
) -> None:
    edit = everywhere(Manufacturer=maker, ConvolutionKernel=kernel)
    _, tags = read_series(write_series(tmp_path, small_volume(), edit=edit))
    assert tags == {"SliceThickness": 2.5, "KVP": 120.0, **kept}


@pytest.mark.parametrize(
    ("tagged", "stored", "expected"),
    [
        (-2000, -2000, AIR_HU),
        (63536, -2000, AIR_HU),  # -2000 written as unsigned, as GE does
        (None, -1024, AIR_HU),  # -2048 HU, named by no tag: LIDC
        (None, -525, -1549),  # noise in LIDC-IDRI-0003 stays
        (20, 20, AIR_HU),  # -1004 HU: below air, so it may be padding
        (1024, 1024, 0),  # water cannot be padding
    ],
)
def test_padding_becomes_air(
    tmp_path: Path, tagged: int | None, stored: int, expected: int
) -> None:
    def edit(tags: Dataset, plane: int) -> None:
        if tagged is not None:
            tags.add_new("PixelPaddingValue", "SS" if tagged < 0 else "US", tagged)
        pixels = np.frombuffer(tags.PixelData, "<i2").copy()
        pixels[:5] = stored
        tags.PixelData = pixels.tobytes()

    volume, _ = read_series(write_series(tmp_path, small_volume(), edit=edit))
    assert (volume.hu[:, 0, :5] == expected).all()
    np.testing.assert_array_equal(volume.hu[:, 1:], small_volume().hu[:, 1:])


def everywhere(**values: object) -> Callable[[Dataset, int], None]:
    """Sets tags in all slices; None deletes."""

    def edit(tags: Dataset, plane: int) -> None:
        for name, value in values.items():
            if value is None:
                delattr(tags, name)
            else:
                setattr(tags, name, value)

    return edit


def in_one(**values: object) -> Callable[[Dataset, int], None]:
    """Sets tags in plane 4 only."""

    def edit(tags: Dataset, plane: int) -> None:
        if plane == 4:
            everywhere(**values)(tags, plane)

    return edit


def tilted(tags: Dataset, plane: int) -> None:
    tags.ImagePositionPatient = [-140.0, -120.0 + 0.5 * plane, -300 + 2.5 * plane]


BAD_SERIES = [
    # rule, text of the reason, what is done to the slices
    ("missing-slice", "gap of 5 mm", lambda tags, plane: None),
    ("duplicate-slice", "same place", in_one(ImagePositionPatient=[-140, -120, -292.5])),
    ("uneven-slices", "constant", in_one(ImagePositionPatient=[-140, -120, -290.5])),
    ("gantry-tilt", "4.5 mm", tilted),
    ("mixed-spacing", "pixels of", in_one(PixelSpacing=[0.71, 0.8])),
    (
        "mixed-orientation",
        "parallel",
        in_one(ImageOrientationPatient=[0.995, 0.1, 0, -0.1, 0.995, 0]),
    ),
    ("mixed-size", r"\(8, 32\)", in_one(Rows=8, Columns=32)),
    ("mixed-series", "several", in_one(SeriesInstanceUID="1.2.3")),
    ("not-ct", "CT image", everywhere(Modality="MR")),
    ("not-ct", "CT image", in_one(SOPClassUID=ComputedRadiographyImageStorage)),
    ("localizer", "scout", in_one(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    ("burned-in", "burned", in_one(BurnedInAnnotation="YES")),
    ("missing-tag", "ImagePositionPatient", in_one(ImagePositionPatient=None)),
    ("missing-tag", "ImageOrientationPatient", everywhere(ImageOrientationPatient=None)),
    ("missing-tag", "PixelSpacing", everywhere(PixelSpacing=None)),
    ("missing-tag", "RescaleSlope", everywhere(RescaleSlope=None)),
    ("missing-tag", "Rows", in_one(Rows=None)),
    ("bad-tag", "PixelSpacing", everywhere(PixelSpacing=[0.7])),
    ("bad-tag", "ImagePositionPatient", in_one(ImagePositionPatient=["nan", "0", "0"])),
    ("spacing", "0.05 to 20", everywhere(PixelSpacing=[0, 0.7])),
    ("spacing", "0.05 to 20", everywhere(PixelSpacing=[-0.7, 0.7])),
    ("spacing", "0.05 to 20", everywhere(PixelSpacing=[700, 700])),
    ("orientation", "perpendicular", everywhere(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])),
    ("orientation", "unit", everywhere(ImageOrientationPatient=[2, 0, 0, 0, 1, 0])),
    ("not-axial", "axial", everywhere(ImageOrientationPatient=[1, 0, 0, 0, 0, -1])),
    ("not-axial", "axial", everywhere(ImageOrientationPatient=[0, 1, 0, 1, 0, 0])),
    ("rescale", "slope 0", everywhere(RescaleSlope=0)),
    ("rescale", "slope -1", everywhere(RescaleSlope=-1)),
    ("rescale", "Hounsfield", everywhere(RescaleIntercept=1e9)),
    ("rescale", "Hounsfield", everywhere(RescaleType="OD")),
    ("hu-range", "HU", everywhere(RescaleSlope=90)),
    ("not-grey", "MONOCHROME2", everywhere(SamplesPerPixel=3, PhotometricInterpretation="RGB")),
    ("not-grey", "MONOCHROME2", everywhere(PhotometricInterpretation="MONOCHROME1")),
    ("pixel-format", "12 bits in 12", everywhere(BitsAllocated=12, BitsStored=12, HighBit=11)),
    ("pixel-format", "8 bits in 8", everywhere(BitsAllocated=8, BitsStored=8, HighBit=7)),
    ("pixel-format", "low bits", everywhere(BitsStored=12, HighBit=15)),
    ("multi-frame", "frames", everywhere(NumberOfFrames=2)),
    ("size", "60000", everywhere(Rows=60000, Columns=60000)),
    ("size", "0 x 16", everywhere(Rows=0)),
    ("pixel-data", "cut", in_one(PixelData=b"\0\0")),
    ("pixel-data", "cut", in_one(PixelData=None)),
]


@pytest.mark.parametrize(("rule", "reason", "edit"), BAD_SERIES)
def test_bad_series_are_refused_by_name(
    tmp_path: Path, rule: str, reason: str, edit: Callable[[Dataset, int], None]
) -> None:
    files = write_series(tmp_path, small_volume(), edit=edit)
    if rule == "missing-slice":
        del files[5]
    with pytest.raises(UnreadableCase, match=reason) as caught:
        read_series(files)
    assert caught.value.rule == rule
    assert str(tmp_path) not in caught.value.reason
    assert SERIES_UID not in caught.value.reason


def test_too_few_slices(tmp_path: Path) -> None:
    files = write_series(tmp_path, small_volume(slices=7))
    with pytest.raises(UnreadableCase, match="7 slices"):
        read_series(files)


def claim_syntax(path: Path, syntax: str) -> int:
    """Changes what the file says of its coding, and nothing else; returns where its body starts."""
    raw = path.read_bytes()
    element = bytes.fromhex("02001000") + b"UI"
    was, now = (
        element + struct.pack("<H", len(value)) + value
        for value in (b"1.2.840.10008.1.2.1\0", syntax.encode())
    )
    assert raw.count(was) == 1
    (length,) = struct.unpack_from("<I", raw, 140)
    length += len(now) - len(was)
    raw = raw[:140] + struct.pack("<I", length) + raw[144:].replace(was, now)
    path.write_bytes(raw)
    return 144 + length


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def deflate_bomb(path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(bytes(64 << 20)) + packer.flush()
    start = claim_syntax(path, DeflatedExplicitVRLittleEndian)
    path.write_bytes(path.read_bytes()[:start] + body)


def nested(path: Path) -> None:
    # Ten thousand sequences, each opened inside the one before and none closed.
    opening = bytes.fromhex("0800401153510000ffffffff feff00e0ffffffff")
    raw = path.read_bytes()
    at = raw.index(bytes.fromhex("08006000") + b"CS")
    path.write_bytes(raw[:at] + opening * 10_000 + raw[at:])


def huge_length(path: Path) -> None:
    raw = path.read_bytes()
    at = raw.index(bytes.fromhex("08006000") + b"CS")
    element = bytes.fromhex("0900101055540000f0ffffff")
    path.write_bytes(raw[:at] + element + raw[at:])


def without_kind(path: Path) -> None:
    tags = pydicom.dcmread(path)
    del tags.SOPClassUID
    tags.save_as(path)


BAD_FILES = [
    ("not-ct", without_kind),
    ("not-dicom", lambda path: path.write_bytes(b"")),
    ("not-dicom", lambda path: path.write_text("<html>404</html>" * 50)),
    ("not-dicom", lambda path: path.write_bytes(bytes(128) + b"DICM")),
    ("pixel-data", cut(0.9)),
    (None, cut(0.4)),
    (None, cut(0.2)),
    ("transfer-syntax", deflate_bomb),
    (None, nested),
    (None, huge_length),
    ("size", lambda path: os.truncate(path, 1 << 30)),
    ("transfer-syntax", lambda path: claim_syntax(path, JPEG2000)),
]


@pytest.mark.parametrize(("rule", "damage"), BAD_FILES)
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, rule: str | None, damage: Callable[[Path], object]
) -> None:
    files = write_series(tmp_path, small_volume())
    damage(files[3])
    with pytest.raises(UnreadableCase) as caught:
        read_series(files)
    assert rule is None or caught.value.rule == rule
    series, refused = find_series(tmp_path)
    # Nothing vanishes: a file is in the series, where reading refuses the case, or is named here.
    assert set(files) == {one.path for one in refused} | set(series[0].files)


def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path, small_volume(slices=8, side=4))
    whole = files[2].read_bytes()
    rng = random.Random(7)
    outcomes = set()
    for _ in range(100):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            raw[rng.randrange(128, len(raw))] = rng.randrange(256)
        files[2].write_bytes(raw)
        find_series(tmp_path)
        try:
            read_series(files)
            outcomes.add("read")
        except UnreadableCase as error:
            outcomes.add(error.rule)
    assert {"read", "not-dicom"} < outcomes
    assert len(outcomes) > 5


def test_folder_with_everything_a_download_holds(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a" / "b", small_volume())
    bare = write_series(tmp_path / "c", small_volume(), series_uid="1.2.3.1", patient_id="P2")
    bare = [path.rename(path.with_suffix("")) for path in bare]
    radiograph = everywhere(SOPClassUID=ComputedRadiographyImageStorage, Modality="CR")
    write_series(tmp_path / "x", small_volume(), edit=radiograph, series_uid="1.2.3.2")
    scout = everywhere(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "s", small_volume(), edit=scout, series_uid="1.2.3.3")
    (tmp_path / "a" / "069.xml").write_text("<LidcReadMessage/>")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "LICENSE").write_text("CC BY 3.0")
    (tmp_path / "a" / "broken.dcm").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.dcm")
    series, refused = find_series(tmp_path)
    assert [(one.uid, one.patient_id) for one in series] == [
        ("1.2.3.1", "P2"),
        (SERIES_UID, "PATIENT-1"),
    ]
    assert set(series[0].files) == set(bare)
    assert set(series[1].files) == set(files)
    assert [(one.path.name, one.rule) for one in refused] == [("broken.dcm", "not-dicom")]


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    write_series(outside, small_volume(), series_uid="1.2.3.9")
    files = write_series(inside / "a", small_volume())
    (inside / "folder").symlink_to(outside)
    (inside / "file.dcm").symlink_to(outside / "0000.dcm")
    (inside / "again.dcm").symlink_to(files[0])
    (inside / "loop").symlink_to(inside)
    series, refused = find_series(inside)
    assert [one.uid for one in series] == [SERIES_UID]
    assert len(series[0].files) == len(files)
    assert {(one.path.name, one.rule) for one in refused} == {
        ("folder", "link"),
        ("file.dcm", "link"),
    }


@pytest.mark.parametrize(
    ("rule", "edit"),
    [("missing-patient", everywhere(PatientID="")), ("mixed-patients", in_one(PatientID="P-2"))],
)
def test_series_need_one_patient(
    tmp_path: Path, rule: str, edit: Callable[[Dataset, int], None]
) -> None:
    write_series(tmp_path, small_volume(), edit=edit)
    series, refused = find_series(tmp_path)
    assert series == []
    assert [one.rule for one in refused] == [rule]


def test_no_identifier_leaves_the_reader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    private = ["PATIENT-1", "Doe", "1999", "Elsewhere", SERIES_UID, "1.2.826"]

    files = write_series(tmp_path, small_volume())
    raw = files[0].read_bytes()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("DEBUG"):
        warnings.simplefilter("always")
        _, tags = read_series(files)
        # Text where a number belongs: the refusal must not quote it.
        files[0].write_bytes(raw.replace(b"-120.0\\", b"Jane^D\\"))
        with pytest.raises(UnreadableCase, match="ImagePositionPatient") as refusal:
            read_series(files)
        find_series(tmp_path)
    assert set(tags) <= set(KEPT_TAGS)
    told = repr(tags) + str(refusal.value) + caplog.text + "".join(str(w.message) for w in caught)
    assert not [text for text in [*private, "Jane"] if text in told]


def test_pydicom_validates_again_after_reading(tmp_path: Path) -> None:
    before = pydicom.config.settings.reading_validation_mode
    read_series(write_series(tmp_path, small_volume()))
    assert pydicom.config.settings.reading_validation_mode == before


def test_unreadable_folder_is_reported(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    locked = tmp_path / "locked"
    write_series(locked, small_volume())
    locked.chmod(0)
    try:
        assert [one.rule for one in find_series(tmp_path)[1]] == ["unreadable"]
    finally:
        locked.chmod(0o700)
        shutil.rmtree(locked)
