"""Writes small NIfTI, NRRD and MetaImage files, whole or faulty, for tests."""

from __future__ import annotations

import gzip
import random
import re
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from raysynth.errors import UnreadableCase
from raysynth.formats.image import labels_of, read_image, volume_of
from raysynth.volume import Volume

SHAPE = (4, 3, 5)
SPACING_MM = (2.5, 0.7, 0.8)
ORIGIN_MM = (-300.0, -120.0, -140.0)
PRIVATE = "Jane^Doe"
"""Stands in every header; no message may repeat it."""


def small_values(dtype: str = "<i2") -> NDArray[Any]:
    """Values (z, y, x) that tell all voxels apart, in the range of CT."""
    z, y, x = np.indices(SHAPE)
    return (500 * z - 100 * y + x - 800).astype(dtype)


def nifti(values: NDArray[Any] | None = None, *, version: int = 1, **fields: object) -> bytes:
    """A NIfTI file with an sform; `fields` replace those of its header, unchecked."""
    values = small_values() if values is None else values
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    order = ">" if values.dtype.byteorder == ">" else "<"
    header = kind(endianness=order)
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape[::-1])
    (z_mm, y_mm, x_mm), (z, y, x) = SPACING_MM, ORIGIN_MM
    affine = np.diag([-x_mm, -y_mm, z_mm, 1.0])
    affine[:3, 3] = -x, -y, z
    header.set_sform(affine, 1)
    header["pixdim"][1:4] = x_mm, y_mm, z_mm
    header["magic"] = b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = 352 if version == 1 else 544
    header["descrip"] = PRIVATE
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4) + values.tobytes()


def nrrd(values: bytes | None = None, **fields: str | None) -> bytes:
    """A NRRD file; `fields` (with _ for the space in a name) replace its lines, None deletes."""
    lines = {
        "content": PRIVATE,
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "5 3 4",
        "space directions": "(0.8,0,0) (0,0.7,0) (0,0,2.5)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(-140,-120,-300)",
    }
    text = "".join(f"{name}: {value}\n" for name, value in _replaced(lines, fields).items())
    body = small_values().tobytes() if values is None else values
    return f"NRRD0004\n# {PRIVATE}\n{text}patient:={PRIVATE}\n\n".encode() + body


def metaimage(values: bytes | None = None, **fields: str | None) -> bytes:
    """A MetaImage file; `fields` replace its lines, None deletes."""
    lines = {
        "ObjectType": "Image",
        "Comment": PRIVATE,
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-140 -120 -300",
        "ElementSpacing": "0.8 0.7 2.5",
        "DimSize": "5 3 4",
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    }
    lines = _replaced(lines, fields)
    name = lines.pop("ElementDataFile", None)
    text = "".join(f"{key} = {value}\n" for key, value in lines.items())
    if name is not None:
        text += f"ElementDataFile = {name}\n"
    body = small_values().tobytes() if values is None else values
    return text.encode() + (body if name == "LOCAL" else b"")


def _replaced(lines: dict[str, str], fields: dict[str, str | None]) -> dict[str, str]:
    # Names that start with a capital are MetaImage's, which have no spaces.
    named = {name if name[0].isupper() else name.replace("_", " "): fields[name] for name in fields}
    return {name: value for name, value in (lines | named).items() if value is not None}


def bomb(container: str, head: bytes = b"", mebibytes: int = 64) -> bytes:
    """Zeros behind `head`, packed about a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if container == "gzip" else 15)
    packed = packer.compress(head)
    for _ in range(mebibytes):
        packed += packer.compress(bytes(1 << 20))
    return packed + packer.flush()


def valid_files() -> dict[str, dict[str, bytes]]:
    """Small valid images: by name of the file to open, the contents of all its files."""
    raw = small_values().tobytes()
    labels = small_values("u1")
    return {
        "a.nii": {"a.nii": nifti()},
        "b.nii.gz": {"b.nii.gz": gzip.compress(nifti(), mtime=0)},
        "c.nii": {"c.nii": nifti(small_values(">f4"), version=2, scl_slope=2.0, scl_inter=1.0)},
        "d.nrrd": {"d.nrrd": nrrd()},
        "e.nrrd": {"e.nrrd": nrrd(gzip.compress(raw, mtime=0), encoding="gzip")},
        "f.nhdr": {"f.nhdr": nrrd(b"", data_file="f.raw"), "f.raw": raw},
        "g.mha": {"g.mha": metaimage()},
        "h.mha": {
            "h.mha": metaimage(
                zlib.compress(raw),
                CompressedData="True",
                CompressedDataSize=str(len(zlib.compress(raw))),
            )
        },
        "i.mhd": {
            "i.mhd": metaimage(ElementDataFile="i.zraw", CompressedData="True"),
            "i.zraw": zlib.compress(raw),
        },
        "j.mha": {"j.mha": metaimage(labels.tobytes(), ElementType="MET_UCHAR")},
    }


_NASTY = (
    *(b"0", b"-1", b"1", b"3", b"nan", b"inf", b"1e999", b"-0", b"1e-320", b"65536", b"4096"),
    *(b"2147483648", b"1099511627776", b"9" * 400, b"", b" ", b"..", b"/", b"\xff", b"\0", b"1_0"),
)


def mutant(raw: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three kinds of damage."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(raw) + 1)
        size = rng.choice([1, 1, 2, 4, 8, 64])
        match rng.randrange(7):
            case 0:
                raw = raw[:at]
            case 1:
                raw = raw[:at] + raw[at + size :]
            case 2:
                raw = raw[:at] + rng.randbytes(size) + raw[at:]
            case 3:
                raw = raw[:at] + rng.randbytes(size) + raw[at + size :]
            case 4:
                other = rng.randrange(len(raw) + 1)
                raw = raw[:at] + raw[other : other + 8 * size] + raw[at:]
            case _:
                words = list(re.finditer(rb"[-+.0-9a-zA-Z]+", raw))
                if words:
                    word = rng.choice(words)
                    raw = raw[: word.start()] + rng.choice(_NASTY) + raw[word.end() :]
    return raw


def run_mutants(folder: Path, count: int, seed: int) -> tuple[Counter[str], float]:
    """Reads `count` damaged files of every format, and what is read, as volume and labels too.

    Any exception but UnreadableCase passes on to the caller.

    Returns:
        How often each rule refused one, and how many were read; the seconds of the slowest.
    """
    rng = random.Random(seed)
    images = valid_files()
    grid = Volume(small_values().astype(np.int16), SPACING_MM, ORIGIN_MM)
    outcomes: Counter[str] = Counter()
    slowest_s = 0.0
    for number in range(count):
        opened = list(images)[number % len(images)]
        files = dict(images[opened])
        damaged = rng.choice(list(files))
        if damaged.endswith(".gz") and rng.random() < 0.7:
            files[damaged] = gzip.compress(mutant(gzip.decompress(files[damaged]), rng), 1, mtime=0)
        else:
            files[damaged] = mutant(files[damaged], rng)
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        start = time.perf_counter()
        try:
            image = read_image(folder / opened)
            outcomes["read"] += 1
            volume_of(image, rng.choice(["hu", "relative"]))
            labels_of(image, grid)
        except UnreadableCase as error:
            outcomes[error.rule] += 1
        slowest_s = max(slowest_s, time.perf_counter() - start)
    return outcomes, slowest_s
