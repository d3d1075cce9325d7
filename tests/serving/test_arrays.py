"""Arrays that come from strangers."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from imagecodecs import png_encode

from raysynth.errors import InputError
from raysynth.export.verify import verify
from raysynth.serving.answers import packed_sample
from raysynth.serving.arrays import MAX_VOXELS, NIFTI, NPZ, PNG, nifti_of, read_array


def npz(**arrays: np.ndarray) -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


def test_round_trips_keep_every_voxel() -> None:
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    sent = read_array(nifti_of(hu, (2.0, 0.5), False), NIFTI)
    np.testing.assert_array_equal(sent.values, hu)
    assert sent.spacing_mm == pytest.approx((2.0, 0.5, 0.5))
    np.testing.assert_array_equal(read_array(npz(array=hu), NPZ).values, hu)
    grey = rng.integers(0, 9, (6, 7)).astype(np.uint8)
    np.testing.assert_array_equal(read_array(png_encode(grey), PNG).values, grey)


def test_axes_of_any_direction_are_turned() -> None:
    hu = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    turned = nibabel.Nifti1Image(hu[:, :, ::-1].T, np.diag([1.0, -1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(read_array(turned.to_bytes(), NIFTI).values, hu)
    oblique = np.eye(4)
    oblique[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.raises(InputError, match="oblique"):
        read_array(nibabel.Nifti1Image(hu.T, oblique).to_bytes(), NIFTI)


def bomb(shape: tuple[int, ...], content: int) -> bytes:
    """An NPZ whose header promises a shape, and that unpacks to `content` zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": shape, "fortran_order": False, "descr": "<i2"}
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("array.npy", header.getvalue() + bytes(content))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("body", "media", "message"),
    [
        (bomb((4096, 4096, 4096), 10), NPZ, "values at most"),
        (bomb((4, 4), 50_000_000), NPZ, "more or less"),
        (bomb((400, 400), 10), NPZ, "more or less"),
        (npz(other=np.zeros((2, 2))), NPZ, "an array named array"),
        (npz(array=np.zeros((2, 2), complex)), NPZ, "give numbers"),
        (npz(array=np.zeros(3)), NPZ, "two or three axes"),
        (npz(array=np.zeros((2, 2)))[:-30], NPZ, "damaged"),
        (npz(array=np.array([[{}]], object)), NPZ, "of object"),
        (png_encode(np.zeros((4, 4, 3), np.uint8)), PNG, "without colour"),
        (png_encode(np.zeros((4, 4), np.uint8))[:50], PNG, "damaged"),
        (gzip.compress(bytes(400)), NIFTI, "cannot be read"),
    ],
    # The bodies hold the time at which they were packed: two processes would name them apart.
    ids=range(11),
)
def test_the_hostile_and_the_broken_are_refused(body: bytes, media: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_array(body, media)


def test_a_small_nifti_of_a_large_volume_is_refused_unread() -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1024, 1024, 1 + MAX_VOXELS // 1024**2))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    packed = gzip.compress(header.binaryblock + bytes(10_000))
    with pytest.raises(InputError, match="values at most"):
        read_array(packed, NIFTI)


ABOUT = {
    "seed": 3,
    "bundle": "b" * 64,
    "window_hu": (-1000, 400),
    "depth_mm": 2.0,
    "pixel_mm": 0.5,
    "copied_fraction": 0.0,
}


@pytest.mark.parametrize(("media", "ending"), [(PNG, "png"), (NPZ, "npz"), (NIFTI, "nii.gz")])
def test_what_is_sent_carries_its_passport(media: str, ending: str, tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (8, 9)).astype(np.int16)
    for kind, verdict in ((True, "valid"), (False, "unmarked")):
        answer = packed_sample(media, hu, ABOUT | {"synthetic": kind})
        (tmp_path / f"sample.{ending}").write_bytes(bytes(answer.body))
        (found,) = verify(tmp_path / f"sample.{ending}")
        assert found.verdict == verdict
