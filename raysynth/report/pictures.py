"""CT tiles as PNG with an SVG overlay of layout and box, ready to stand in an HTML page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Label
from raysynth.condition import Box

DISPLAY_WINDOW_HU = (-1150.0, 350.0)
"""Lung and soft tissue at once: what pictures show, unless a model sees less than that."""


def grey(
    hu: NDArray[np.int16], window_hu: tuple[float, float] = DISPLAY_WINDOW_HU
) -> NDArray[np.uint8]:
    """HU as 8-bit grey values under a display window."""
    low, high = window_hu
    share: NDArray[np.float64] = np.clip((hu - low) / (high - low), 0, 1)
    return (share * 255).astype(np.uint8)


def png_data_uri(pixels: NDArray[np.uint8]) -> str:
    """A grey image as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def overlay_svg(layout: NDArray[np.uint8] | None, box: Box | None) -> str:
    """Outlines of lungs, organs and lesions, and the box, in the pixel coordinates of the tile."""
    parts: list[str] = []
    if layout is not None:
        lungs = np.isin(layout, [*LUNG_LABELS, Label.NODULE])
        parts += [f'<path class="lung" d="{path}"/>' for path in _outlines(lungs)]
        for label in np.unique(layout[(layout >= Label.LIVER) & (layout != Label.TUMOUR)]):
            parts += [f'<path class="organ" d="{path}"/>' for path in _outlines(layout == label)]
        lesion = np.isin(layout, (Label.NODULE, Label.TUMOUR))
        parts += [f'<path class="nodule" d="{path}"/>' for path in _outlines(lesion)]
    if box is not None and min(box) >= 0:
        y0, x0, y1, x1 = box
        parts.append(
            f'<rect class="box" x="{x0 - 1}" y="{y0 - 1}" '
            f'width="{x1 - x0 + 2}" height="{y1 - y0 + 2}"/>'
        )
    return "".join(parts)


def _outlines(mask: NDArray[np.bool_]) -> list[str]:
    from skimage.measure import find_contours

    # find_contours puts a pixel's centre at its index; SVG puts it half a pixel further.
    padded = np.pad(mask, 1).astype(np.float32)
    paths = []
    for contour in find_contours(padded, 0.5):  # type: ignore[no-untyped-call]
        points = " ".join(f"{x - 0.5:.1f} {y - 0.5:.1f}" for y, x in contour)
        paths.append(f"M{points}Z")
    return paths
