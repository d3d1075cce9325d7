"""What the readers of NIfTI, NRRD and MetaImage share: safe files, bounded streams, checked grids.

Every file is taken to be hostile. Sizes are capped before anything is allocated, a compressed
stream yields no more than its header promises, data files lie beside their header, and messages
carry rules and numbers, never text out of a file.
"""

from __future__ import annotations

import errno
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom import MAX_VOXELS
from raysynth.formats.dicom_file import open_regular, require
from raysynth.formats.dicom_slice import MAX_ORIGIN_MM, MAX_SIDE, SPACING_RANGE_MM
from raysynth.volume import Triple

MAX_HEADER_BYTES = 1 << 20
"""Header with comments and extensions; scanners' own notes take kilobytes."""

MAX_HEADER_LINES = 1 << 14
"""Slicer writes some ten lines a segment, and there are bodies of a hundred segments."""

MAX_DATA_BYTES = 1 << 31
"""Values of one image, unpacked: 512 x 512 x 1000 voxels of the widest type, float64."""

MAX_FILE_BYTES = MAX_DATA_BYTES + 16 * MAX_HEADER_BYTES
"""Packing what cannot be packed adds a little to it."""

_PIECE_BYTES = 1 << 16
_MAX_DEFLATE_RATIO = 1032
"""A deflate stream cannot unpack to more than this many times its size."""

Grid = tuple[Triple, Triple, NDArray[np.float64]]
"""spacing_mm, origin_mm and direction, as in `Image`."""


@dataclass(frozen=True)
class Image:
    """Values of one 3D image file of whatever meaning, and where they lie in the patient.

    Geometry follows `raysynth.volume.Volume`: (z, y, x) order, LPS frame, and the centre of voxel
    `index` at `origin_mm + direction @ (index * spacing_mm)`. The array axes are those of the
    file, slowest first; usually, but not always, they run along z, y and x of the patient.

    Attributes:
        values: any integer or floating type, native byte order, finite; shape (z, y, x).
        spacing_mm: distance of neighbouring voxel centres along each array axis.
        origin_mm: position of the centre of voxel (0, 0, 0).
        direction: 3x3 matrix; column k is the unit vector of array axis k.
    """

    values: NDArray[Any]
    spacing_mm: Triple
    origin_mm: Triple
    direction: NDArray[np.float64]


class Stream:
    """The bytes of an open file from its present position, as they are or inflated.

    Args:
        wbits: zlib's name of the compression: 31 gzip, 47 gzip or zlib; None if there is none.
    """

    def __init__(self, file: BinaryIO, wbits: int | None = None) -> None:
        self._file = file
        self._inflater = None if wbits is None else zlib.decompressobj(wbits)
        self._packed = b""
        stored = os.fstat(file.fileno()).st_size - file.tell()
        self.most_bytes = stored if wbits is None else stored * _MAX_DEFLATE_RATIO
        """No more than these can follow."""

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer if the stream ends before. For headers: see `fill`."""
        buffer = bytearray(count)
        return bytes(buffer[: self.fill(memoryview(buffer))])

    def fill(self, view: memoryview) -> int:
        """Reads into the whole of `view`, and returns how many bytes there were."""
        filled = 0
        while filled < len(view):
            piece = self._piece(min(len(view) - filled, _PIECE_BYTES))
            if not piece:
                break
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled

    def require_end(self) -> None:
        """Checks that nothing follows, and of a compressed stream that its checksum fits."""
        require(
            not self._piece(1) and not self._packed and not self._file.read(1),
            "pixel-data",
            "more data than the header promises: is it the header of another image?",
        )

    def _piece(self, most: int) -> bytes:
        """One to `most` bytes, or none at the end."""
        if self._inflater is None:
            return self._file.read(most)
        while not self._inflater.eof:
            packed = self._packed or self._file.read(_PIECE_BYTES)
            try:
                piece = self._inflater.decompress(packed, most)
            except zlib.error:
                raise UnreadableCase(
                    "pixel-data", "the compressed data are damaged: copy the file again"
                ) from None
            # At the end of the stream, what is left over belongs to nobody.
            self._packed = self._inflater.unconsumed_tail or self._inflater.unused_data
            if piece:
                return piece
            require(
                bool(packed) or self._inflater.eof,
                "pixel-data",
                "the compressed data are cut: copy the file again",
            )
        return b""


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file to read; a link is followed, for the caller named it.

    Raises:
        OSError: it cannot be opened.
        UnreadableCase: it is a pipe, a device or a folder.
    """
    return open_regular(path, MAX_FILE_BYTES)


def open_beside(header: Path, name: str) -> BinaryIO:
    """Opens the data file that a header names, which must lie in the header's own folder.

    Raises:
        UnreadableCase: the name leads elsewhere, or no such file can be read.
    """
    plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    require(plain, "data-file", "the header names no plain file beside it, but a path or nothing")
    require(
        "%" not in name and name.upper().split()[0] != "LIST",
        "data-file",
        "the data lie in several files: store the image in one",
    )
    try:
        # Links are not followed at all: what they point to may lie anywhere.
        return open_regular(header.parent / name, MAX_FILE_BYTES, os.O_NOFOLLOW)
    except OSError as error:
        is_link = error.errno == errno.ELOOP
        why = "it is a link; put the file itself there" if is_link else error.strerror
        raise UnreadableCase(
            "data-file", f"the data file beside the header cannot be read: {why}"
        ) from None


