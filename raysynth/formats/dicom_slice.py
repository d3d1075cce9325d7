"""One DICOM CT slice: its header checked, its pixels turned into Hounsfield units.

Every file is taken to be hostile. Only the tags listed here are ever parsed, sizes are capped
before anything is decoded, and messages carry rules and numbers, never text out of a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid as uids

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom_file import Place, parse_file, require
from raysynth.formats.dicom_pixels import PLAIN, TRANSFER_SYNTAXES, most_bytes, read_pixels
from raysynth.volume import AIR_HU

KEPT_TAGS = ("Manufacturer", "SliceThickness", "KVP", "ConvolutionKernel")
"""All that may be stored of a series' headers: no identifiers, no dates, no free text."""

_MAKERS = (
    *("Canon", "Elscint", "Fujifilm", "GE", "Hitachi", "Imatron", "Marconi", "Neusoft", "Philips"),
    *("Picker", "Shimadzu", "Siemens", "Toshiba", "UIH", "United Imaging"),
)
_KERNEL = re.compile(
    # Siemens, Canon; Philips; General Electric
    r"[A-Z][A-Za-z]{0,2}\d{1,3}[a-z]{0,2}(\\\d)?|[A-L]|Y[A-D]|"
    "STANDARD|SOFT|DETAIL|LUNG|CHST|BONE|BONEPLUS|EDGE|ULTRA"
)

PADDING_HU = -2000
"""At or below it a voxel was never measured: air is -1000, and noise stays above -2000. LIDC series
pad with -2048 HU while their PixelPaddingValue names another value, which they do not contain."""

INT16 = np.iinfo(np.int16)

MAX_SIDE = 4096
MAX_ORIGIN_MM = 1e5
SPACING_RANGE_MM = (0.05, 20.0)

_MULTI_FRAME = (uids.EnhancedCTImageStorage, uids.LegacyConvertedEnhancedCTImageStorage)

_HEADER_TAGS = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "PatientID",
    "Modality",
    "ImageType",
    "BurnedInAnnotation",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "PixelData",
    *KEPT_TAGS,
)

_IDENTITY_TAGS = ("SOPClassUID", "SeriesInstanceUID", "PatientID", "ImageType")


