"""CT tiles as PNG with an SVG overlay of layout and box, ready to stand in an HTML page.

Volumes are shown by planes, or as an animation that runs through them. All their voxels have equal
sides, so planes beside each other have one scale.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Label
from raysynth.condition import Box

DISPLAY_WINDOW_HU = (-1150.0, 350.0)
"""Lung and soft tissue at once: what pictures show, unless a model sees less than that."""

PLANES = ("axial", "coronal", "sagittal")

GAP_PX = 2
"""Between planes beside each other."""

MAX_FRAMES = 64
FRAME_MS = 90
MAX_SCROLL_BYTES = 1_100_000
"""Of an animation; in a page it is a third more."""

QUALITIES = (75, 50, 30, 15, 5)
"""Of lossy WebP, tried until an animation is small enough."""

READABLE_PX = 192
"""Smaller panels are enlarged by whole factors, so that their names can be read."""

Item = TypeVar("Item", np.int16, np.uint8)


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


def planes(volume: NDArray[Item], at: tuple[int, int, int]) -> tuple[NDArray[Item], ...]:
    """The `PLANES` of a volume (z, y, x) through a voxel: (y, x), (z, x) and (z, y), head up."""
    z, y, x = at
    return volume[z], volume[::-1, y], volume[::-1, :, x]


def plane_boxes(box: Box, shape: Sequence[int]) -> tuple[Box, Box, Box]:
    """A box (z0, y0, x0, z1, y1, x1) as it lies in the `planes` of a volume of this shape."""
    z0, y0, x0, z1, y1, x1 = box
    below, above = shape[0] - z1, shape[0] - z0
    return (y0, x0, y1, x1), (below, x0, above, x1), (below, y0, above, y1)


def beside(boxes: Sequence[Box], shape: Sequence[int]) -> list[Box]:
    """The `plane_boxes` of a volume of this shape, as they lie in its `three_planes`."""
    width = shape[2] + GAP_PX
    return [
        (y0, x0 + number * width, y1, x1 + number * width)
        for number, (y0, x0, y1, x1) in enumerate(boxes)
    ]


def three_planes(volume: NDArray[Item], at: tuple[int, int, int], fill: int = 0) -> NDArray[Item]:
    """The `PLANES` through a voxel beside each other in one picture.

    Args:
        volume: HU or labels (z, y, x).
        at: the voxel.
        fill: between the planes, and below lower ones.
    """
    shown = planes(volume, at)
    height = max(plane.shape[0] for plane in shown)
    width = sum(plane.shape[1] + GAP_PX for plane in shown) - GAP_PX
    picture = np.full((height, width), fill, volume.dtype)
    left = 0
    for plane in shown:
        rows, columns = plane.shape
        picture[:rows, left : left + columns] = plane
        left += columns + GAP_PX
    return picture


def scroll(
    volumes: Mapping[str, NDArray[np.int16]], window_hu: tuple[float, float] = DISPLAY_WINDOW_HU
) -> bytes:
    """An animation through the axial planes of some volumes beside each other, from the head down.

    Every panel bears its name: a picture may be saved and shown without the page around it. A bar
    along the lower edge says how far down it is.

    Args:
        volumes: HU (z, y, x) of one shape, by name.
        window_hu: what is shown of them.

    Returns:
        An endless WebP of `MAX_FRAMES` frames at most, `MAX_SCROLL_BYTES` at most.
    """
    from PIL import Image

    depth = next(iter(volumes.values())).shape[0]
    shown = np.linspace(depth - 1, 0, min(depth, MAX_FRAMES)).round().astype(int).tolist()
    first, *others = (
        Image.fromarray(_frame(volumes, z, number / len(shown), window_hu)).convert("RGB")
        for number, z in enumerate(shown, start=1)
    )
    for quality in QUALITIES:
        buffer = io.BytesIO()
        first.save(
            buffer,
            format="WEBP",
            save_all=True,
            append_images=others,
            duration=FRAME_MS,
            loop=0,
            quality=quality,
        )
        if buffer.tell() <= MAX_SCROLL_BYTES:
            break
    return buffer.getvalue()


def webp_data_uri(encoded: bytes) -> str:
    """A WebP as a data URI."""
    return "data:image/webp;base64," + base64.b64encode(encoded).decode()


def overlay_svg(layout: NDArray[np.uint8] | None, boxes: Sequence[Box]) -> str:
    """Outlines of lungs, organs and lesions, and boxes, in the pixel coordinates of the tile."""
    parts: list[str] = []
    if layout is not None:
        lungs = np.isin(layout, [*LUNG_LABELS, Label.NODULE])
        parts += [f'<path class="lung" d="{path}"/>' for path in _outlines(lungs)]
        for label in np.unique(layout[(layout >= Label.LIVER) & (layout != Label.TUMOUR)]):
            parts += [f'<path class="organ" d="{path}"/>' for path in _outlines(layout == label)]
        lesion = np.isin(layout, (Label.NODULE, Label.TUMOUR))
        parts += [f'<path class="nodule" d="{path}"/>' for path in _outlines(lesion)]
    for y0, x0, y1, x1 in boxes:
        parts.append(
            f'<rect class="box" x="{x0 - 1}" y="{y0 - 1}" '
            f'width="{x1 - x0 + 2}" height="{y1 - y0 + 2}"/>'
        )
    return "".join(parts)


def _frame(
    volumes: Mapping[str, NDArray[np.int16]], z: int, share: float, window_hu: tuple[float, float]
) -> NDArray[np.uint8]:
    """One plane of every volume under its name, and a bar as long as the share that was shown."""
    from PIL import Image, ImageDraw

    panels = []
    for name, hu in volumes.items():
        factor = max(1, -(-READABLE_PX // hu.shape[1]))
        large = grey(hu[z], window_hu).repeat(factor, axis=0).repeat(factor, axis=1)
        panel = Image.fromarray(large)
        ImageDraw.Draw(panel).text((3, 2), name, fill=255, stroke_width=1, stroke_fill=0)
        panels.append(np.pad(np.asarray(panel), ((0, 0), (0, GAP_PX))))
    frame = np.concatenate(panels, axis=1)[:, :-GAP_PX]
    frame[-2:] = 0
    frame[-2:, : round(share * frame.shape[1])] = 255
    return frame


def _outlines(mask: NDArray[np.bool_]) -> list[str]:
    from skimage.measure import find_contours

    # find_contours puts a pixel's centre at its index; SVG puts it half a pixel further.
    padded = np.pad(mask, 1).astype(np.float32)
    paths = []
    for contour in find_contours(padded, 0.5):  # type: ignore[no-untyped-call]
        points = " ".join(f"{x - 0.5:.1f} {y - 0.5:.1f}" for y, x in contour)
        paths.append(f"M{points}Z")
    return paths
