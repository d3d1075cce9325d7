"""Samples as PNG pictures in a lung window, for looking at: 8 bits, so HU are gone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from raysynth.export.passport import Content, Passport, packed, sealed, unpacked
from raysynth.export.writing import ExportedSample, RunFacts, Write, write_file, write_json

WINDOW_HU = (-1350.0, 150.0)
"""The usual window of lungs: level -600, width 1,500."""

KEYWORD = "raysynth"
"""Of the text chunk that holds the passport; `Description` says it to people."""

MARK = "Synthetic image (raysynth), no patient; research only"


@contextmanager
def png_files(folder: Path, facts: RunFacts) -> Iterator[Write]:
    """Writes NAME.png, NAME_labels.png and NAME.json; of a volume its middle plane."""

    def write(sample: ExportedSample) -> None:
        middle = sample.hu.shape[0] // 2
        planes = [one[middle] if one.ndim == 3 else one for one in (sample.hu, sample.layout)]
        parts: tuple[tuple[str, Content, NDArray[Any]], ...] = (
            ("", "preview", in_window(planes[0], WINDOW_HU)),
            ("_labels", "labels", planes[1]),
        )
        for ending, content, values in parts:
            own = sealed(sample.passport | {"window_hu": WINDOW_HU}, content, values)
            write_file(folder / f"{sample.name}{ending}.png", png_bytes(values, own))
        write_json(folder / f"{sample.name}.json", sealed(sample.passport, "text"))

    yield write


def in_window(plane: NDArray[Any], window_hu: tuple[float, float]) -> NDArray[np.uint8]:
    """Grey values of HU, 0 at the window's lower end and below."""
    low, high = window_hu
    return (np.clip((plane - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def png_bytes(values: NDArray[np.uint8], passport: Passport) -> bytes:
    """A grey PNG that says what it is.

    Args:
        values: (y, x).
        passport: sealed.
    """
    told = PngImagePlugin.PngInfo()
    told.add_text("Description", MARK)
    told.add_text(KEYWORD, packed(passport).decode(), zip=True)
    packed_png = io.BytesIO()
    Image.fromarray(values).save(packed_png, "png", pnginfo=told)
    return packed_png.getvalue()


def png_passport(path: Path) -> tuple[Passport | None, NDArray[Any]]:
    """The passport in a PNG's text, and its grey values.

    Raises:
        OSError, ValueError: no PNG, or a huge one.
    """
    with Image.open(path, formats=("PNG",)) as image:
        values = np.asarray(image)
        told = getattr(image, "text", {})
    is_marked = str(told.get("Description", "")) == MARK
    return (unpacked(str(told.get(KEYWORD, ""))) if is_marked else None), values
