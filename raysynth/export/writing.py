"""What a format is given of a run, and how its files are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysynth.export.passport import Passport


@dataclass(frozen=True)
class RunFacts:
    """What is the same for all samples of a run.

    Attributes:
        run: its name.
        count: samples that are written.
        shape: of one.
        spacing_mm: between planes, and of a pixel.
        intensity: `hu` or `relative`.
        passport: of the run, as the store has it.
    """

    run: str
    count: int
    shape: tuple[int, ...]
    spacing_mm: tuple[float, float]
    intensity: str
    passport: Passport


@dataclass(frozen=True)
class ExportedSample:
    """A sample that may leave.

    Attributes:
        name: of its files.
        number: among those that leave, from 0.
        hu: int16 (y, x) or (z, y, x).
        layout: its labels.
        is_mixed: whether some of its voxels are those of a real scan.
        passport: without hashes of files.
    """

    name: str
    number: int
    hu: NDArray[np.int16]
    layout: NDArray[np.uint8]
    is_mixed: bool
    passport: Passport


Write = Callable[[ExportedSample], None]
Format = Callable[[Path, RunFacts], AbstractContextManager[Write]]
"""Opens a folder for a run's samples; what is left to be written is, when it closes."""


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_bytes(content)
    os.replace(part, path)


def write_json(path: Path, passport: Passport) -> None:
    """Writes a sealed passport as a file of its own, whole or not at all."""
    text = json.dumps(passport, indent=1, allow_nan=False) + "\n"
    write_file(path, text.encode())
