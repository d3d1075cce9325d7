"""Writes small DICOM CT series, whole or faulty, for tests."""

from __future__ import annotations

import io
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom import find_series, read_series
from raysynth.formats.dicom_file import hushed
from raysynth.formats.dicom_slice import PADDING_HU, identify, read_header, read_hu
from raysynth.volume import Volume

SERIES_UID = "1.2.826.0.1.3680043.8.498.7"
INTERCEPT = -1024

Edit = Callable[[Dataset, int], None]


def small_volume(slices: int = 10, side: int = 16) -> Volume:
    """Voxels that tell planes, rows and columns apart, on a grid with three different spacings."""
    z, y, x = np.indices((slices, side, side))
    hu = (100 * z - 10 * y + x - 700).astype(np.int16)
    return Volume(hu, spacing_mm=(2.5, 0.7, 0.8), origin_mm=(-300.0, -120.0, -140.0))


def write_series(
    folder: Path,
    volume: Volume,
    *,
    edit: Edit | None = None,
    series_uid: str = SERIES_UID,
    patient_id: str = "PATIENT-1",
) -> list[Path]:
    """Writes one file a plane, head first, and returns them.

    Args:
        edit: changes the data set of plane number `int` (from the feet) before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, plane in enumerate(reversed(range(volume.shape[0]))):
        tags = ct_slice(volume, plane, series_uid, patient_id)
        if edit is not None:
            edit(tags, plane)
        files.append(folder / f"{number:04d}.dcm")
        tags.save_as(files[-1], enforce_file_format=True)
    return files


def ct_slice(volume: Volume, plane: int, series_uid: str, patient_id: str) -> Dataset:
    """One plane as a CT image with names, dates and ids that no reader should pass on."""
    tags = Dataset()
    tags.file_meta = FileMetaDataset()
    tags.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    tags.SOPClassUID = CTImageStorage
    tags.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(plane)])
    tags.SeriesInstanceUID = series_uid
    tags.StudyInstanceUID = f"{series_uid}.1"
    tags.PatientID = patient_id
    tags.PatientName = "Doe^Jane"
    tags.StudyDate = "19991231"
    tags.InstitutionName = "St. Elsewhere"
    tags.Modality = "CT"
    tags.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    tags.Manufacturer = "TOSHIBA"
    tags.ConvolutionKernel = ["I30f", "3"]
    tags.KVP = 120
    tags.SliceThickness = 2.5
    tags.InstanceNumber = plane + 1
    z_mm, y_mm, x_mm = volume.position_mm((plane, 0, 0))
    tags.ImagePositionPatient = [round(value, 6) for value in (x_mm, y_mm, z_mm)]
    _, column, row = volume.direction.T[:, ::-1]
    tags.ImageOrientationPatient = [*row, *column]
    tags.PixelSpacing = [*volume.spacing_mm[1:]]
    tags.Rows, tags.Columns = volume.shape[1:]
    tags.SamplesPerPixel = 1
    tags.PhotometricInterpretation = "MONOCHROME2"
    tags.BitsAllocated = tags.BitsStored = 16
    tags.HighBit = 15
    tags.PixelRepresentation = 1
    tags.RescaleSlope = 1
    tags.RescaleIntercept = INTERCEPT
    tags.PixelData = (volume.hu[plane] - INTERCEPT).astype("<i2").tobytes()
    return tags


Damage = Callable[[bytes], bytes]
"""What is done to the bytes of a file."""

PIXEL_DATA = 0x7FE00010
UNDEFINED = 0xFFFFFFFF
_LONG = ("OB", "OW", "OF", "SQ", "UC", "UN", "UT", "UR")


def element(tag: int, vr: str, value: bytes | str = b"", length: int | None = None) -> bytes:
    """An explicit little-endian element; `length` is what it says of itself, if that is a lie."""
    value = value.encode("latin-1") if isinstance(value, str) else value
    length = len(value) if length is None else length
    form = "<HH2sxxI" if vr in _LONG else "<HH2sH"
    return struct.pack(form, tag >> 16, tag & 0xFFFF, vr.encode(), length) + value


def elements(raw: bytes) -> dict[int, bytes]:
    """The elements of an explicit little-endian file without sequences, each as it stands there."""
    found, at = {}, 132
    while at < len(raw):
        group, number, vr, length = struct.unpack_from("<HH2sH", raw, at)
        size = 8 + length
        if vr.decode() in _LONG:
            size = 12 + struct.unpack_from("<I", raw, at + 8)[0]
        found[group << 16 | number] = raw[at : at + size]
        at += size
    return found


def joined(parts: dict[int, bytes]) -> bytes:
    """The file of such elements."""
    return bytes(128) + b"DICM" + b"".join(parts.values())


def put(name: str, vr: str, value: bytes | str = b"", length: int | None = None) -> Damage:
    """Replaces an element, or adds it at its place."""
    tag = tag_for_keyword(name)
    assert tag is not None

    def damage(raw: bytes) -> bytes:
        parts = elements(raw) | {tag: element(tag, vr, value, length)}
        return joined(dict(sorted(parts.items())))

    return damage


def without(*names: str) -> Damage:
    """Takes elements out."""

    def damage(raw: bytes) -> bytes:
        parts = elements(raw)
        for name in names:
            del parts[tag_for_keyword(name)]
        return joined(parts)

    return damage


def cut(name: str, more: int = 0) -> Damage:
    """Ends the file so many bytes behind the start of an element."""

    def damage(raw: bytes) -> bytes:
        before = dict(elements(raw))
        while tag_for_keyword(name) in before:
            before.popitem()
        return raw[: len(joined(before)) + more]

    return damage


def inserted(new: bytes, before: str = "Modality") -> Damage:
    """Puts bytes in front of an element."""

    def damage(raw: bytes) -> bytes:
        parts = elements(raw)
        tag = tag_for_keyword(before)
        return joined(parts | {tag: new + parts[tag]})

    return damage


def both(*damages: Damage) -> Damage:
    """One after the other."""

    def damage(raw: bytes) -> bytes:
        for one in damages:
            raw = one(raw)
        return raw

    return damage


def encapsulated(*fragments: bytes, table: bytes = b"", end: bool = True) -> bytes:
    """The value of PixelData in fragments, behind a table of their offsets."""
    items = b"".join(
        struct.pack("<HHI", 0xFFFE, 0xE000, len(one)) + one for one in (table, *fragments)
    )
    return items + (struct.pack("<HHI", 0xFFFE, 0xE0DD, 0) if end else b"")


def coded(syntax: str, value: bytes | None = None) -> Damage:
    """Another transfer syntax; its pixels, or those of the slice coded in it."""

    def damage(raw: bytes) -> bytes:
        packed = value
        if packed is None:
            pixels = np.frombuffer(elements(raw)[PIXEL_DATA][12:], "<u2")
            packed = encapsulated(CODERS[syntax](pixels))
        pixel_data = put("PixelData", "OB", packed, UNDEFINED)
        return both(put("TransferSyntaxUID", "UI", syntax), pixel_data)(raw)

    return damage


def run_length(pixels: np.ndarray) -> bytes:
    """A frame of 16-bit pixels, run-length coded without runs."""
    low, high = (pixels.view(np.uint8)[first::2].tobytes() for first in (0, 1))
    parts = [
        b"".join(
            bytes([len(part[at : at + 128]) - 1]) + part[at : at + 128]
            for at in range(0, len(part), 128)
        )
        for part in (high, low)
    ]
    return struct.pack("<3I", 2, 64, 64 + len(parts[0])) + bytes(52) + b"".join(parts)


def jpeg2000(pixels: np.ndarray) -> bytes:
    """A frame of square 16-bit pixels as a lossless JPEG 2000 codestream."""
    side = round(pixels.size**0.5)
    stream = io.BytesIO()
    image = Image.fromarray(pixels.reshape(side, side))
    image.save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    return stream.getvalue()


def jpeg(pixels: np.ndarray) -> bytes:
    """A frame of square 16-bit pixels as a lossless JPEG codestream."""
    side = round(pixels.size**0.5)
    return bytes(imagecodecs.ljpeg_encode(pixels.reshape(side, side), bitspersample=16))


CODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    RLELossless: run_length,
    JPEG2000Lossless: jpeg2000,
    JPEGLosslessSV1: jpeg,
}


def in_syntax(volume: Volume, plane: int, syntax: str) -> bytes:
    """The file of one plane in a coding of tags and pixels."""
    tags = ct_slice(volume, plane, SERIES_UID, "PATIENT-1")
    plain = (ImplicitVRLittleEndian, ExplicitVRBigEndian)
    if syntax == ExplicitVRBigEndian:
        tags.PixelData = np.frombuffer(tags.PixelData, "<i2").astype(">i2").tobytes()
    if syntax in plain:
        tags.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    tags.save_as(stream, enforce_file_format=True)
    raw = stream.getvalue()
    return coded(syntax)(raw) if syntax in CODERS else raw


SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    *CODERS,
)


def mutant(raw: bytes, rng: random.Random) -> bytes:
    """The bytes behind the preamble with one to three kinds of damage."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        damaged = bytearray(raw)
        # Most of a file is names and pixels, and most of what can go wrong is between them.
        end = min(rng.choice([600, 1200, len(raw)]), len(raw))
        at = rng.randrange(128, max(end, 129))
        size = rng.choice([1, 1, 2, 4, 8, 64])
        match rng.randrange(10):
            case 0 if len(raw) > 300:
                del damaged[at:]
            case 1:
                del damaged[at : at + size]
            case 2:
                damaged[at:at] = rng.randbytes(size)
            case 3:
                damaged[at : at + size] = rng.randbytes(size)
            case 4:
                other = rng.randrange(len(raw))
                damaged[at:at] = raw[other : other + 8 * size]
            case 5 | 6:
                _spoil_length(damaged, rng)
            case _ if at < len(raw):
                damaged[at] ^= 1 << rng.randrange(8)
        raw = bytes(damaged)
    return raw


