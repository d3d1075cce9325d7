"""DICOM CT series: found in folders, and read into volumes of Hounsfield units.

Headers come first: whatever is wrong with a series is known before a pixel is decoded.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from raysynth.errors import UnreadableCase
from raysynth.formats.dicom_file import hushed, require
from raysynth.formats.dicom_slice import (
    SPACING_RANGE_MM,
    SliceHeader,
    identify,
    read_header,
    read_hu,
)
from raysynth.volume import Volume

MIN_SLICES = 8
MAX_SLICES = 4096
MAX_VOXELS = 1 << 30

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_THREADS = 2
"""One waits for the disk while the other parses. More fight for the interpreter: with 8, a series
took twice the processor time."""

_PIXELS_AT_ONCE = 1 << 24
"""That threads decode together, which takes some ten bytes each: no less than the largest slice."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Series:
    """The files of one CT series of one patient; `uid` and `patient_id` must not leave ingest."""

    uid: str
    patient_id: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Refused:
    """A file that should have been part of a series; `reason` holds no text out of the file."""

    path: Path
    rule: str
    reason: str


Identity = tuple[str, str] | Refused | None
"""Series UID and patient id of a file; why it is refused; or None for another kind of image."""

Identify = Callable[[Sequence[Path]], list[Identity]]


def find_series(
    folder: Path, spread: Callable[[Identify, Sequence[Path]], list[Identity]] | None = None
) -> tuple[list[Series], list[Refused]]:
    """The CT series below a folder, in any arrangement of sub-folders, from headers alone.

    A file counts as DICOM if its name says so (.dcm, .dicom, .ima) or its first bytes do. All else
    is passed over, and so is DICOM that is not axial CT: radiographs, scouts, DICOMDIR.

    Args:
        folder: where to look.
        spread: does work on a list in parts, on a cluster say; None: all of it here.

    Returns:
        The series, sorted by UID; and what claims to be DICOM but cannot be used.
    """
    candidates, refused = _dicom_files(folder)
    found: dict[str, dict[Path, str]] = defaultdict(dict)
    outcomes = spread(_identify, candidates) if spread else _identify(candidates)
    for path, outcome in zip(candidates, outcomes, strict=True):
        if isinstance(outcome, Refused):
            refused.append(outcome)
        elif outcome is not None:
            series_uid, patient_id = outcome
            found[series_uid][path] = patient_id
    series = []
    for series_uid, patients in sorted(found.items()):
        files = tuple(patients)
        names = set(patients.values())
        if len(names) > 1:
            reason = f"the files of a series name {len(names)} patients: separate them"
            refused.append(Refused(files[0], "mixed-patients", reason))
        elif names == {""}:
            reason = "a series without PatientID, and splits go by patient: give it a pseudonym"
            refused.append(Refused(files[0], "missing-patient", reason))
        else:
            series.append(Series(series_uid, names.pop(), files))
    return series, refused


