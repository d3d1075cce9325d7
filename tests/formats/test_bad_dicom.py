"""Malformed and hostile DICOM: each file is refused by name within bounds, or read right.

What `test_dicom` has is not repeated here: this is what a stranger could write on purpose.
`RAYSYNTH_MUTANTS=10000 pytest tests/formats/test_bad_dicom.py -k mutants` tries more mutants.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom import find_series, read_series
from tests.bounds import bounds
from tests.formats.dicom_files import (
    CODERS,
    PIXEL_DATA,
    SERIES_UID,
    UNDEFINED,
    Damage,
    both,
    coded,
    cut,
    element,
    elements,
    encapsulated,
    inserted,
    joined,
    put,
    run_length,
    run_mutants,
    small_volume,
    without,
    write_series,
)

SLICES, SIDE = 8, 16
VOLUME = small_volume(SLICES, SIDE)
PRIVATE = ("Doe", "Jane", "Elsewhere", "PATIENT", "1999", SERIES_UID)
MANY = int(os.environ.get("RAYSYNTH_MUTANTS", "500"))

NOTE = 0x00091010
"""A private tag."""

ITEM = bytes.fromhex("feff00e0ffffffff")
SEQUENCE_END = bytes.fromhex("feffdde000000000")


def sequence(items: bytes, end: bytes = SEQUENCE_END) -> bytes:
    """A private sequence that ends where it says so."""
    return element(NOTE, "SQ", items + end, UNDEFINED)


def item(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content) if length is None else length) + content


def nested(depth: int) -> bytes:
    """Sequences of known length, each inside the one before."""
    inner = b""
    for _ in range(depth):
        inner = element(NOTE, "SQ", item(inner))
    return inner


def moved(offset_mm: tuple[float, float, float]) -> Damage:
    x, y, z = offset_mm
    return put("ImagePositionPatient", "DS", f"{-140 + x:g}\\{-120 + y:g}\\{-290 + z:g}")


def pixels(raw: bytes) -> np.ndarray:
    return np.frombuffer(elements(raw)[PIXEL_DATA][12:], "<u2")


def wrapped(wrap: Callable[[bytes], bytes]) -> Damage:
    """The slice run-length coded, its frame wrapped as a value of PixelData."""
    return lambda raw: coded(RLELossless, wrap(run_length(pixels(raw))))(raw)


def recoded(syntax: str, change: Callable[[bytes], bytes]) -> Damage:
    """The slice in a coding, and its codestream changed."""
    return lambda raw: coded(syntax, encapsulated(change(CODERS[syntax](pixels(raw)))))(raw)


rle, j2k = partial(recoded, RLELossless), partial(recoded, JPEG2000Lossless)


def frame_of(codestream: bytes) -> int:
    """Where the segment that tells the size begins."""
    return codestream.find(b"\xff\xc3")


def sized(rows: int, columns: int) -> Callable[[bytes], bytes]:
    return lambda raw: at(frame_of(raw) + 5, ">2H", rows, columns)(raw)


def kind(of_frame: int) -> Callable[[bytes], bytes]:
    return lambda raw: at(frame_of(raw) + 1, ">B", of_frame)(raw)


def without_frame(codestream: bytes) -> bytes:
    begin = frame_of(codestream)
    (length,) = struct.unpack_from(">H", codestream, begin + 2)
    return codestream[:begin] + codestream[begin + 2 + length :]


def endless(codestream: bytes) -> bytes:
    """Segments of length nought: who adds it stays where he is."""
    return codestream[:2] + b"\xff\xe0\0\0" * 100 + codestream[2:]


def at(place: int, form: str, *values: int) -> Callable[[bytes], bytes]:
    """Writes numbers over bytes."""

    def change(raw: bytes) -> bytes:
        changed = bytearray(raw)
        struct.pack_into(form, changed, place, *values)
        return bytes(changed)

    return change


def rle_bomb(frame: bytes) -> bytes:
    """Two parts of runs that unpack to 512 MiB."""
    part = b"\x81\x00" * (2 << 20)
    return struct.pack("<3I", 2, 64, 64 + len(part)) + bytes(52) + part + part


def jp2(codestream: bytes) -> bytes:
    """A JP2 file, which DICOM does not allow, that says another size than its codestream."""
    size = struct.pack(">I4sIIHBBBB", 22, b"ihdr", SIDE, SIDE, 1, 15, 7, 0, 0)
    header = struct.pack(">I4s", 8 + len(size), b"jp2h") + size
    huge = at(8, ">2I", 60_000, 60_000)(codestream)
    return (
        bytes.fromhex("0000000c6a5020200d0a870a")
        + struct.pack(">I4s4sI4s", 20, b"ftyp", b"jp2 ", 0, b"jp2 ")
        + header
        + struct.pack(">I4s", 8 + len(huge), b"jp2c")
        + huge
    )


def deflated(raw: bytes) -> bytes:
    """As the standard has it, and no bomb."""
    raw = put("TransferSyntaxUID", "UI", DeflatedExplicitVRLittleEndian)(raw)
    start = len(joined({tag: one for tag, one in elements(raw).items() if tag >> 16 == 2}))
    packer = zlib.compressobj(wbits=-15)
    return raw[:start] + packer.compress(raw[start:]) + packer.flush()


def huge_text(name: str, mebibytes: int) -> Damage:
    """A tag that is a list of millions, in a VR that can say so."""
    return put(name, "UC", b"1\\" * (mebibytes << 19))


def implicit(change: Damage) -> Damage:
    """The file in implicit VR, where any value may have four gigabytes."""

    def damage(raw: bytes) -> bytes:
        raw = put("TransferSyntaxUID", "UI", ImplicitVRLittleEndian)(change(raw))
        parts = elements(raw)
        for tag, one in parts.items():
            if tag >> 16 != 2:
                body = one[12:] if one[4:6] in (b"OB", b"OW", b"UC") else one[8:]
                parts[tag] = struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(body)) + body
        return joined(parts)

    return damage


def after_pixels(*new: bytes) -> Damage:
    return lambda raw: raw + b"".join(new)


HUGE_TAGS = (
    element(0x00280010, "US", b"\xff\xff"),
    element(0x00280011, "US", b"\xff\xff"),
    element(0x00280008, "IS", "4000"),
    element(0x00280100, "US", b"\x40\x00"),
)
"""Sizes of an image of 68 terabytes."""

GARBAGE = bytes(range(1, 200))

BAD_FILES: list[tuple[str | None, str, Damage]] = [
    # rule (None: it is read right), what it is, what is done to one of the slices
    ("not-dicom", "no preamble", lambda raw: raw[128:]),
    ("not-dicom", "short preamble", lambda raw: raw[1:]),
    ("not-dicom", "cut in the preamble", lambda raw: raw[:64]),
    ("not-dicom", "cut behind the mark", lambda raw: raw[:132]),
    ("not-dicom", "lower-case mark", lambda raw: raw[:128] + b"dicm" + raw[132:]),
    ("not-dicom", "no file meta", lambda raw: bytes(128) + b"DICM" + raw[raw.index(b"\x08\0") :]),
    (None, "noise in the preamble", lambda raw: b"MZ" + os.urandom(126) + raw[128:]),
    ("not-dicom", "cut in file meta", cut("TransferSyntaxUID", 5)),
    ("not-ct", "cut behind file meta", cut("ImageType")),
    ("not-ct", "cut in the kind", cut("SOPClassUID", 9)),
    ("missing-tag", "cut in a tag", cut("Rows", 3)),
    ("missing-tag", "cut in a number", cut("Rows", 6)),
    ("bad-tag", "cut in a value", cut("Rows", 9)),
    ("missing-tag", "cut in a vector", cut("ImagePositionPatient", 14)),
    ("pixel-data", "cut before the pixels", cut("PixelData")),
    ("pixel-data", "cut in the pixels' tag", cut("PixelData", 6)),
    ("not-dicom", "cut in the pixels' length", cut("PixelData", 9)),
    ("pixel-data", "cut before the first pixel", cut("PixelData", 12)),
    ("pixel-data", "cut in the last pixel", lambda raw: raw[:-1]),
    (None, "a byte too many", lambda raw: raw + b"\0"),
    (None, "padded", after_pixels(element(0xFFFCFFFC, "OB", bytes(4096)))),
    (None, "two files in one", lambda raw: raw + raw),
    # transfer syntax
    ("not-dicom", "no syntax", without("TransferSyntaxUID")),
    ("transfer-syntax", "syntax of no length", put("TransferSyntaxUID", "UI")),
    ("transfer-syntax", "unknown syntax", put("TransferSyntaxUID", "UI", "1.2.3.4")),
    ("transfer-syntax", "video", put("TransferSyntaxUID", "UI", MPEG2MPML)),
    ("transfer-syntax", "two syntaxes", put("TransferSyntaxUID", "UI", "1.2.840.10008.1.2\\1.2")),
    ("transfer-syntax", "syntax of 60 kB", put("TransferSyntaxUID", "UI", "1." * 30_000)),
    ("transfer-syntax", "deflated", deflated),
    ("not-ct", "not big-endian", put("TransferSyntaxUID", "UI", ExplicitVRBigEndian)),
    (None, "not implicit", put("TransferSyntaxUID", "UI", ImplicitVRLittleEndian)),
    (None, "implicit", implicit(lambda raw: raw)),
    (
        None,
        "length of file meta is a lie",
        put("FileMetaInformationGroupLength", "UL", b"\xff" * 4),
    ),
    ("header-size", "8 MiB of file meta", put("PrivateInformation", "OB", bytes(8 << 20))),
    (
        "header-size",
        "file meta without end",
        inserted(element(0x0002FFFF, "LO") * 200_000, "ImageType"),
    ),
    # the kind of image
    ("not-ct", "no kind", put("SOPClassUID", "UI")),
    ("not-ct", "kind of noise", put("SOPClassUID", "UI", "\xff\0\x01")),
    ("not-ct", "multi-frame", put("SOPClassUID", "UI", EnhancedCTImageStorage)),
    ("not-ct", "secondary capture", put("SOPClassUID", "UI", SecondaryCaptureImageStorage)),
    ("not-ct", "two modalities", put("Modality", "CS", "CT\\PT")),
    ("localizer", "lower-case scout", put("ImageType", "CS", "original\\primary\\localizer")),
    ("burned-in", "lower-case burned in", put("BurnedInAnnotation", "CS", "Yes ")),
    ("multi-frame", "no frames", put("NumberOfFrames", "IS", "0")),
    ("bad-tag", "frames in words", put("NumberOfFrames", "IS", "two")),
    ("bad-tag", "many numbers of frames", put("NumberOfFrames", "IS", "1\\1")),
    # sizes and bits
    (None, "rows as text", put("Rows", "LO", "16")),
    ("bad-tag", "rows as words", put("Rows", "LO", "sixteen")),
    ("bad-tag", "half a row", put("Rows", "FD", struct.pack("<d", 16.5))),
    ("bad-tag", "rows in one byte", put("Rows", "US", b"\x10")),
    ("bad-tag", "rows in three bytes", put("Rows", "US", b"\x10\0\0")),
    ("bad-tag", "rows twice in one", put("Rows", "US", b"\x10\0\x10\0")),
    ("bad-tag", "rows as a sequence", put("Rows", "SQ")),
    ("bad-tag", "rows as bytes", put("Rows", "OB", b"\x10\0")),
    ("bad-tag", "rows in an unknown VR", put("Rows", "QQ", b"\x10\0")),
    ("missing-tag", "rows of no length", put("Rows", "US")),
    ("bad-tag", "rows without end", put("Rows", "UN", item(b""), UNDEFINED)),
    (
        None,
        "rows named twice, the last counts",
        inserted(element(0x00280010, "US", b"\xff\xff"), "Rows"),
    ),
    ("size", "negative rows", put("Rows", "SS", b"\xf0\xff")),
    ("size", "4097 rows", put("Rows", "US", b"\x01\x10")),
    ("size", "65535 columns", put("Columns", "US", b"\xff\xff")),
    ("size", "no columns", put("Columns", "US", b"\0\0")),
    ("bad-tag", "rows beyond all", put("Rows", "DS", "1e300")),
    ("pixel-format", "no bits", put("BitsStored", "US", b"\0\0")),
    ("pixel-format", "17 bits", both(put("BitsStored", "US", b"\x11\0"), without("HighBit"))),
    ("pixel-format", "32 bits", put("BitsAllocated", "US", b"\x20\0")),
    ("pixel-format", "1 bit", put("BitsAllocated", "US", b"\x01\0")),
    ("pixel-format", "high bit below", put("HighBit", "US", b"\0\0")),
    ("pixel-format", "third sign", put("PixelRepresentation", "US", b"\x02\0")),
    ("missing-tag", "no sign", without("PixelRepresentation")),
    (None, "unsigned like no other slice", put("PixelRepresentation", "US", b"\0\0")),
    ("not-grey", "no sample", put("SamplesPerPixel", "US", b"\0\0")),
    ("not-grey", "palette", put("PhotometricInterpretation", "CS", "PALETTE COLOR")),
    ("not-grey", "no interpretation", without("PhotometricInterpretation")),
    # scale and place
    ("bad-tag", "slope in words", put("RescaleSlope", "DS", "one ")),
    ("bad-tag", "slope nan", put("RescaleSlope", "DS", "nan ")),
    ("bad-tag", "slope inf", put("RescaleSlope", "DS", "-inf")),
    ("bad-tag", "slope beyond floats", put("RescaleSlope", "DS", "9" * 400)),
    ("bad-tag", "slope of hexadecimals", put("RescaleSlope", "DS", "0x10")),
    ("bad-tag", "two slopes", put("RescaleSlope", "DS", "1\\1 ")),
    ("bad-tag", "slope nan in binary", put("RescaleSlope", "FD", struct.pack("<d", np.nan))),
    ("rescale", "minus no slope", put("RescaleSlope", "DS", "-0")),
    ("rescale", "slope of a million", put("RescaleSlope", "DS", "1e6 ")),
    ("missing-tag", "no intercept", put("RescaleIntercept", "DS")),
    ("bad-tag", "intercept with a comma", put("RescaleIntercept", "DS", "-1024,0 ")),
    (None, "intercept with spaces", put("RescaleIntercept", "DS", " -1024.0  ")),
    ("spacing", "spacing nearly 0", put("PixelSpacing", "DS", "1e-320\\1e-320")),
    ("bad-tag", "spacing inf", put("PixelSpacing", "DS", "0.7\\inf")),
    ("bad-tag", "spacing in words", put("PixelSpacing", "DS", "wide\\wide")),
    ("bad-tag", "three spacings", put("PixelSpacing", "DS", "0.7\\0.8\\0.7")),
    ("bad-tag", "half a spacing", put("PixelSpacing", "DS", "0.7\\")),
    ("bad-tag", "place inf", put("ImagePositionPatient", "DS", "-140\\-120\\inf ")),
    ("origin", "place beyond the room", moved((0, 0, 1e300))),
    ("origin", "place a kilometre away", moved((-1e6, 0, 0))),
    ("gantry-tilt", "one slice aside", moved((0, 1, 0))),
    ("uneven-slices", "one slice too high", moved((0, 0, 1))),
    ("duplicate-slice", "next slice's place", moved((0, 0, 2.5))),
    ("orientation", "no direction", put("ImageOrientationPatient", "DS", "0\\0\\0\\0\\0\\0")),
    ("orientation", "huge direction", put("ImageOrientationPatient", "DS", "1e200\\0\\0\\0\\1\\0")),
    ("bad-tag", "direction nan", put("ImageOrientationPatient", "DS", "nan\\0\\0\\0\\1\\0")),
    ("not-axial", "45 degrees", put("ImageOrientationPatient", "DS", "1\\0\\0\\0\\.7071\\.7071")),
    ("mixed-orientation", "turned", put("ImageOrientationPatient", "DS", "-1\\0\\0\\0\\-1\\0 ")),
    ("mixed-frame", "frame of another", put("FrameOfReferenceUID", "UI", "1.2.3.5")),
    ("mixed-frame", "no frame", put("FrameOfReferenceUID", "UI")),
    # pixels as they are
    ("pixel-data", "no pixel", put("PixelData", "OW")),
    ("pixel-data", "odd number of bytes", put("PixelData", "OW", bytes(511))),
    (
        None,
        "pixels of all frames",
        lambda raw: put("PixelData", "OW", pixels(raw).tobytes() * 3)(raw),
    ),
    ("pixel-data", "1 MiB of pixels", put("PixelData", "OW", bytes(1 << 20))),
    ("pixel-data", "length is a lie", put("PixelData", "OW", bytes(512), 0xFFFFFFFE)),
    ("pixel-data", "pixels without end", put("PixelData", "OB", bytes(512), UNDEFINED)),
    ("pixel-data", "pixels as a sequence", put("PixelData", "SQ", bytes(512))),
    (
        "pixel-data",
        "floating-point pixels",
        both(put("FloatPixelData", "OF", bytes(1024)), without("PixelData")),
    ),
    (
        "pixel-data",
        "fragments of plain pixels",
        put("PixelData", "OB", encapsulated(bytes(500)), UNDEFINED),
    ),
    ("pixel-data", "pixels twice, the last cut", after_pixels(element(PIXEL_DATA, "OW", b"\0\0"))),
    (None, "sizes behind the pixels", after_pixels(*HUGE_TAGS)),
    (None, "sizes behind packed pixels", both(coded(RLELossless), after_pixels(*HUGE_TAGS))),
    # run-length coding
    (None, "RLE", coded(RLELossless)),
    (None, "RLE in several fragments", wrapped(lambda frame: encapsulated(frame[:80], frame[80:]))),
    (
        "pixel-data",
        "a table of offsets that is a lie",
        wrapped(lambda frame: encapsulated(frame, table=b"\xff\xff\xff\x7f")),
    ),
    (
        "pixel-data",
        "RLE without an end",
        wrapped(lambda frame: encapsulated(frame, end=False) + bytes(8)),
    ),
    (
        "pixel-data",
        "a table of three bytes",
        wrapped(lambda frame: encapsulated(frame, table=b"\0\0\0")),
    ),
    ("pixel-data", "no fragment", coded(RLELossless, encapsulated())),
    ("pixel-data", "10,000 empty fragments", coded(RLELossless, encapsulated(*[b""] * 10_000))),
    (
        "pixel-data",
        "fragment beyond the file",
        coded(RLELossless, item(b"") + item(GARBAGE, 1 << 31)),
    ),
    ("pixel-data", "fragment without end", coded(RLELossless, item(b"") + ITEM + GARBAGE)),
    ("pixel-data", "no item", coded(RLELossless, GARBAGE)),
    ("pixel-data", "16 parts", rle(at(0, "<I", 16))),
    ("pixel-data", "one part", rle(at(0, "<I", 1))),
    ("pixel-data", "part beyond the frame", rle(at(8, "<I", 1 << 31))),
    ("pixel-data", "parts in the wrong order", rle(at(4, "<2I", 300, 64))),
    ("pixel-data", "a frame shorter than its head", rle(lambda frame: frame[:40])),
    ("pixel-data", "runs too short", rle(lambda frame: frame[:-40])),
    (None, "runs too long", rle(lambda frame: frame + b"\x81\x00" * 900)),
    ("pixel-data", "RLE bomb", rle(rle_bomb)),
    ("pixel-data", "RLE of noise", rle(lambda frame: frame[:64] + b"\x80" * 600)),
    # JPEG
    (None, "JPEG 2000", coded(JPEG2000Lossless)),
    ("pixel-data", "JPEG 2000 of noise", coded(JPEG2000Lossless, encapsulated(GARBAGE))),
    ("pixel-data", "JPEG 2000 cut", j2k(lambda stream: stream[:90])),
    ("pixel-data", "JPEG 2000 of one byte", j2k(lambda stream: stream[:1])),
    ("pixel-data", "JPEG 2000 of 3.6 billion pixels", j2k(at(8, ">2I", 60_000, 60_000))),
    ("pixel-data", "JPEG 2000 of another size", j2k(at(8, ">2I", 8, 8))),
    ("pixel-data", "JPEG 2000 of negative size", j2k(at(16, ">2I", 99, 99))),
    ("pixel-data", "JPEG 2000 of 4 kinds", j2k(at(40, ">H", 4))),
    (None, "JPEG 2000 in huge tiles", j2k(at(24, ">2I", 1 << 31, 1 << 31))),
    ("pixel-data", "JPEG 2000 in tiny tiles", j2k(at(24, ">2I", 1, 1))),
    ("pixel-data", "JPEG 2000 in a file of its own", j2k(jp2)),
    (None, "JPEG", coded(JPEGLosslessSV1)),
    ("pixel-data", "no JPEG", coded(JPEGLosslessSV1, encapsulated(GARBAGE))),
    ("pixel-data", "JPEG cut", recoded(JPEGLosslessSV1, lambda stream: stream[:60])),
    ("pixel-data", "JPEG of one byte", recoded(JPEGLosslessSV1, lambda stream: stream[:1])),
    ("pixel-data", "JPEG of 4 billion pixels", recoded(JPEGLosslessSV1, sized(65535, 65535))),
    ("pixel-data", "JPEG of another size", recoded(JPEGLosslessSV1, sized(8, 8))),
    ("pixel-data", "JPEG without a frame", recoded(JPEGLosslessSV1, without_frame)),
    ("pixel-data", "JPEG with loss", recoded(JPEGLosslessSV1, kind(0xC1))),
    ("pixel-data", "JPEG of segments without end", recoded(JPEGLosslessSV1, endless)),
    (
        "transfer-syntax",
        "JPEG-LS",
        coded(JPEGLSLossless, encapsulated(b"\xff\xd8\xff\xf7" + GARBAGE)),
    ),
    # sequences
    (None, "empty sequence", inserted(sequence(b""))),
    (None, "sequence of a thousand items", inserted(sequence(item(b"") * 1000))),
    (
        None,
        "patient in a private sequence",
        inserted(sequence(item(element(0x00100010, "PN", "Doe^Jane")))),
    ),
    (None, "5,000 sequences of known length", inserted(nested(5_000))),
    ("not-dicom", "item beyond the file", inserted(sequence(item(GARBAGE, 1 << 31)))),
    ("not-dicom", "no item in a sequence", inserted(sequence(GARBAGE))),
    (
        "not-dicom",
        "sequence cut",
        lambda raw: inserted(sequence(b"", end=b""))(
            cut("Modality")(raw) + elements(raw)[0x00080060]
        ),
    ),
    ("not-ct", "end of an item, but no item", inserted(bytes.fromhex("feff0de000000000"))),
    (
        "header-size",
        "each item reads all that follows",
        inserted(sequence((ITEM + element(NOTE + 1, "OB", b"", UNDEFINED)) * 20_000, end=b"")),
    ),
    ("header-size", "a million empty elements", inserted(element(NOTE, "LO") * (1 << 20))),
    (
        "header-size",
        "8 MiB in pieces",
        inserted(element(NOTE, "OB", item(bytes(8 << 20)) + b"x", UNDEFINED)),
    ),
    (None, "8 MiB that are skipped", inserted(element(NOTE, "OB", bytes(8 << 20)))),
    # long values
    ("bad-tag", "image type of 4 million words", huge_text("ImageType", 8)),
    ("bad-tag", "64 kB of patients", huge_text("PatientID", 1)),
    ("bad-tag", "character set of 4 million", huge_text("SpecificCharacterSet", 8)),
    ("bad-tag", "place of 2 million numbers", implicit(huge_text("ImagePositionPatient", 4))),
    ("bad-tag", "slope of a megabyte", implicit(put("RescaleSlope", "UC", b"9" * (1 << 20)))),
    ("bad-tag", "slope of 60,000 digits", put("RescaleSlope", "DS", "9" * 60_000)),
    ("bad-tag", "place of 30,000 numbers", put("ImagePositionPatient", "DS", "1\\" * 30_000)),
    (None, "kernel of 60 kB", put("ConvolutionKernel", "SH", "B" * 60_000)),
    (None, "maker of control characters", put("Manufacturer", "LO", "\x1b[2J\r\n\0")),
    # encodings
    (None, "unknown encoding", put("SpecificCharacterSet", "CS", "DOE^JANE")),
    (
        None,
        "many encodings",
        put("SpecificCharacterSet", "CS", "\\".join(["ISO 2022 IR 87"] * 500)),
    ),
    (
        None,
        "wrong encoding",
        both(
            put("SpecificCharacterSet", "CS", "ISO_IR 192"),
            put("Manufacturer", "LO", b"\xff\xfe\xc3"),
        ),
    ),
    (
        None,
        "escapes to nowhere",
        both(
            put("SpecificCharacterSet", "CS", "\\ISO 2022 IR 149"),
            put("Manufacturer", "LO", b"\x1b$)C\x1b\x1b(Doe"),
        ),
    ),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The files of a sound series, head first."""
    files = write_series(tmp_path_factory.mktemp("sound"), VOLUME)
    frame = put("FrameOfReferenceUID", "UI", "1.2.3.4")
    return [frame(path.read_bytes()) for path in files]


