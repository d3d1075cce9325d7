"""Which files are what they say they are: synthetic, and not altered since they were exported."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raysynth.errors import InputError, UnreadableCase
from raysynth.export.bundle import FILES, PASSPORT, files_in
from raysynth.export.dicom import REST, read_marks
from raysynth.export.nifti import nifti_passport
from raysynth.export.passport import MAX_BYTES, Passport, flaw, unpacked
from raysynth.export.plain_zarr import zarr_passports
from raysynth.export.png import png_passport
from raysynth.formats.nifti import nifti_shape

Verdict = Literal["valid", "altered", "unmarked"]

MAX_VOXELS = 2**31
"""Of a file that is read."""

WORDS = (".md", ".txt", ".csv", ".yaml", ".yml")
"""Files of words alone: nobody takes them for an image."""


@dataclass(frozen=True)
class Checked:
    """What was found of a file.

    Attributes:
        path: of the file; of a part of a Zarr hierarchy, its path in there after it.
        verdict: `valid`, `altered` or `unmarked`.
        reason: what was altered, or why it counts as unmarked; empty if it is valid.
    """

    path: str
    verdict: Verdict
    reason: str = ""


def verify(path: Path) -> list[Checked]:
    """Checks a file, or all files of a folder that are no mere words.

    Args:
        path: of either.

    Raises:
        InputError: there is nothing there, or nothing to check.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    found = list(_walk(path))
    if not found:
        raise InputError(f"{path}: there are no files in it to check")
    return found


def _walk(path: Path) -> Iterator[Checked]:
    if path.is_symlink():
        yield Checked(str(path), "unmarked", "it is a link, which is not followed")
    elif path.is_dir():
        if (path / "zarr.json").exists():
            yield from _check_zarr(path)
        elif (path / PASSPORT).exists():
            yield from _check_model(path)
        else:
            for one in sorted(path.iterdir()):
                yield from _walk(one)
    elif not path.name.endswith(WORDS):
        yield _check_file(path)


def _check_file(path: Path) -> Checked:
    try:
        if path.name.lower().endswith(".dcm"):
            return _check_dicom(path)
        passport, *content = _read(path)
    except UnreadableCase as error:
        return Checked(str(path), "unmarked", f"it is no export ({error})")
    except Exception as error:  # whatever a reader finds in a file that somebody altered
        return Checked(str(path), "altered", f"it cannot be read ({type(error).__name__})")
    return _judged(str(path), passport, *content)


def _judged(name: str, passport: Passport | None, *content: Any) -> Checked:
    if passport is None:
        return Checked(name, "unmarked", "it carries no mark and passport of raysynth")
    if (reason := flaw(passport, *content)) is not None:
        return Checked(name, "altered", reason)
    return Checked(name, "valid")


def _read(path: Path) -> tuple[Any, ...]:
    """Passport, voxels and geometry of a file, as far as it has them, by its ending."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        count = 1
        for side in nifti_shape(path):
            count *= side
        if count > MAX_VOXELS:
            raise InputError(f"{path}: {count:,} voxels")
        return nifti_passport(path)
    if name.endswith(".png"):
        return png_passport(path)
    if name.endswith(".npz"):
        return _read_npz(path)
    if name.endswith(".json"):
        with path.open("rb") as file:
            return (unpacked(file.read(MAX_BYTES + 1)),)
    return (None,)


def _check_dicom(path: Path) -> Checked:
    marks = read_marks(path)
    passport = marks.passport if marks.is_synthetic else None
    found = _judged(str(path), passport, marks.pixels)
    if passport is not None and not found.reason and passport.get(REST) != marks.rest:
        return Checked(str(path), "altered", "what it says beside its passport")
    return found


def _read_npz(path: Path) -> tuple[Any, ...]:
    """Of a sample as the service sends it."""
    with zipfile.ZipFile(path) as archive:
        size = sum(one.file_size for one in archive.infolist())
    if size > 2 * MAX_VOXELS:
        raise InputError(f"{path}: {size:,} bytes")
    with np.load(path, allow_pickle=False) as arrays:
        return unpacked(str(arrays["facts"])), arrays["hu"]


def _check_model(path: Path) -> Iterator[Checked]:
    """A model's folder lists its files in its passport."""
    passport = unpacked((path / PASSPORT).read_bytes()[: MAX_BYTES + 1])
    found = _judged(str(path / PASSPORT), passport)
    yield found
    if passport is None or found.reason:
        return
    there = files_in(path)
    for name, digest in passport[FILES].items():
        if there.pop(name, None) == digest:
            yield Checked(str(path / name), "valid")
        else:
            yield Checked(str(path / name), "altered", "it is not the file that was released")
    for name in there:
        yield Checked(str(path / name), "unmarked", "it was not released with this model")


def _check_zarr(path: Path) -> Iterator[Checked]:
    try:
        for name, attributes, values in zarr_passports(path):
            passport = unpacked(json.dumps(attributes))
            yield _judged(f"{path}/{name}".rstrip("/"), passport, values)
    except Exception as error:  # as above
        yield Checked(str(path), "altered", f"it cannot be read ({type(error).__name__})")