def read_series(files: Sequence[Path]) -> tuple[Volume, dict[str, str | float]]:
    """Reads one CT series into Hounsfield units.

    A voxel is stored value x slope + intercept, as SimpleITK gives it, with one exception: what
    lies outside the scanned field becomes `AIR_HU`. That is every voxel at or below `PADDING_HU`,
    and every one that holds the PixelPaddingValue, unless this could be tissue (above air).

    Planes ascend towards the head. Rows and columns stay as stored; `direction` says where they
    point (a prone patient's point the other way).

    Args:
        files: the slices, in any order.

    Returns:
        The volume, and those of `dicom_slice.KEPT_TAGS` that are present, in DICOM's units.

    Raises:
        UnreadableCase: the series breaks a rule.
    """
    require(
        MIN_SLICES <= len(files) <= MAX_SLICES,
        "slice-count",
        f"{len(files)} slices; a series needs {MIN_SLICES} to {MAX_SLICES}",
    )
    with hushed():
        headers = _in_threads(read_header, files)
        _check_alike(headers)
        first = headers[0]
        headers.sort(key=lambda header: float(header.position @ first.normal))
        first = headers[0]
        step_mm = _check_stack(headers)
        hu = np.empty((len(headers), *first.shape), dtype=np.int16)

        def fill(plane: int) -> None:
            hu[plane] = read_hu(headers[plane])

        pixels = first.shape[0] * first.shape[1]
        _in_threads(fill, range(len(headers)), max(1, min(_THREADS, _PIXELS_AT_ONCE // pixels)))
    row, column = first.orientation
    row_mm, column_mm = (float(value) for value in first.pixel_mm)
    x_mm, y_mm, z_mm = (float(value) for value in first.position)
    volume = Volume(
        hu,
        spacing_mm=(step_mm, row_mm, column_mm),
        origin_mm=(z_mm, y_mm, x_mm),
        direction=np.stack([first.normal[::-1], column[::-1], row[::-1]], axis=1),
    )
    return volume, first.kept


def _dicom_files(folder: Path) -> tuple[list[Path], list[Refused]]:
    """Regular files below the folder that claim to be DICOM, sorted; and what cannot be looked at.

    No link is followed: what it points to inside the folder is met there anyway.
    """
    refused: list[Refused] = []
    root = os.path.realpath(folder)

    def note(error: OSError) -> None:
        reason = f"a folder or file cannot be opened: {error.strerror}"
        refused.append(Refused(Path(error.filename), "unreadable", reason))

    found = []
    for parent, folders, names in os.walk(folder, onerror=note):
        for path in (Path(parent, name) for name in folders + names):
            try:
                if path.is_symlink():
                    if os.path.commonpath([root, os.path.realpath(path)]) != root:
                        reason = "a link that leaves the folder: put the files themselves there"
                        refused.append(Refused(path, "link", reason))
                    continue
                # A pipe or device is no file: opening it could wait for ever.
                if path.is_file() and _claims_dicom(path):
                    found.append(path)
            except OSError as error:
                note(error)
    return sorted(found), refused


def _claims_dicom(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _identify(paths: Sequence[Path]) -> list[Identity]:
    with hushed():
        return _in_threads(_try_identify, paths)


def _try_identify(path: Path) -> Identity:
    try:
        return identify(path)
    except UnreadableCase as error:
        return Refused(path, error.rule, error.reason)


def _check_alike(headers: Sequence[SliceHeader]) -> None:
    first = headers[0]
    for header in headers:
        require(
            header.series_uid == first.series_uid,
            "mixed-series",
            "the slices belong to several series: read them one by one",
        )
        require(
            header.frame_uid == first.frame_uid,
            "mixed-frame",
            "the slices name several frames of reference: their places cannot be compared",
        )
        require(
            header.shape == first.shape,
            "mixed-size",
            f"slices of {first.shape} and of {header.shape} pixels",
        )
        require(
            bool(np.abs(header.orientation - first.orientation).max() < 1e-3),
            "mixed-orientation",
            "the slices do not lie parallel",
        )
        require(
            bool(np.abs(header.pixel_mm - first.pixel_mm).max() < 1e-4),
            "mixed-spacing",
            f"slices with pixels of {first.pixel_mm.tolist()} and {header.pixel_mm.tolist()} mm",
        )
    voxels = len(headers) * first.shape[0] * first.shape[1]
    require(voxels <= MAX_VOXELS, "size", f"{voxels} voxels; at most {MAX_VOXELS} can be read")


def _check_stack(headers: Sequence[SliceHeader]) -> float:
    """Distance in millimetres of slices sorted along their normal, which must stack evenly."""
    offset = np.stack([header.position for header in headers]) - headers[0].position
    normal = headers[0].normal
    heights = offset @ normal
    steps = np.diff(heights)
    smallest, usual, widest = (float(pick(steps)) for pick in (np.min, np.median, np.max))
    require(smallest > 1e-3, "duplicate-slice", "two slices lie at the same place: remove one")
    require(
        widest < 1.5 * usual,
        "missing-slice",
        f"a gap of {widest:.4g} mm between slices {usual:.4g} mm apart: copy the series again",
    )
    require(
        max(widest - usual, usual - smallest) < max(0.02 * usual, 0.01),
        "uneven-slices",
        f"slices are {smallest:.4g} to {widest:.4g} mm apart: a constant distance is needed",
    )
    shift = float(np.linalg.norm(offset - np.outer(heights, normal), axis=1).max())
    require(
        shift < 0.5 * float(headers[0].pixel_mm.min()),
        "gantry-tilt",
        f"slices shift sideways by up to {shift:.4g} mm (a tilted gantry): resample them first",
    )
    step_mm = float(heights[-1]) / (len(headers) - 1)
    low, high = SPACING_RANGE_MM
    require(
        low <= step_mm <= high,
        "spacing",
        f"slices {step_mm:.4g} mm apart; {low:g} to {high:g} mm can be read",
    )
    return step_mm


def _in_threads(
    work: Callable[[_Item], _Result], items: Sequence[_Item], threads: int = _THREADS
) -> list[_Result]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