def _spoil_length(raw: bytearray, rng: random.Random) -> None:
    """Changes the length of an element or fragment."""
    marks = [b"UI", b"CS", b"DS", b"US", b"LO", b"OW", b"OB", b"IS", b"\xfe\xff\x00\xe0"]
    mark = rng.choice(marks)
    places = [at for at in range(132, len(raw) - 12) if raw.startswith(mark, at)]
    if places:
        at = rng.choice(places) + (4 if mark in marks[5:7] or len(mark) == 4 else 2)
        is_long = mark in marks[5:7] or len(mark) == 4
        length = rng.choice([0, 1, 3, 7, 255, 0x7FFF, 0xFFFF, 1 << 20, 1 << 31, UNDEFINED - 1])
        if is_long:
            struct.pack_into("<I", raw, at, rng.choice([length, UNDEFINED]))
        else:
            struct.pack_into("<H", raw, at, length & 0xFFFF)


def run_mutants(folder: Path, count: int, seed: int) -> tuple[Counter[str], float]:
    """Reads `count` damaged slices of every coding; every tenth, and what is read, as a series.

    Any exception but UnreadableCase passes on to the caller, and so does a volume that is none.

    Returns:
        How often each rule refused one, and how many were read; the seconds of the slowest.
    """
    rng = random.Random(seed)
    volume = small_volume(slices=8, side=8)
    files = write_series(folder, volume)
    path = files[3]
    slices = [in_syntax(volume, 4, syntax) for syntax in SYNTAXES]
    outcomes: Counter[str] = Counter()
    slowest_s = 0.0
    for number in range(count):
        path.write_bytes(mutant(slices[number % len(slices)], rng))
        start = time.perf_counter()
        try:
            if number % 10 == 0:
                find_series(folder)
            with hushed():
                identify(path)
                read_hu(read_header(path))
            outcomes["slice read"] += 1
            _assert_plausible(read_series(files)[0])
            outcomes["read"] += 1
        except UnreadableCase as error:
            outcomes[error.rule] += 1
            if not error.reason.isprintable() or len(error.reason) > 250:
                raise AssertionError(error.reason) from error
        slowest_s = max(slowest_s, time.perf_counter() - start)
    return outcomes, slowest_s


def _assert_plausible(volume: Volume) -> None:
    assert volume.shape == (8, 8, 8)
    assert volume.hu.dtype == np.int16
    assert volume.hu.min() > PADDING_HU
    assert 0.05 <= min(volume.spacing_mm) <= max(volume.spacing_mm) <= 20
    assert np.isfinite(volume.origin_mm).all()
    np.testing.assert_allclose(volume.direction.T @ volume.direction, np.eye(3), atol=0.01)