@pytest.mark.parametrize(
    ("rule", "damage"),
    [pytest.param(rule, damage, id=name.replace(" ", "-")) for rule, name, damage in BAD_FILES],
)
def test_one_bad_file_of_a_series(
    tmp_path: Path,
    sound: list[bytes],
    rule: str | None,
    damage: Damage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "Doe"
    folder.mkdir()
    files = [folder / f"{number}.dcm" for number in range(SLICES)]
    for path, raw in zip(files, sound, strict=True):
        path.write_bytes(raw)
    # The slice at -290 mm.
    files[3].write_bytes(damage(sound[3]))
    assert_bounded(files, rule, caplog)


def assert_bounded(files: list[Path], rule: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Reads a series and looks at the outcome, at time, memory, and all that was said."""
    outcome, reason, told = None, "", ""
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG), bounds():
        warnings.simplefilter("always")
        series, refused = find_series(files[0].parent)
        try:
            volume, tags = read_series(files)
        except UnreadableCase as error:
            outcome, reason = error.rule, error.reason
    assert outcome == rule, reason
    assert len(reason) < 250
    if rule is None:
        np.testing.assert_array_equal(volume.hu, VOLUME.hu)
        told = repr(tags)
    # Nothing vanishes but what says of itself that it is another kind of image.
    found = {path for one in series for path in one.files} | {one.path for one in refused}
    assert found >= set(files) - {files[3]}
    told += reason + "".join(one.reason + one.rule for one in refused)
    told += caplog.text + "".join(str(one.message) for one in warned)
    assert not [text for text in (*PRIVATE, str(files[0].parent)) if text in told], told
    assert told.isprintable()


FOLDERS: list[tuple[str | None, Callable[[Path], object]]] = [
    # rule of the refused file (None: it is passed over), what lies beside the series
    ("not-dicom", lambda folder: (folder / "x.dcm").touch()),
    ("not-dicom", lambda folder: (folder / "x.IMA").write_bytes(bytes(131))),
    ("not-dicom", lambda folder: (folder / "x").write_bytes(bytes(128) + b"DICM")),
    ("size", lambda folder: sparse(folder / "x.dcm", 1 << 40)),
    (None, lambda folder: (folder / "x.dcm").mkdir()),
    (None, lambda folder: (folder / "x.dcm").symlink_to("x.dcm")),
    (None, lambda folder: (folder / "x.dcm").symlink_to("gone.dcm")),
    (None, lambda folder: (folder / "x.dcm").symlink_to("0.dcm")),
    ("link", lambda folder: (folder / "x.dcm").symlink_to("/dev/zero")),
    ("link", lambda folder: (folder / "x").symlink_to("../..")),
    (None, lambda folder: os.mkfifo(folder / "x.dcm")),
    (None, lambda folder: folder.joinpath(*["deep"] * 300).mkdir(parents=True)),
    ("not-dicom", lambda folder: Path(os.fsdecode(bytes(folder) + b"/\xff\xfe.dcm")).touch()),
    ("not-dicom", lambda folder: (folder / "Doe\n^Jane\x1b.dcm").touch()),
    (None, lambda folder: (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + GARBAGE)),
]


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


@pytest.mark.parametrize(("rule", "place"), FOLDERS)
def test_what_lies_beside_a_series(
    tmp_path: Path,
    sound: list[bytes],
    rule: str | None,
    place: Callable[[Path], object],
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, raw in enumerate(sound):
        (folder / f"{number}.dcm").write_bytes(raw)
    place(folder)
    with bounds():
        series, refused = find_series(folder)
    assert [one.rule for one in refused] == ([] if rule is None else [rule])
    assert [len(one.files) for one in series] == [SLICES]


def test_what_is_gone_or_no_file_when_it_is_read(tmp_path: Path, sound: list[bytes]) -> None:
    files = [tmp_path / f"{number}.dcm" for number in range(SLICES)]
    for path, raw in zip(files, sound, strict=True):
        path.write_bytes(raw)
    (series,), _ = find_series(tmp_path)
    for change in (lambda: None, lambda: os.mkfifo(files[3]), files[3].mkdir):
        files[3].unlink(missing_ok=True)
        change()
        with pytest.raises(UnreadableCase) as refusal:
            read_series(series.files)
        assert refusal.value.rule == "unreadable"
        assert str(tmp_path) not in refusal.value.reason


def test_a_series_without_end_is_refused_unread(tmp_path: Path) -> None:
    with bounds(max_cpu_s=0.5), pytest.raises(UnreadableCase) as refusal:
        read_series([tmp_path / "x.dcm"] * 100_000)
    assert refusal.value.rule == "slice-count"


EVERY_SLICE: list[tuple[str | None, str, Damage]] = [
    # rule, what it is, what is done to all slices
    ("duplicate-slice", "one place", moved((0, 0, 0))),
    ("spacing", "25 cm apart", lambda raw: apart(raw, 100)),
    ("spacing", "a micrometre apart", lambda raw: apart(raw, 2e-3 / 2.5)),
    ("duplicate-slice", "nanometres apart", lambda raw: apart(raw, 1e-6)),
    (
        "size",
        "3 x 5000 pixels",
        both(put("Rows", "US", b"\3\0"), put("Columns", "US", b"\x88\x13")),
    ),
    (
        "pixel-data",
        "2 GiB of zeros",
        both(put("Rows", "US", b"\0\x10"), put("Columns", "US", b"\0\x10")),
    ),
    ("hu-range", "beyond int16", put("RescaleIntercept", "DS", "99999 ")),
    (None, "no frame of reference", without("FrameOfReferenceUID")),
    (None, "big-endian words in RLE", coded(RLELossless)),
    (None, "JPEG 2000", coded(JPEG2000Lossless)),
    (None, "JPEG", coded(JPEGLosslessSV1)),
    (None, "implicit", implicit(lambda raw: raw)),
]


def apart(raw: bytes, factor: float) -> bytes:
    """The distance from the slice at -290 mm scaled."""
    x, y, z = elements(raw)[0x00200032][8:].decode().split("\\")
    place = f"{x}\\{y}\\{-290 + factor * (float(z) + 290):.9g}"
    return put("ImagePositionPatient", "DS", place)(raw)


@pytest.mark.parametrize(
    ("rule", "damage"),
    [pytest.param(rule, damage, id=name.replace(" ", "-")) for rule, name, damage in EVERY_SLICE],
)
def test_a_whole_bad_series(
    tmp_path: Path,
    sound: list[bytes],
    rule: str | None,
    damage: Damage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = [tmp_path / f"{number}.dcm" for number in range(SLICES)]
    for path, raw in zip(files, sound, strict=True):
        path.write_bytes(damage(raw))
    assert_bounded(files, rule, caplog)


def test_a_run_unpacks_to_no_more_than_the_slice_needs(tmp_path: Path) -> None:
    """128 MiB would come out of each part."""
    part = b"\x81\x00" * (1 << 20)
    frame = struct.pack("<3I", 2, 64, 64 + len(part)) + bytes(52) + part + part
    volume = small_volume(SLICES, 1)
    big = (put("Rows", "US", b"\0\4"), put("Columns", "US", b"\0\4"))
    bomb = both(*big, coded(RLELossless, encapsulated(frame)))
    files = write_series(tmp_path, volume)
    for path in files:
        path.write_bytes(bomb(path.read_bytes()))
    with bounds(max_bytes=160 << 20):
        volume, _ = read_series(files)
    assert (volume.hu == -1024).all()


@pytest.mark.parametrize("count", [MANY, pytest.param(2_000, marks=pytest.mark.slow)])
def test_mutants_are_read_or_refused(tmp_path: Path, count: int) -> None:
    with bounds(max_cpu_s=count, max_bytes=128 << 20):
        outcomes, slowest_s = run_mutants(tmp_path, count, seed=count)
    read = outcomes.pop("read")
    assert read + sum(outcomes.values()) >= count
    assert read > count // 20
    assert len(outcomes) > 8
    assert slowest_s < 5
