from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from raysynth.errors import UnreadableCase
from raysynth.formats.image import (
    IMAGE_SUFFIXES,
    Image,
    labels_of,
    read_image,
    volume_of,
)
from raysynth.volume import AIR_HU, RELATIVE_RANGE, Volume
from tests.formats.image_files import (
    ORIGIN_MM,
    SHAPE,
    SPACING_MM,
    metaimage,
    nifti,
    nrrd,
    small_values,
    valid_files,
)


def rotation(*degrees: float) -> NDArray[np.float64]:
    """Turns about x, y and z, one after the other."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[one, two], [one, two]] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        turned = turn @ turned
    return turned


DIRECTIONS = {
    "plain": np.eye(3),
    "prone": np.diag([-1.0, -1.0, 1.0]),
    "feet-last": np.diag([1.0, -1.0, -1.0]),
    "mirrored": np.diag([-1.0, 1.0, 1.0]),
    "oblique": rotation(5, -12, 20),
    "oblique-mirrored": rotation(-15, 3, 8) @ np.diag([1.0, 1.0, -1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]]),
}
"""Columns are file axes (fastest first) in LPS (x, y, z), as SimpleITK has them."""


def assert_equals_simpleitk(image: Image, path: Path) -> None:
    """Voxel by voxel, type and geometry, as SimpleITK reads the same file."""
    theirs = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(theirs)
    assert image.values.dtype == values.dtype
    np.testing.assert_array_equal(image.values, values)
    np.testing.assert_allclose(image.spacing_mm, theirs.GetSpacing()[::-1], rtol=1e-6)
    np.testing.assert_allclose(image.origin_mm, theirs.GetOrigin()[::-1], atol=1e-4)
    direction = np.array(theirs.GetDirection()).reshape(3, 3)[::-1, ::-1]
    np.testing.assert_allclose(image.direction, direction, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["i2", "u1", "u2", "f4"])
@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_simpleitk_writes_is_read_alike(
    tmp_path: Path, suffix: str, dtype: str, direction: str, packed: bool
) -> None:
    values = np.random.default_rng(0).normal(100, 40, SHAPE).astype(dtype)
    written = sitk.GetImageFromArray(values)
    written.SetSpacing(SPACING_MM[::-1])
    written.SetOrigin((12.5, -80.25, 300.125))
    written.SetDirection(DIRECTIONS[direction].ravel().tolist())
    path = tmp_path / f"image{suffix}"
    sitk.WriteImage(written, str(path), useCompression=packed)
    image = read_image(path)
    np.testing.assert_array_equal(image.values, values)
    assert_equals_simpleitk(image, path)
    # One voxel lies where it was put.
    volume = Volume(values.astype(np.int16), image.spacing_mm, image.origin_mm, image.direction)
    expected = written.TransformIndexToPhysicalPoint((4, 1, 3))[::-1]
    np.testing.assert_allclose(volume.position_mm((3, 1, 4)), expected, atol=1e-4)


@pytest.mark.parametrize("name", valid_files())
def test_small_files_hold_what_was_written(tmp_path: Path, name: str) -> None:
    for each, raw in valid_files()[name].items():
        (tmp_path / each).write_bytes(raw)
    image = read_image(tmp_path / name)
    if name == "c.nii":  # NIfTI-2, which SimpleITK does not know
        expected = nib.load(tmp_path / name).get_fdata().T
        np.testing.assert_array_equal(image.values, expected)
    else:
        assert_equals_simpleitk(image, tmp_path / name)
    assert image.values.dtype.isnative
    np.testing.assert_allclose(image.spacing_mm, SPACING_MM, rtol=1e-6)
    np.testing.assert_allclose(image.origin_mm, ORIGIN_MM, rtol=1e-6)
    np.testing.assert_array_equal(image.direction, np.eye(3))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("kind", ["nifti1", "nifti2", "nrrd", "metaimage"])
def test_types_and_byte_orders(tmp_path: Path, kind: str, dtype: str, order: str) -> None:
    values = np.abs(small_values("i2")).astype(order + dtype)
    if kind.startswith("nifti"):
        path = tmp_path / "a.nii"
        path.write_bytes(nifti(values, version=int(kind[-1])))
    elif kind == "nrrd":
        names = {"f4": "float", "f8": "double"}
        named = names.get(dtype, f"{'u' * (dtype[0] == 'u')}int{8 * values.itemsize}")
        path = tmp_path / "a.nrrd"
        endian = "big" if order == ">" else "little"
        path.write_bytes(nrrd(values.tobytes(), type=named, endian=endian))
    else:
        named = {1: "CHAR", 2: "SHORT", 4: "INT", 8: "LONG_LONG"}[values.itemsize]
        named = {"f4": "FLOAT", "f8": "DOUBLE"}.get(dtype, "U" * (dtype[0] == "u") + named)
        path = tmp_path / "a.mha"
        msb = str(order == ">")
        raw = values.tobytes()
        path.write_bytes(metaimage(raw, ElementType=f"MET_{named}", BinaryDataByteOrderMSB=msb))
    image = read_image(path)
    assert image.values.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(image.values, values)


@pytest.mark.parametrize("dtype", ["<i2", "<u1", "<f4", "<i4"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (0.5, -1000.25), (-2, 3)])
def test_nifti_slope_and_intercept_equal_simpleitk(
    tmp_path: Path, dtype: str, slope: float, intercept: float
) -> None:
    path = tmp_path / "a.nii"
    values = np.abs(small_values("i2")).astype(dtype)
    path.write_bytes(nifti(values, scl_slope=slope, scl_inter=intercept))
    image = read_image(path)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(image.values, expected, rtol=1e-6)
    np.testing.assert_allclose(image.values, values * np.float64(slope) + intercept, rtol=1e-6)
    assert image.values.dtype == (np.float64 if dtype == "<i4" else np.float32)


@pytest.mark.parametrize(("slope", "intercept"), [(0, 7), (np.nan, np.nan), (1, 0)])
def test_nifti_without_scaling_keeps_its_type(
    tmp_path: Path, slope: float, intercept: float
) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(nifti(scl_slope=slope, scl_inter=intercept))
    assert read_image(path).values.dtype == np.int16


def test_nifti_takes_the_sform_before_the_qform(tmp_path: Path) -> None:
    affine = np.diag([0.8, 0.7, 2.5, 1.0])
    affine[:3, :3] = rotation(10, 0, 0) @ affine[:3, :3]
    written = nib.Nifti1Image(small_values().T, affine)
    written.set_qform(np.diag([0.8, 0.7, 2.5, 1.0]), 1)
    for code, expected in ((2, affine), (0, np.diag([0.8, 0.7, 2.5, 1.0]))):
        written.set_sform(affine, code)
        nib.save(written, tmp_path / "a.nii")
        image = read_image(tmp_path / "a.nii")
        ras = (image.direction * image.spacing_mm)[::-1, ::-1] * [[-1], [-1], [1]]
        np.testing.assert_allclose(ras, expected[:3, :3], atol=1e-6)


def test_nifti_of_four_axes_with_one_frame_and_with_extensions(tmp_path: Path) -> None:
    written = nib.Nifti1Image(small_values().T[..., None], np.diag([-0.8, -0.7, 2.5, 1]))
    written.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    nib.save(written, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").values, small_values())


def test_nrrd_spaces_and_skipped_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    for space in ("RAS", "LAS", "LPS", "right-anterior-superior", "left-anterior-superior"):
        path.write_bytes(nrrd(space=space))
        assert_equals_simpleitk(read_image(path), path)
    path.write_bytes(
        nrrd(space=None, space_directions=None, space_origin=None, spacings="0.8 0.7 2.5")
    )
    assert_equals_simpleitk(read_image(path), path)
    path.write_bytes(nrrd(b"head" + small_values().tobytes(), byteskip="4"))
    np.testing.assert_array_equal(read_image(path).values, small_values())
    path.write_bytes(nrrd(b"head" + small_values().tobytes(), byte_skip="-1"))
    np.testing.assert_array_equal(read_image(path).values, small_values())
    path.write_bytes(nrrd().replace(b"\n", b"\r\n", 12))
    np.testing.assert_array_equal(read_image(path).values, small_values())


@pytest.mark.parametrize(
    "fields",
    [
        {"ElementSpacing": None, "ElementSize": "0.8 0.7 2.5"},
        {"Offset": None, "Position": "-140 -120 -300"},
        {"Offset": None, "Origin": "-140 -120 -300"},
        {"TransformMatrix": None, "Rotation": "0 1 0 1 0 0 0 0 1"},
        {"TransformMatrix": None, "Orientation": "0 0 -1 1 0 0 0 -1 0"},
        {"TransformMatrix": None, "BinaryData": None, "ObjectType": None},
        {"HeaderSize": "7", "ElementDataFile": "b.raw"},
        {"HeaderSize": "-1", "ElementDataFile": "b.raw"},
    ],
)
def test_metaimage_fields_equal_simpleitk(tmp_path: Path, fields: dict[str, str | None]) -> None:
    path = tmp_path / "a.mhd"
    (tmp_path / "b.raw").write_bytes(b"1234567" + small_values().tobytes())
    path.write_bytes(metaimage(**fields))
    image = read_image(path)
    np.testing.assert_array_equal(image.values, small_values())
    assert_equals_simpleitk(image, path)


HU_FILES = {
    "crop_ct_2slices.nrrd",
    "ct-64.nrrd",
    "3DCT_lung_baseline_small.mha",
    "DataCropped.mha",
    "PartSolidLesionCropped.mha",
    "example_ct.nii.gz",
    "example_ct_sm.nii.gz",
}
LABEL_FILES = {
    "lm-64.nrrd",
    "wholeLung-64.nrrd",
    "PartSolidLesionCroppedManualInitialization1.mha",
    "example_seg.nii.gz",
    "example_seg_fast.nii.gz",
}


def test_real_files_equal_simpleitk(real_data: Path) -> None:
    folders = [real_data / "small-volumes", real_data / "luna16-style"]
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    seen = set()
    for path in paths:
        if not path.name.endswith(IMAGE_SUFFIXES):
            continue
        image = read_image(path)
        assert_equals_simpleitk(image, path)
        if path.name in LABEL_FILES:
            with pytest.raises(UnreadableCase) as refusal:
                volume_of(image, "hu")
            assert refusal.value.rule == "not-hu"
        else:
            volume = volume_of(image, "hu")
            expected = np.where(image.values <= -2000, AIR_HU, image.values)
            np.testing.assert_array_equal(volume.hu, expected)
        seen.add("luna16" if path.suffix == ".mhd" else path.name)
    assert seen == HU_FILES | LABEL_FILES | {"luna16"}


def test_real_labels_fit_their_ct_or_are_refused(real_data: Path) -> None:
    folder = real_data / "small-volumes"
    for ct, labels, largest in (
        ("totalsegmentator/example_ct_sm.nii.gz", "totalsegmentator/example_seg.nii.gz", 117),
        ("chest-imaging-platform/ct-64.nrrd", "chest-imaging-platform/lm-64.nrrd", 782),
    ):
        volume = volume_of(read_image(folder / ct), "hu")
        found = labels_of(read_image(folder / labels), volume)
        assert found.max() == largest
        assert found.dtype == (np.uint8 if largest < 256 else np.uint16)
    # Its seeds were drawn on a grid that points the other way.
    lesion = folder / "lesion-sizing-toolkit"
    volume = volume_of(read_image(lesion / "PartSolidLesionCropped.mha"), "hu")
    seeds = read_image(lesion / "PartSolidLesionCroppedManualInitialization1.mha")
    with pytest.raises(UnreadableCase, match=r"CT \(direction differs by up to"):
        labels_of(seeds, volume)


def an_image(values: NDArray[Any], direction: NDArray[np.float64] | None = None) -> Image:
    return Image(values, SPACING_MM, ORIGIN_MM, np.eye(3) if direction is None else direction)


def test_hounsfield_units_are_rounded_and_padding_becomes_air() -> None:
    values = small_values("f8") + 0.4
    values[0, 0, :2] = -3024, -2000.4
    volume = volume_of(an_image(values), "hu")
    assert volume.hu.dtype == np.int16
    assert (volume.hu[0, 0, :2] == AIR_HU).all()
    np.testing.assert_array_equal(volume.hu[1:], small_values()[1:])


def scaled(low: float, high: float, dtype: str) -> NDArray[Any]:
    return np.linspace(low, high, 60).reshape(SHAPE).astype(dtype)


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("not-hu", scaled(0, 255, "u1")),
        ("not-hu", scaled(0, 1, "f4")),
        ("not-hu", scaled(-1, 1, "f8")),
        ("not-hu", scaled(-3, 9, "f4")),
        ("not-hu", scaled(-128, 127, "i1")),
        ("not-hu", scaled(0, 4095, "i2")),
        ("not-hu", scaled(-1000, -500, "i2")),
        ("not-hu", scaled(-3000, -2500, "i2")),
        ("hu-range", scaled(-1000, 40000, "i4")),
        ("hu-range", scaled(-1e30, 0, "f4")),
    ],
)
def test_what_is_no_ct_is_refused_or_relative(rule: str, values: NDArray[Any]) -> None:
    with pytest.raises(UnreadableCase) as refusal:
        volume_of(an_image(values), "hu")
    assert refusal.value.rule == rule
    volume = volume_of(an_image(values), "relative")
    assert (int(volume.hu.min()), int(volume.hu.max())) == RELATIVE_RANGE
    assert (np.diff(volume.hu.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("dtype", ["u1", "i8", "u8", "f4", "f8"])
def test_relative_uses_the_whole_range_of_any_type(dtype: str) -> None:
    limits: Any = np.finfo(dtype) if dtype[0] == "f" else np.iinfo(dtype)
    values = np.zeros(SHAPE, dtype)
    values[0, 0, 0], values[-1, -1, -1] = limits.min, limits.max
    hu = volume_of(an_image(values), "relative").hu
    assert (hu[0, 0, 0], hu[-1, -1, -1]) == RELATIVE_RANGE


def test_eight_and_twelve_bit_greys_stay_apart_when_relative() -> None:
    for count in (256, 4096):
        values = np.arange(count).reshape(4, 4, -1)
        assert len(np.unique(volume_of(an_image(values), "relative").hu)) == count
    with pytest.raises(UnreadableCase, match="all voxels are 3"):
        volume_of(an_image(np.full(SHAPE, 3)), "relative")


def test_a_volume_has_its_axes_in_order_whatever_the_file_has(tmp_path: Path) -> None:
    values = small_values()
    axial = Image(values, SPACING_MM, ORIGIN_MM, rotation(4, 5, 6))
    expected = volume_of(axial, "hu")
    for order in ((1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)):
        spacing = tuple(SPACING_MM[axis] for axis in order)
        direction = axial.direction[:, order]
        image = Image(values.transpose(order), spacing, ORIGIN_MM, direction)  # type: ignore[arg-type]
        volume = volume_of(image, "hu")
        np.testing.assert_array_equal(volume.hu, expected.hu)
        np.testing.assert_array_equal(volume.direction, expected.direction)
        assert volume.spacing_mm == expected.spacing_mm
        np.testing.assert_array_equal(labels_of(Image(*_ones(image)), volume), np.ones(SHAPE))
    with pytest.raises(UnreadableCase, match="oblique") as refusal:
        volume_of(an_image(values, rotation(0, 0, 40)), "hu")
    assert refusal.value.rule == "not-axial"


def _ones(image: Image) -> tuple[Any, ...]:
    return np.ones_like(image.values), image.spacing_mm, image.origin_mm, image.direction


def test_labels_keep_their_values_in_the_smallest_type() -> None:
    grid = volume_of(an_image(small_values()), "hu")
    for dtype, highest, expected in (("f4", 255, np.uint8), ("i8", 65535, np.uint16)):
        values = np.zeros(SHAPE, dtype)
        values[1, 2, 3] = highest
        labels = labels_of(an_image(values), grid)
        assert labels.dtype == expected
        assert labels[1, 2, 3] == highest == labels.sum()
    for bad in (0.5, -1, 65536):
        with pytest.raises(UnreadableCase, match="whole numbers") as refusal:
            labels_of(an_image(np.full(SHAPE, bad)), grid)
        assert refusal.value.rule == "labels-values"


@pytest.mark.parametrize(
    ("differs", "edit"),
    [
        (r"shape \(3, 3, 5\)", lambda image: {"values": image.values[1:]}),
        ("spacing differs by up to 0.32", lambda image: {"spacing_mm": (2.7, 0.7, 0.8)}),
        ("origin differs by up to 1.43", lambda image: {"origin_mm": (-300.0, -121.0, -140.0)}),
        ("direction differs", lambda image: {"direction": rotation(0, 0, 3)}),
        ("direction differs", lambda image: {"direction": np.diag([1.0, -1.0, 1.0])}),
    ],
)
def test_labels_on_another_grid_are_refused(
    differs: str, edit: Callable[[Image], dict[str, Any]]
) -> None:
    grid = volume_of(an_image(small_values()), "hu")
    fitting = an_image(np.zeros(SHAPE, np.uint8))
    labels_of(fitting, grid)
    with pytest.raises(UnreadableCase, match=differs) as refusal:
        labels_of(Image(**(vars(fitting) | edit(fitting))), grid)
    assert refusal.value.rule == "labels-misfit"
    assert refusal.value.reason.count("differs") <= 1


def test_labels_may_differ_by_rounding() -> None:
    grid = volume_of(an_image(small_values(), rotation(1, 2, 3)), "hu")
    rounded = Image(
        np.zeros(SHAPE, np.uint8),
        tuple(np.float32(mm) for mm in SPACING_MM),  # type: ignore[arg-type]
        tuple(mm + 1e-4 for mm in ORIGIN_MM),  # type: ignore[arg-type]
        rotation(1, 2, 3).round(5),
    )
    labels_of(rounded, grid)
