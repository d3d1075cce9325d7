"""Pixels of one DICOM image, in the codings that lose nothing.

The size that a codestream gives itself is checked before anything is decoded.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from imagecodecs import jpeg2k_decode, jpegsof3_decode
from numpy.typing import NDArray
from pydicom import uid as uids
from pydicom.encaps import get_frame

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom_file import MAX_FILE_BYTES, Place, open_regular, parse_file, require

PLAIN = (uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian, uids.ExplicitVRBigEndian)

_JPEG_FRAME = 0xC3
"""Kind of the segment of a lossless JPEG codestream that gives its size."""

_JPEG_SCAN = 0xDA
"""Kind of the segment before the pixels."""

_JPEG2000_START = 0xFF4FFF51
"""Start of a codestream, and of the part that gives its size."""

_JPEG2000_TILE = b"\xff\x90\x00\x0a"
"""Start of a tile, or a part of one; it occurs nowhere else."""

# Lossless ones only. Deflated files are left out: opening one inflates all of it, however large. So
# is JPEG-LS: of some hundred bytes its decoder can make eight seconds.
TRANSFER_SYNTAXES = (
    *PLAIN,
    uids.RLELossless,
    uids.JPEGLossless,
    uids.JPEGLosslessSV1,
    uids.JPEG2000Lossless,
)


def read_pixels(
    path: Path, place: Place, transfer_syntax: str, shape: tuple[int, int]
) -> NDArray[np.uint16]:
    """The stored 16-bit values of one image, (y, x).

    Args:
        path: the file.
        place: of its pixels in it.
        transfer_syntax: one of `TRANSFER_SYNTAXES`.
        shape: rows and columns that the checked header tells.

    Raises:
        UnreadableCase: the pixels are missing, cut, undecodable or of another size.
    """
    rows, columns = shape
    pixels: NDArray[Any]
    try:
        if transfer_syntax in PLAIN:
            order = ">" if transfer_syntax == uids.ExplicitVRBigEndian else "<"
            # What follows the image is left out.
            pixels = np.frombuffer(_read_at(path, place.start, 2 * rows * columns), f"{order}u2")
        else:
            data = parse_file(path, ("PixelData",), most_bytes(shape)).tags.PixelData
            frame = get_frame(data, 0, number_of_frames=1)
            if transfer_syntax == uids.RLELossless:
                pixels = _unpack_rle(frame, rows * columns)
            else:
                pixels = _decode(frame, transfer_syntax, shape)
        return pixels.reshape(rows, columns).astype(np.uint16, copy=False)
    except UnreadableCase:
        raise
    except Exception as error:  # a decoder may raise anything
        raise UnreadableCase(
            "pixel-data",
            f"the pixels of a slice are cut or cannot be decoded ({type(error).__name__})",
        ) from None


def most_bytes(shape: tuple[int, int]) -> int:
    """Of the pixels of one image: no coding without loss takes so much."""
    return 8 * shape[0] * shape[1] + (1 << 16)


def _read_at(path: Path, start: int, size: int) -> bytes:
    with open_regular(path, MAX_FILE_BYTES) as file:
        file.seek(start)
        return file.read(size)


def _decode(codestream: bytes, transfer_syntax: str, shape: tuple[int, int]) -> NDArray[Any]:
    """Pixels in one of JPEG's codings, which must be of the size that the checked header tells."""
    if transfer_syntax == uids.JPEG2000Lossless:
        _check_jpeg2000(codestream, shape)
        return jpeg2k_decode(codestream)
    _check_jpeg(codestream, shape)
    return jpegsof3_decode(codestream, out=np.empty(shape, np.uint16))


def _check_jpeg(codestream: bytes, shape: tuple[int, int]) -> None:
    """The size that the codestream gives itself, as a decoder would allocate it."""
    at = 2
    found: list[int] = []
    while not found or found[-1] != _JPEG_SCAN:
        start, kind, length = struct.unpack_from(">BBH", codestream, at)
        found.append(kind)
        require(start == 0xFF and length >= 2, "pixel-data", "the pixels are no JPEG codestream")
        if kind == _JPEG_FRAME:
            bits, rows, columns, components = struct.unpack_from(">BHHB", codestream, at + 4)
            require(
                (rows, columns) == shape and 8 < bits <= 16 and components == 1,
                "pixel-data",
                f"{components} images of {rows} x {columns} pixels of {bits} bits in {shape}",
            )
        at += 2 + length
    require(found.count(_JPEG_FRAME) == 1, "pixel-data", "the pixels are in another kind of JPEG")


def _check_jpeg2000(codestream: bytes, shape: tuple[int, int]) -> None:
    """The size that the codestream gives itself: a decoder allocates it before it complains."""
    start, x1, y1, x0, y0, tile_x, tile_y, *corner, components = struct.unpack_from(
        ">Q8IH", codestream
    )
    require(
        start >> 32 == _JPEG2000_START and (y1 - y0, x1 - x0) == shape and components == 1,
        "pixel-data",
        f"the pixels are no JPEG 2000 codestream of one {shape} image",
    )
    # Who decodes leaves out what is not there.
    tiles = -(-(x1 - corner[0]) // tile_x) * -(-(y1 - corner[1]) // tile_y)
    parts = codestream.count(_JPEG2000_TILE)
    require(tiles <= parts, "pixel-data", f"{parts} of {tiles} tiles are there: is the file cut?")


def _unpack_rle(frame: bytes, size: int) -> NDArray[np.uint16]:
    """Pixels (size,) from their packed high and low bytes; no more is unpacked than they need."""
    count, high, low = struct.unpack_from("<3I", frame)
    require(count == 2, "pixel-data", f"{count} run-length coded parts; 16-bit pixels have two")
    pixels = np.empty((size, 2), np.uint8)
    for place, packed in enumerate((frame[low:], frame[high:low])):
        pixels[:, place] = np.frombuffer(_unpack_bits(packed, size), np.uint8, size)
    return pixels.reshape(-1).view("<u2")


def _unpack_bits(packed: bytes, size: int) -> bytearray:
    """The first `size` bytes that the runs stand for; fewer if they end before."""
    unpacked = bytearray()
    at = 0
    while len(unpacked) < size and at < len(packed):
        count = packed[at]
        if count < 128:  # so many and one as they are
            unpacked += packed[at + 1 : at + 2 + count]
            at += 2 + count
        else:  # one repeated, and of 128 nothing
            unpacked += packed[at + 1 : at + 2] * (257 - count) if count > 128 else b""
            at += 2 if count > 128 else 1
    return unpacked[:size]