@dataclass(frozen=True)
class SliceHeader:
    """What the checked header of one slice says; vectors are in DICOM's (x, y, z) order.

    Attributes:
        frame_uid: of the frame that positions refer to; "" if it is not told.
        shape: rows and columns.
        position: centre of the first pixel, millimetres.
        orientation: unit vectors (2, 3) along a row and along a column.
        pixel_mm: distance of rows and of columns.
        bits_stored: low bits of each 16-bit pixel that carry its value.
        padding: stored value that stands for "not measured", if it cannot be tissue.
        pixels: where they are in the file.
        kept: the values of `KEPT_TAGS` that are present.
    """

    path: Path
    series_uid: str
    frame_uid: str
    transfer_syntax: str
    shape: tuple[int, int]
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    pixel_mm: NDArray[np.float64]
    bits_stored: int
    is_signed: bool
    slope: float
    intercept: float
    padding: int | None
    pixels: Place
    kept: dict[str, str | float]

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector across the slice, towards the head."""
        normal = np.cross(*self.orientation)
        return normal if normal[2] >= 0 else -normal


def identify(path: Path) -> tuple[str, str] | None:
    """Series UID and patient id (may be empty) of an axial CT slice; None for other images.

    Raises:
        UnreadableCase: the file is no DICOM, or damaged.
    """
    tags = parse_file(path, _IDENTITY_TAGS).tags
    kind = uids.UID(_text(tags, "SOPClassUID"))
    # Only what DICOM knows as another kind may be passed over: a damaged slice may not.
    require(kind.type == "SOP Class", "unknown-kind", "SOPClassUID is missing or names no kind")
    require(
        kind not in _MULTI_FRAME,
        "multi-frame",
        "a multi-frame CT object: export the series as one file a slice",
    )
    if kind != uids.CTImageStorage or _is_scout(tags):
        return None
    series_uid = _text(tags, "SeriesInstanceUID")
    require(bool(series_uid), "missing-tag", "SeriesInstanceUID is missing: is the file cut?")
    return series_uid, _text(tags, "PatientID")


def read_header(path: Path) -> SliceHeader:
    """Parses and checks all that the header of one slice tells, without its pixels.

    Raises:
        UnreadableCase: the slice breaks a rule.
    """
    tags, transfer_syntax, pixels = parse_file(path, _HEADER_TAGS)
    _check_kind(tags)
    require(
        transfer_syntax in TRANSFER_SYNTAXES,
        "transfer-syntax",
        "the pixels are lossy or in an unknown coding: convert to Explicit VR Little Endian",
    )
    shape, bits_stored = _pixel_format(tags)
    is_signed = _number(tags, "PixelRepresentation") == 1
    slope, intercept = _number(tags, "RescaleSlope"), _number(tags, "RescaleIntercept")
    require(
        0 < slope <= 100
        and abs(intercept) <= 1e5
        and _text(tags, "RescaleType") in ("", "HU", "US"),
        "rescale",
        f"slope {slope:g} and intercept {intercept:g} do not lead to Hounsfield units",
    )
    padding = _padding_value(tags, bits_stored, is_signed)
    # Some writers name a value that tissue has too, which then cannot mean padding.
    if padding is not None and padding * slope + intercept > AIR_HU:
        padding = None
    return SliceHeader(
        path=path,
        series_uid=_text(tags, "SeriesInstanceUID"),
        frame_uid=_text(tags, "FrameOfReferenceUID"),
        transfer_syntax=transfer_syntax,
        shape=shape,
        position=_position(tags),
        orientation=_orientation(tags),
        pixel_mm=_pixel_mm(tags),
        bits_stored=bits_stored,
        is_signed=is_signed,
        slope=slope,
        intercept=intercept,
        padding=padding,
        pixels=_checked_place(pixels, transfer_syntax, shape),
        kept=_kept(tags),
    )


def read_hu(header: SliceHeader) -> NDArray[np.int16]:
    """The Hounsfield units of one slice, int16 (y, x); padding becomes `AIR_HU`.

    Raises:
        UnreadableCase: the pixels are missing, cut, undecodable or no Hounsfield units.
    """
    stored = _stored_pixels(header)
    lowest, highest = (
        round(int(extreme) * header.slope + header.intercept)
        for extreme in (stored.min(), stored.max())
    )
    require(highest <= INT16.max, "hu-range", f"a slice reaches {highest} HU")
    if header.slope == 1 and header.intercept.is_integer() and lowest >= INT16.min:
        # What overflows on the way comes back, as the sum itself does not.
        hu = stored.view(np.int16) + np.int64(header.intercept).astype(np.int16)
    else:
        exact = np.rint(stored * np.float64(header.slope) + header.intercept)
        hu = exact.clip(PADDING_HU, None).astype(np.int16)
    if lowest <= PADDING_HU:
        np.copyto(hu, AIR_HU, where=hu <= PADDING_HU)
    if header.padding is not None:
        np.copyto(hu, AIR_HU, where=stored == header.padding)
    return hu


def _stored_pixels(header: SliceHeader) -> NDArray[np.integer]:
    """Stored values, (y, x), with the bits above BitsStored (once used for overlays) put right."""
    pixels: NDArray[np.integer] = read_pixels(
        header.path, header.pixels, header.transfer_syntax, header.shape
    )
    spare = 16 - header.bits_stored
    if spare and (header.is_signed or int(pixels.max()) >> header.bits_stored):
        pixels = pixels << spare
        return (pixels.view(np.int16) if header.is_signed else pixels) >> spare
    return pixels.view(np.int16) if header.is_signed else pixels


def _check_kind(tags: pydicom.Dataset) -> None:
    is_ct = _text(tags, "SOPClassUID") == uids.CTImageStorage and _text(tags, "Modality") == "CT"
    require(is_ct, "not-ct", "a file is no single-frame CT image")
    require(not _is_scout(tags), "localizer", "a slice is a scout image")
    require(
        _text(tags, "BurnedInAnnotation").upper() != "YES",
        "burned-in",
        "text is burned into the pixels, and may name the patient",
    )


def _is_scout(tags: pydicom.Dataset) -> bool:
    return "LOCALIZER" in _text(tags, "ImageType").upper()


def _pixel_format(tags: pydicom.Dataset) -> tuple[tuple[int, int], int]:
    """(rows, columns) and the stored bits of 16-bit grey pixels."""
    rows, columns = _whole(tags, "Rows"), _whole(tags, "Columns")
    require(
        1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE,
        "size",
        f"{rows} x {columns} pixels; 1 to {MAX_SIDE} a side can be read",
    )
    require(_number(tags, "NumberOfFrames", 1) == 1, "multi-frame", "a file holds several frames")
    is_grey = _text(tags, "PhotometricInterpretation") == "MONOCHROME2"
    require(
        is_grey and _number(tags, "SamplesPerPixel") == 1,
        "not-grey",
        "the pixels are not MONOCHROME2",
    )
    allocated, stored = _whole(tags, "BitsAllocated"), _whole(tags, "BitsStored")
    require(
        allocated == 16
        and 1 <= stored <= 16
        and _number(tags, "HighBit", stored - 1) == stored - 1
        and _number(tags, "PixelRepresentation") in (0, 1),
        "pixel-format",
        f"{stored} bits in {allocated}: only the low bits of 16-bit pixels can be read",
    )
    return (rows, columns), stored


def _checked_place(pixels: Place | None, transfer_syntax: str, shape: tuple[int, int]) -> Place:
    require(pixels is not None, "pixel-data", "a slice without pixels: is the file cut?")
    assert pixels is not None
    is_plain = transfer_syntax in PLAIN
    require(
        (pixels.length is not None) == is_plain,
        "pixel-data",
        "the pixels are not in the coding that the file names",
    )
    if pixels.length is not None:
        least, most = 2 * shape[0] * shape[1], most_bytes(shape)
        require(
            least <= pixels.length <= most,
            "pixel-data",
            f"{pixels.length} bytes of pixels, {least} are needed: is the file cut, or the image "
            "another?",
        )
    return pixels


def _position(tags: pydicom.Dataset) -> NDArray[np.float64]:
    position = _numbers(tags, "ImagePositionPatient", 3)
    farthest = float(np.abs(position).max())
    require(
        farthest <= MAX_ORIGIN_MM,
        "origin",
        f"a slice {farthest:.4g} mm away; {MAX_ORIGIN_MM:g} mm at most can be read",
    )
    return position


def _orientation(tags: pydicom.Dataset) -> NDArray[np.float64]:
    orientation = _numbers(tags, "ImageOrientationPatient", 6).reshape(2, 3)
    shown = f"ImageOrientationPatient {orientation.ravel().round(4).tolist()}"
    require(
        bool(np.abs(orientation @ orientation.T - np.eye(2)).max() < 1e-3),
        "orientation",
        f"{shown} is not two perpendicular unit vectors",
    )
    (row_x, _, _), (_, column_y, _) = orientation
    along_axes = min(abs(row_x), abs(column_y), abs(np.cross(*orientation)[2])) > 0.9
    require(bool(along_axes), "not-axial", f"{shown}: only axial series can be used")
    return orientation


def _pixel_mm(tags: pydicom.Dataset) -> NDArray[np.float64]:
    pixel_mm = _numbers(tags, "PixelSpacing", 2)
    low, high = SPACING_RANGE_MM
    require(
        low <= pixel_mm.min() and pixel_mm.max() <= high,
        "spacing",
        f"PixelSpacing {pixel_mm.tolist()} mm is outside {low:g} to {high:g} mm",
    )
    return pixel_mm


def _padding_value(tags: pydicom.Dataset, bits_stored: int, is_signed: bool) -> int | None:
    """PixelPaddingValue as the pixels store it: its own sign is often wrong (63536 means -2000)."""
    value = _value(tags, "PixelPaddingValue")
    if not isinstance(value, int):
        return None
    value &= (1 << bits_stored) - 1
    return value - (1 << bits_stored) if is_signed and value >> (bits_stored - 1) else value


def _kept(tags: pydicom.Dataset) -> dict[str, str | float]:
    """The allow-listed values: finite numbers, and words that name a maker or a kernel.

    Anything may be typed into a tag of text, a name too.
    """
    kept: dict[str, str | float] = {}
    for name in KEPT_TAGS:
        try:
            if name in ("SliceThickness", "KVP"):
                kept[name] = _number(tags, name)
                continue
            text = _text(tags, name)
            if name == "Manufacturer":
                for maker in _MAKERS:
                    if re.match(rf"{maker}\b", text, re.IGNORECASE):
                        kept[name] = maker
            elif _KERNEL.fullmatch(text):
                kept[name] = text
        except UnreadableCase:
            continue  # nothing depends on them
    return kept


def _value(tags: pydicom.Dataset, name: str) -> Any:
    try:
        return tags.get(name)
    except Exception as error:  # pydicom converts on first access; its text could quote the file
        raise UnreadableCase("bad-tag", f"{name} is malformed ({type(error).__name__})") from None


def _text(tags: pydicom.Dataset, name: str) -> str:
    value = _value(tags, name)
    if value is None:
        return ""
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return "".join(filter(str.isprintable, "\\".join(map(str, parts)))).strip()


def _number(tags: pydicom.Dataset, name: str, default: float | None = None) -> float:
    if default is not None and _value(tags, name) is None:
        return default
    return float(_numbers(tags, name, 1)[0])


def _whole(tags: pydicom.Dataset, name: str) -> int:
    value = _number(tags, name)
    in_range = value.is_integer() and abs(value) < 1 << 32
    require(in_range, "bad-tag", f"{name} must be a whole number")
    return int(value)


def _numbers(tags: pydicom.Dataset, name: str, count: int) -> NDArray[np.float64]:
    value = _value(tags, name)
    require(value is not None, "missing-tag", f"{name} is missing: geometry or scale are unknown")
    try:
        numbers = np.array(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        numbers = np.array([])
    require(
        len(numbers) == count and bool(np.isfinite(numbers).all()),
        "bad-tag",
        f"{name} must be {count} finite number(s)",
    )
    return numbers
