"""Which files are what they say they are: synthetic, and not altered since they were exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raysynth.errors import InputError
from raysynth.export.bundle import PASSPORT
from raysynth.export.nifti import nifti_passport
from raysynth.export.passport import MAX_BYTES, Passport, flaw, unpacked
from raysynth.export.plain_zarr import zarr_passports
from raysynth.export.png import png_passport
from raysynth.formats.nifti import nifti_shape
from raysynth.models.bundle import FACTS, bundle_digest

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
        elif (path / FACTS).exists():
            yield _check_bundle(path)
        else:
            for one in sorted(path.iterdir()):
                yield from _walk(one)
    elif not path.name.endswith(WORDS):
        yield _check_file(path)


def _check_file(path: Path) -> Checked:
    try:
        passport, *content = _read(path)
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
    if name.endswith(".json"):
        with path.open("rb") as file:
            return (unpacked(file.read(MAX_BYTES + 1)),)
    return (None,)


def _check_bundle(path: Path) -> Checked:
    """A bundle is checked as a whole, by its digest."""
    try:
        passport = unpacked((path / PASSPORT).read_bytes()[: MAX_BYTES + 1])
    except OSError:
        passport = None
    found = _judged(str(path), passport)
    if passport is not None and not found.reason and passport["bundle"] != bundle_digest(path):
        return Checked(str(path), "altered", "its files are not those of its digest")
    return found


def _check_zarr(path: Path) -> Iterator[Checked]:
    try:
        for name, attributes, values in zarr_passports(path):
            passport = unpacked(json.dumps(attributes))
            yield _judged(f"{path}/{name}".rstrip("/"), passport, values)
    except Exception as error:  # as above
        yield Checked(str(path), "altered", f"it cannot be read ({type(error).__name__})")
