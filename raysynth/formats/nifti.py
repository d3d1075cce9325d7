"""NIfTI-1 and NIfTI-2 in one file (.nii, .nii.gz). Only here positions are RAS, as it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import nibabel.nifti1
import nibabel.nifti2
import numpy as np
from numpy.typing import NDArray

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom_file import require
from raysynth.formats.image_file import (
    MAX_HEADER_BYTES,
    Grid,
    Image,
    Stream,
    check_grid,
    check_shape,
    open_file,
    read_values,
)

_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
"""numpy's names of the standard's data types; not binary, complex, colour or 128 bits."""

_UNKNOWN_UNIT, _MILLIMETRE = 0, 2

_Header = nibabel.nifti1.Nifti1Header


def read_nifti(path: Path) -> Image:
    """Reads one 3D NIfTI file, or a 4D one with a single frame; compression shows in its bytes.

    Values are stored value x scl_slope + scl_inter, where the header gives them: then float32, or
    float64 if the file stores integers of over 16 bits or float64.

    The sform tells the place of voxels where there is one, else the qform. A file with neither is
    refused: readers guess, and differ (SimpleITK and nibabel in which end of y is the front).

    Raises:
        UnreadableCase: the file breaks a rule.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        stream = _unpacked(file)
        header, order = _read_header(stream)
        stored = _stored_type(header, order)
        shape = check_shape(_sizes(header), stored)
        slope, intercept = _scale(header)
        with np.errstate(all="ignore"):  # odd numbers are found where they would do harm
            grid = _grid(header)
        values = read_values(stream, shape, stored)
    if (slope, intercept) != (1, 0):
        values = _rescaled(values, slope, intercept)
    return Image(values, *grid)


def nifti_shape(path: Path) -> tuple[int, int, int]:
    """The shape (z, y, x) that a file's header tells of, without its values.

    Raises:
        UnreadableCase: the file breaks a rule.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        header, order = _read_header(_unpacked(file))
        return check_shape(_sizes(header), _stored_type(header, order))


def _unpacked(file: BinaryIO) -> Stream:
    """A file's bytes, inflated where its first ones say that they are packed."""
    is_packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return Stream(file, 31 if is_packed else None)


def _read_header(stream: Stream) -> tuple[_Header, str]:
    """The fixed header and its byte order; leaves the stream where the values start."""
    start = stream.read(4)
    size, order = next(
        (
            (size, order)
            for size in (348, 540)
            for order in "<>"
            if np.array(size, f"{order}i4").tobytes() == start
        ),
        (0, ""),
    )
    require(size > 0, "not-nifti", "the file does not start like NIfTI")
    raw = start + stream.read(size - 4)
    require(len(raw) == size, "not-nifti", "the file ends within its header")
    magic = raw[344:348] if size == 348 else raw[4:12]
    require(
        magic in (b"n+1\0", b"n+2\0\r\n\x1a\n"),
        "not-nifti",
        "no single-file NIfTI: convert ANALYZE and .hdr/.img pairs to .nii",
    )
    kind = _Header if size == 348 else nibabel.nifti2.Nifti2Header
    # Unchecked: nibabel's checks log what they find, and repair it.
    header = kind(raw, order, check=False)
    offset = float(header["vox_offset"])
    require(
        size <= offset <= MAX_HEADER_BYTES and offset.is_integer(),
        "bad-field",
        f"vox_offset {offset:g}; values start at {size} to {MAX_HEADER_BYTES} bytes",
    )
    extensions = int(offset) - size
    require(
        len(stream.read(extensions)) == extensions, "pixel-data", "the file ends before its values"
    )
    return header, order


def _stored_type(header: _Header, order: str) -> np.dtype[Any]:
    code = int(header["datatype"])
    require(
        code in _TYPES,
        "pixel-format",
        f"datatype {code}: only integers and floats of up to 64 bits can be read",
    )
    return np.dtype(order + _TYPES[code])


def _sizes(header: _Header) -> list[int]:
    axes, *sizes = (int(size) for size in header["dim"])
    require(
        axes == 3 or (axes == 4 and sizes[3] == 1),
        "shape",
        f"{axes} axes; an image needs three, or four with a single frame",
    )
    return sizes[:3]


def _scale(header: _Header) -> tuple[float, float]:
    """Slope and intercept of the values; a slope of 0 or NaN means that there are none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    require(
        bool(np.isfinite([slope, intercept]).all()),
        "rescale",
        f"scl_slope {slope:g} and scl_inter {intercept:g} are not finite",
    )
    return slope, intercept


def _grid(header: _Header) -> Grid:
    unit = int(header["xyzt_units"]) & 7
    require(
        unit in (_UNKNOWN_UNIT, _MILLIMETRE), "units", f"lengths in unit {unit}: millimetres needed"
    )
    pixdim = header["pixdim"]
    # As the standard's own code has it: any sign but minus means plus.
    pixdim[0] = -1 if pixdim[0] < 0 else 1
    try:
        affine, code = header.get_sform(coded=True)
        is_sform = affine is not None
        if not is_sform:
            affine, code = header.get_qform(coded=True)
    except Exception as error:  # nibabel may raise anything; its text could quote the file
        raise UnreadableCase(
            "orientation", f"the qform is no rotation with sizes ({type(error).__name__})"
        ) from None
    require(
        affine is not None and code > 0,
        "orientation",
        "neither sform nor qform: its sides are unknown, for readers differ; set one of them",
    )
    lps = np.array(affine, dtype=np.float64)
    lps[:2] *= -1  # RAS has x and y the other way round
    grid = check_grid(lps[:3, :3], lps[:3, 3])
    if is_sform:
        # The standard lets pixdim differ, but then readers differ in the size of everything.
        told = np.abs(pixdim[3:0:-1].astype(np.float64))
        require(
            bool((np.abs(told - grid[0]) <= 0.01 * np.array(grid[0])).all()),
            "mixed-spacing",
            f"pixdim says {told.tolist()} mm, the sform {list(grid[0])} mm: correct one of them",
        )
    return grid


def _rescaled(values: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """The narrowest floats that hold the stored values, computed in float64 plane by plane."""
    rescaled = np.empty(values.shape, np.result_type(values.dtype, np.float32))
    # What overflows is found with all else that is not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        for plane, stored in zip(rescaled, values, strict=True):
            plane[...] = stored * np.float64(slope) + intercept
    return rescaled