def header_lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a text header, without their ends; the caller stops at the last.

    File names come back from the text to their bytes; all else that is not ASCII fits no value.
    """
    bytes_left = MAX_HEADER_BYTES
    for _ in range(MAX_HEADER_LINES):
        line = file.readline(bytes_left + 1)
        bytes_left -= len(line)
        if not line or bytes_left < 0:
            break
        yield line.decode("utf-8", "surrogateescape").strip()
    require(
        not line,
        "header-size",
        f"a header of over {MAX_HEADER_LINES} lines or {MAX_HEADER_BYTES} bytes",
    )


def field_text(fields: Mapping[str, str], name: str) -> str:
    """The text of a header field that must be there."""
    require(name in fields, "missing-field", f"the field `{name}` is missing")
    return fields[name]


def parse_numbers(text: str, name: str, count: int) -> NDArray[np.float64]:
    """`count` numbers, separated by spaces, of the header field `name`; none beyond 1e15."""
    try:
        numbers = np.array([float(word) for word in text.split(maxsplit=count)])
    except ValueError:
        numbers = np.array([])
    require(
        len(numbers) == count and bool((np.abs(numbers) <= 1e15).all()),
        "bad-field",
        f"{name} must be {count} finite number(s)",
    )
    return numbers


def parse_whole(text: str, name: str, count: int) -> list[int]:
    """`count` whole numbers of the header field `name`."""
    numbers = parse_numbers(text, name, count)
    require(
        bool((numbers == np.rint(numbers)).all()),
        "bad-field",
        f"{name} must be {count} whole number(s)",
    )
    return [int(number) for number in numbers]


def check_shape(sizes: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """The array's shape (z, y, x), if an image of that many voxels (fastest first) can be read."""
    require(len(sizes) == 3, "shape", f"an image of {len(sizes)} axes; three are needed")
    x, y, z = sizes
    require(
        min(sizes) >= 1 and max(sizes) <= MAX_SIDE,
        "size",
        f"{z} x {y} x {x} voxels; 1 to {MAX_SIDE} a side can be read",
    )
    voxels = z * y * x
    require(
        voxels <= MAX_VOXELS and voxels * dtype.itemsize <= MAX_DATA_BYTES,
        "size",
        f"{voxels} voxels of {dtype.itemsize} bytes; at most {MAX_VOXELS} voxels and "
        f"{MAX_DATA_BYTES} bytes can be read",
    )
    return z, y, x


def check_grid(steps_mm: NDArray[np.float64], origin_mm: NDArray[np.float64]) -> Grid:
    """Spacing, origin and direction as arrays have them, from vectors as files have them.

    Args:
        steps_mm: 3x3; column k is the way from a voxel to the next along file axis k (fastest
            first), in LPS millimetres (x, y, z).
        origin_mm: centre of the first voxel, in LPS millimetres (x, y, z).
    """
    require(
        bool(np.isfinite(steps_mm).all() and np.isfinite(origin_mm).all()),
        "bad-field",
        "the grid's position or axes are not finite numbers",
    )
    low, high = SPACING_RANGE_MM
    # Entries first: the length of a huge vector would overflow.
    largest = float(np.abs(steps_mm).max())
    spacing_mm = np.linalg.norm(steps_mm, axis=0) if largest <= high else np.array([largest])
    require(
        low <= spacing_mm.min() and spacing_mm.max() <= high,
        "spacing",
        f"voxels {spacing_mm.min():.4g} to {spacing_mm.max():.4g} mm apart; "
        f"{low:g} to {high:g} mm can be read",
    )
    farthest = float(np.abs(origin_mm).max())
    require(
        farthest <= MAX_ORIGIN_MM,
        "origin",
        f"an origin {farthest:.4g} mm away; {MAX_ORIGIN_MM:g} mm at most can be read",
    )
    direction = steps_mm / spacing_mm
    skew = float(np.abs(direction.T @ direction - np.eye(3)).max())
    require(
        skew < 1e-3,
        "shear",
        f"the axes are not perpendicular (cosine {skew:.3g}): resample onto a plain grid first",
    )
    # From (x, y, z) in rows and columns to (z, y, x).
    return _triple(spacing_mm[::-1]), _triple(origin_mm[::-1]), direction[::-1, ::-1].copy()


def read_values(stream: Stream, shape: tuple[int, int, int], stored: np.dtype[Any]) -> NDArray[Any]:
    """All that is left in a stream, as values of native byte order; shape (z, y, x)."""
    promised = math.prod(shape) * stored.itemsize
    require(
        promised <= stream.most_bytes,
        "pixel-data",
        f"the header promises {promised} bytes of values, which the file cannot hold: is it cut?",
    )
    values = np.empty(shape, stored)
    filled = stream.fill(values.reshape(-1).view(np.uint8).data)
    require(
        filled == promised,
        "pixel-data",
        f"{filled} bytes of values where the header promises {promised}: is the file cut?",
    )
    stream.require_end()
    if not stored.isnative:
        values = values.byteswap(inplace=True).view(stored.newbyteorder("="))
    return values


def _triple(values: NDArray[np.float64]) -> Triple:
    z, y, x = (float(value) for value in values)
    return z, y, x
