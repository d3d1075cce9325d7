"""Arrays that clients send and get: PNG, NPZ and NIfTI, read as if an enemy had written them."""

from __future__ import annotations

import gzip
import io
import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from imagecodecs import png_check, png_decode, png_encode
from numpy.typing import NDArray

from raysynth.errors import InputError, UnreadableCase
from raysynth.export.dicom import write_dicom
from raysynth.export.nifti import nifti_affine, nifti_image
from raysynth.export.passport import Passport, sealed, voxel_hash
from raysynth.export.png import in_window, png_bytes
from raysynth.formats.image import read_image
from raysynth.formats.nifti import nifti_shape
from raysynth.volume import Volume

Media = Literal["image/png", "application/x-npz", "application/x-nifti", "application/zip"]
PNG: Media = "image/png"
NPZ: Media = "application/x-npz"
NIFTI: Media = "application/x-nifti"
DICOM: Media = "application/zip"
"""A series, packed into one file; it is sent, and not taken."""

MAX_VOXELS = 512**3
"""Of an array that is sent."""

PNG_HEADER_BYTES = 33
"""Signature and first chunk of a PNG: its size stands there."""

ARRAY = "array"
"""Its name in an NPZ that is sent."""

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    ValueError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)
_MAX_SLOPE = 1e-3
"""Of axes against the patient's: more is oblique."""


class Sent:
    """An array that a client sent.

    Attributes:
        values: whole numbers or floats, (y, x) or (z, y, x).
        spacing_mm: along each axis, if the file tells.
    """

    def __init__(self, values: NDArray[Any], spacing_mm: Sequence[float] | None = None) -> None:
        self.values = values
        self.spacing_mm = None if spacing_mm is None else tuple(float(one) for one in spacing_mm)


def read_array(packed: bytes, media: str) -> Sent:
    """What a body holds; its size is looked at before it is decoded, and nothing is unpickled.

    Args:
        packed: the body.
        media: its content type.

    Raises:
        InputError: it is not what it says, damaged, or too large.
    """
    match media.partition(";")[0].strip().lower():
        case "image/png":
            return Sent(_read_png(packed))
        case "application/x-npz":
            values = read_arrays(packed, {ARRAY: True})[ARRAY]
            assert values is not None
            _check_size(values.shape)
            return Sent(values)
        case "application/x-nifti" | "application/gzip" | "application/x-gzip":
            return _read_nifti(packed)
    raise InputError(f"content-type {media[:60]}: give {PNG}, {NPZ} or {NIFTI}")


def _check_size(shape: Sequence[int]) -> None:
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise InputError(
            f"body: an array of shape {tuple(shape)}; give two or three axes and {MAX_VOXELS:,} "
            "values at most"
        )


def _read_png(packed: bytes) -> NDArray[Any]:
    if len(packed) < PNG_HEADER_BYTES or not png_check(packed):
        raise InputError("body: this is no PNG")
    width, height = (int.from_bytes(packed[at : at + 4], "big") for at in (16, 20))
    _check_size((height, width))
    try:
        labels: NDArray[Any] = png_decode(packed)
    except Exception as error:  # whatever the decoder finds
        raise InputError("body: this PNG is damaged") from error
    if labels.shape != (height, width):
        raise InputError("body: give a grey PNG, without colour or alpha")
    return labels


def read_arrays(packed: bytes, wanted: dict[str, bool]) -> dict[str, NDArray[Any] | None]:
    """Arrays of numbers out of an NPZ, each read no further than its header promises.

    Args:
        packed: the file.
        wanted: names, and whether each must be there.

    Raises:
        InputError: it is damaged, too large, or lacks one.
    """
    found: dict[str, NDArray[Any] | None] = dict.fromkeys(wanted)
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = {one.filename for one in archive.infolist()}
            for name, is_needed in wanted.items():
                if f"{name}.npy" in members:
                    with archive.open(f"{name}.npy") as file:
                        found[name] = _read_npy(file, name)
                elif is_needed:
                    raise InputError(f"body: give an NPZ with an array named {name}")
    except _DAMAGED as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"body: this NPZ is damaged ({error})") from error
    return found


