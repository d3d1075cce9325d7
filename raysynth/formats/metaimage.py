"""MetaImage (.mha, or .mhd with its data file beside it), as ITK and LUNA16 write it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from raysynth.errors import UnreadableCase
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
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # as the format defines it, on every machine
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
"""numpy's names of the element types."""

_LAST_FIELD = "ElementDataFile"


def read_metaimage(path: Path) -> Image:
    """Reads one 3D MetaImage file; its frame is LPS, as ITK's.

    Raises:
        UnreadableCase: the file breaks a rule.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        fields = _read_fields(file)
        _check_kind(fields)
        stored = np.dtype(_byte_order(fields) + _type(fields))
        shape = check_shape(parse_whole(field_text(fields, "DimSize"), "DimSize", 3), stored)
        grid = _grid(fields)
        is_packed = _flag(fields, "CompressedData", "False")
        skip = parse_whole(fields.get("HeaderSize", "0"), "HeaderSize", 1)[0]
        name = fields[_LAST_FIELD]
        if name.upper() == "LOCAL":
            require(skip == 0, "bad-field", f"HeaderSize {skip} of data behind their own header")
            return Image(read_values(Stream(file, 47 if is_packed else None), shape, stored), *grid)
        with open_beside(path, name) as data:
            size = data.seek(0, 2)
            if skip == -1 and not is_packed:
                skip = size - math.prod(shape) * stored.itemsize
            require(0 <= skip <= size, "pixel-data", f"a data file of {size} bytes: is it cut?")
            data.seek(skip)
            return Image(read_values(Stream(data, 47 if is_packed else None), shape, stored), *grid)


def _read_fields(file: BinaryIO) -> dict[str, str]:
    """The fields up to ElementDataFile, which ends the header."""
    fields: dict[str, str] = {}
    for line in header_lines(file):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line:
            continue
        require(bool(equals), "not-metaimage", "a line of the header is no `key = value`")
        require(name not in fields, "bad-field", "a field stands in the header twice")
        fields[name] = value
        if name == _LAST_FIELD:
            return fields
    raise UnreadableCase(
        "not-metaimage", f"no {_LAST_FIELD}: the header is cut, or the file is no MetaImage"
    )


def _flag(fields: dict[str, str], name: str, default: str) -> bool:
    value = fields.get(name, default).lower()
    require(value in ("true", "false", "1", "0"), "bad-field", f"{name} must be True or False")
    return value in ("true", "1")


def _check_kind(fields: dict[str, str]) -> None:
    require(
        fields.get("ObjectType", "Image").lower() == "image",
        "not-metaimage",
        "ObjectType is no image",
    )
    axes = parse_whole(field_text(fields, "NDims"), "NDims", 1)[0]
    require(axes == 3, "shape", f"an image of {axes} axes; three are needed")
    channels = parse_whole(fields.get("ElementNumberOfChannels", "1"), "its channels", 1)[0]
    require(channels == 1, "pixel-format", f"{channels} values a voxel; one is needed")
    is_binary = _flag(fields, "BinaryData", "True")
    require(is_binary, "encoding", "values written as text: store them as binary data")
    # ITK ignores both; a file that has them would mean other values than its readers see.
    slope, intercept = (
        parse_numbers(fields.get(name, default), name, 1)[0]
        for name, default in (
            ("ElementToIntensityFunctionSlope", "1"),
            ("ElementToIntensityFunctionOffset", "0"),
        )
    )
    require(
        (slope, intercept) == (1, 0),
        "rescale",
        f"values need a slope of {slope:g} and an offset of {intercept:g}: apply them first",
    )
    unit = fields.get("DistanceUnits", "mm").lower()
    require(unit in ("mm", "?", ""), "units", "DistanceUnits is not millimetres")


def _type(fields: dict[str, str]) -> str:
    name = field_text(fields, "ElementType")
    require(
        name in _TYPES,
        "pixel-format",
        "ElementType is none of the integers and floats of up to 64 bits",
    )
    return _TYPES[name]


def _byte_order(fields: dict[str, str]) -> str:
    names = [n for n in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if n in fields]
    orders = {_flag(fields, name, "False") for name in names} or {False}
    require(len(orders) == 1, "bad-field", "the header gives two byte orders")
    return ">" if orders.pop() else "<"


def _grid(fields: dict[str, str]) -> Grid:
    sizes = fields.get("ElementSpacing", fields.get("ElementSize"))
    require(sizes is not None, "missing-field", "ElementSpacing is missing: sizes are unknown")
    spacing_mm = parse_numbers(sizes or "", "ElementSpacing", 3)
    require(bool((spacing_mm > 0).all()), "spacing", f"ElementSpacing {spacing_mm.tolist()} mm")
    origin_mm = parse_numbers(
        _any_of(fields, "Offset", "Origin", "Position") or "0 0 0", "Offset", 3
    )
    matrix = _any_of(fields, "TransformMatrix", "Rotation", "Orientation") or "1 0 0 0 1 0 0 0 1"
    # Row k is the direction of axis k, of unit length, hence the transpose.
    axes = parse_numbers(matrix, "TransformMatrix", 9).reshape(3, 3).T
    require(
        bool((np.abs(axes) < 1.001).all())
        and bool((np.abs(np.linalg.norm(axes, axis=0) - 1) < 1e-3).all()),
        "orientation",
        "the rows of TransformMatrix are no unit vectors",
    )
    return check_grid(axes * spacing_mm, origin_mm)


def _any_of(fields: dict[str, str], *names: str) -> str | None:
    """The value of the one field, which has several names."""
    found = [fields[name] for name in names if name in fields]
    require(len(set(found)) <= 1, "bad-field", f"{names[0]} and its other names do not agree")
    return found[0] if found else None
