"""NRRD (.nrrd, or .nhdr with its data file beside it), as Slicer, teem and ITK write it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from raysynth.formats.dicom_file import require
from raysynth.formats.image_file import (
    Grid,
    Image,
    Stream,
    check_grid,
    check_shape,
    field_text,
    header_lines,
    open_beside,
    open_file,
    parse_numbers,
    parse_whole,
    read_values,
)

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
"""The format's names of each of numpy's types."""

_TO_LPS = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
}
"""Signs that turn (x, y, z) of a space into LPS."""

_OTHER_NAMES = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}

_SPATIAL_KINDS = {"domain", "space", "???", "none"}


def read_nrrd(path: Path) -> Image:
    """Reads one 3D NRRD file of raw or gzip encoding.

    A file without a space but with spacings is taken to lie along LPS axes at the origin, which is
    how ITK takes it.

    Raises:
        UnreadableCase: the file breaks a rule.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        fields = _read_fields(file)
        axes = parse_whole(field_text(fields, "dimension"), "dimension", 1)[0]
        require(axes == 3, "shape", f"an image of {axes} axes; three are needed")
        stored = _stored_type(fields)
        shape = check_shape(parse_whole(field_text(fields, "sizes"), "sizes", 3), stored)
        grid = _grid(fields)
        encoding = field_text(fields, "encoding").lower()
        is_packed = encoding in ("gzip", "gz")
        require(
            is_packed or encoding == "raw",
            "encoding",
            "the encoding is neither raw nor gzip: store the image as one of them",
        )
        skip = _skip(fields, is_packed=is_packed)
        name = fields.get("data file")
        if name is None:
            require(path.suffix.lower() != ".nhdr", "data-file", "the header names no data file")
        with file if name is None else open_beside(path, name) as data:
            start = data.tell()
            size = data.seek(0, 2)
            start = size - math.prod(shape) * stored.itemsize if skip == -1 else start + skip
            require(0 <= start <= size, "pixel-data", f"data of {size} bytes: are they cut?")
            data.seek(start)
            values = read_values(Stream(data, 31 if is_packed else None), shape, stored)
    return Image(values, *grid)


def _read_fields(file: BinaryIO) -> dict[str, str]:
    """The fields up to the blank line, or the file's end, that ends the header."""
    lines = header_lines(file)
    require(
        re.fullmatch(r"NRRD000[1-5]", next(lines, "")) is not None,
        "not-nrrd",
        "the file does not start like NRRD",
    )
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            break
        name, colon, value = line.partition(":")
        if line.startswith("#") or value.startswith("="):  # a comment; a user's own key
            continue
        require(bool(colon), "not-nrrd", "a line of the header is no `field: value`")
        name = _OTHER_NAMES.get(name.strip().lower(), name.strip().lower())
        require(name not in fields, "bad-field", "a field stands in the header twice")
        fields[name] = value.strip()
    return fields


def _stored_type(fields: dict[str, str]) -> np.dtype[np.generic]:
    told = field_text(fields, "type").lower()
    code = next((code for code, names in _TYPES.items() if told in names), "")
    require(
        bool(code), "pixel-format", "the type is none of the integers and floats of up to 64 bits"
    )
    kinds = set(fields.get("kinds", "").lower().split())
    require(kinds <= _SPATIAL_KINDS, "shape", "an axis holds colours or vectors, not space")
    if code in ("i1", "u1"):
        return np.dtype(code)
    order = field_text(fields, "endian").lower()
    require(order in ("little", "big"), "bad-field", "endian must be little or big")
    return np.dtype((">" if order == "big" else "<") + code)


def _skip(fields: dict[str, str], *, is_packed: bool) -> int:
    """Bytes before the values; -1 if the values are the last bytes of the file."""
    lines = parse_whole(fields.get("line skip", "0"), "line skip", 1)[0]
    skip = parse_whole(fields.get("byte skip", "0"), "byte skip", 1)[0]
    require(
        lines == 0 and (skip == 0 or (skip >= -1 and not is_packed)),
        "bad-field",
        f"line skip {lines} and byte skip {skip}: only bytes of raw data can be skipped",
    )
    return skip


def _grid(fields: dict[str, str]) -> Grid:
    units = set(fields.get("space units", "").replace('"', " ").split())
    require(units <= {"mm", "???"}, "units", "space units are not millimetres")
    if "space directions" not in fields:
        # Directions nobody knows; sizes at least must be known.
        require("space" not in fields, "missing-field", "a space without space directions")
        spacing_mm = parse_numbers(field_text(fields, "spacings"), "spacings", 3)
        require(bool((spacing_mm > 0).all()), "spacing", f"spacings {spacing_mm.tolist()} mm")
        return check_grid(np.diag(spacing_mm), np.zeros(3))
    space = field_text(fields, "space").lower()
    require(space in _TO_LPS, "space", "the space is none of LPS, LAS and RAS of a patient")
    signs = np.array(_TO_LPS[space], dtype=np.float64)
    steps_mm = _vectors(fields["space directions"], "space directions", 3).T
    origin_mm = _vectors(fields.get("space origin", "(0,0,0)"), "space origin", 1)[0]
    return check_grid(signs[:, None] * steps_mm, signs * origin_mm)


def _vectors(text: str, name: str, count: int) -> NDArray[np.float64]:
    """`count` vectors `(x,y,z)`, shape (count, 3)."""
    written = r"\(([^()]*)\)"
    vectors = re.findall(written, text)
    require(
        len(vectors) == count and not re.sub(written, "", text).strip(),
        "bad-field",
        f"{name} must be {count} vector(s) of three numbers",
    )
    return np.stack([parse_numbers(vector.replace(",", " "), name, 3) for vector in vectors])