def _read_npy(file: IO[bytes], name: str) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if len(shape) > 4 or math.prod(shape) > MAX_VOXELS:
        raise InputError(f"body: {name} of shape {shape}; give {MAX_VOXELS:,} values at most")
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or (is_fortran and len(shape) > 1):
        raise InputError(f"body: {name} of {dtype}; give numbers in C order")
    count = math.prod(shape) * dtype.itemsize
    content = file.read(count + 1)
    if len(content) != count:
        raise InputError("body: this NPZ holds more or less than its header says")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read_nifti(packed: bytes) -> Sent:
    """A volume whose axes run along the patient's, turned into their order."""
    suffix = ".nii.gz" if packed[:2] == b"\x1f\x8b" else ".nii"
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(packed)
        file.flush()
        try:
            _check_size(nifti_shape(Path(file.name)))
            image = read_image(Path(file.name))
        except (UnreadableCase, OSError) as error:
            raise InputError(f"body: this NIfTI cannot be read: {error}") from error
    axes = np.diagonal(image.direction)
    if (np.abs(np.abs(axes) - 1) > _MAX_SLOPE).any():
        raise InputError("body: the axes of this NIfTI are oblique or not z, y, x: resample it")
    order = tuple(slice(None, None, -1 if axis < 0 else 1) for axis in axes)
    values = image.values[order]
    return Sent(values[0] if len(values) == 1 else values, image.spacing_mm)


def packed_array(values: NDArray[Any]) -> bytes:
    """An array as `read_array` takes it."""
    packed = io.BytesIO()
    np.savez_compressed(packed, array=values)
    return packed.getvalue()


def npz_of(hu: NDArray[np.int16], facts: dict[str, object], **more: NDArray[Any]) -> bytes:
    """A sample in HU with what is known of it, as NumPy reads it."""
    packed = io.BytesIO()
    arrays: dict[str, Any] = {"hu": hu, "facts": np.array(json.dumps(facts)), **more}
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


def of_npz(packed: bytes) -> tuple[NDArray[np.int16], dict[str, Any]]:
    """What `npz_of` made."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return arrays["hu"], json.loads(str(arrays["facts"]))


def png_of(
    hu: NDArray[np.int16], window_hu: tuple[float, float], passport: Passport | None = None
) -> bytes:
    """A slice as a grey PNG of 8 bits; of a volume the middle plane.

    Args:
        hu: the sample.
        window_hu: HU of black and white.
        passport: of a synthetic one; the file carries it.
    """
    grey = in_window(hu[len(hu) // 2] if hu.ndim == 3 else hu, window_hu)
    if passport is None:
        return bytes(png_encode(grey))
    return png_bytes(grey, sealed(passport, "preview", grey))


def nifti_of(
    hu: NDArray[np.int16],
    spacing_mm: tuple[float, float],
    is_mixed: bool | None,
    passport: Passport | None = None,
) -> bytes:
    """A sample as gzipped NIfTI-1, as exports have it.

    Args:
        hu: a volume (z, y, x), or a slice.
        spacing_mm: between planes, and of a pixel.
        is_mixed: whether part of it was copied from a real scan; None: all of it.
        passport: of a synthetic one; the file carries it.
    """
    own = None
    if passport is not None:
        own = sealed(passport, "image", hu, nifti_affine(spacing_mm).ravel().tolist())
    image = nifti_image(hu, spacing_mm, is_mixed, own)
    return gzip.compress(image.to_bytes(), 3)


def dicom_of(hu: NDArray[np.int16], spacing_mm: tuple[float, float], passport: Passport) -> bytes:
    """A synthetic sample as a DICOM series in a ZIP.

    Args:
        hu: a volume (z, y, x), or a slice.
        spacing_mm: between planes, and of a pixel.
        passport: of the sample.
    """
    depth_mm, pixel_mm = spacing_mm
    # What a series is known by: another request of the same seed is another patient.
    own = passport | {
        "run": passport["model"],
        "row": passport["seed"],
        "sample": voxel_hash(hu),
        "contains_real_pixels": passport["copied_fraction"] > 0,
        "passport": {"software": f"raysynth {passport['raysynth']}"},
    }
    volume = Volume(hu if hu.ndim == 3 else hu[None], (depth_mm, pixel_mm, pixel_mm))
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w") as archive:
        for path in write_dicom(Path(folder), volume, None, own):
            member = zipfile.ZipInfo(path.name)
            archive.writestr(member, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return packed.getvalue()
