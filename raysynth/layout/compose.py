"""Puts labels together into one layout, and boxes around what a layout shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Label, Nodule
from raysynth.condition import Box


def compose(anatomy: NDArray[np.uint8], nodules: Sequence[Nodule]) -> NDArray[np.uint8]:
    """The anatomy with every nodule's voxels on top (Zhao & Hou: the nodule overwrites all).

    Args:
        anatomy: labels 0-4 (`raysynth.layout.anatomy.segment_anatomy`), (z, y, x); not changed.
        nodules: on the same grid; parts outside it are dropped.

    Returns:
        uint8 layout of the same shape.
    """
    layout = anatomy.copy()
    for nodule in nodules:
        inside = tuple(
            slice(max(0, start), min(size, stop))
            for (start, stop), size in zip(nodule.box_zyx, layout.shape, strict=True)
        )
        of_mask = tuple(
            slice(part.start - corner, part.stop - corner)
            for part, corner in zip(inside, nodule.corner_zyx, strict=True)
        )
        layout[inside][nodule.mask[of_mask]] = Label.NODULE
    return layout


def overlay(anatomy: NDArray[np.uint8], outlines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An anatomy in which what somebody drew replaces what was found.

    Drawn lungs are all the lungs there are, and so is a drawn trachea: what was found of them
    elsewhere becomes body.

    Args:
        anatomy: labels (z, y, x); not changed.
        outlines: labels of the same shape; 0 where they say nothing.
    """
    drawn = set(np.unique(outlines).tolist())
    layout = anatomy.copy()
    for kind in (LUNG_LABELS, (Label.TRACHEA,)):
        if drawn.intersection(kind):
            layout[np.isin(layout, kind)] = Label.BODY
    return np.where(outlines == Label.BACKGROUND, layout, outlines)


def square_box(mask: NDArray[np.bool_], margin_px: int = 0, min_side: int = 1) -> Box:
    """The square around a mask: half-open pixels (y0, x0, y1, x1).

    Its side is the mask's longer extent plus twice the margin, its middle the middle of the mask's
    extent. At the image's edge it is moved inwards, so it stays square as long as it fits.

    Args:
        mask: bool (y, x) with at least one true pixel.
        margin_px: pixels to leave around the mask on every side.
        min_side: least side of the box.

    Raises:
        ValueError: the mask is empty.
    """
    y0, x0, y1, x1 = _equal_sides(mask, margin_px, min_side)
    return y0, x0, y1, x1


def cube_box(mask: NDArray[np.bool_], min_side: int = 1) -> tuple[int, int, int, int, int, int]:
    """The cube around a mask (z, y, x): half-open voxels (z0, y0, x0, z1, y1, x1).

    As `square_box`, with one axis more.
    """
    z0, y0, x0, z1, y1, x1 = _equal_sides(mask, 0, min_side)
    return z0, y0, x0, z1, y1, x1


def _equal_sides(mask: NDArray[np.bool_], margin: int, min_side: int) -> list[int]:
    """First corner and last corner of the box of equal sides around a mask of any axes."""
    if not mask.any():
        raise ValueError("an empty mask has no box around it")
    extents = [(int(hit.min()), int(hit.max()) + 1) for hit in np.nonzero(mask)]
    side = max(min_side - 2 * margin, *(stop - start for start, stop in extents)) + 2 * margin
    ranges = [
        _side_within(start, stop, side, size)
        for (start, stop), size in zip(extents, mask.shape, strict=True)
    ]
    return [start for start, _ in ranges] + [stop for _, stop in ranges]


def _side_within(start: int, stop: int, side: int, size: int) -> tuple[int, int]:
    """A range of length `side` (or `size`, if less) around [start, stop) within [0, size)."""
    side = min(side, size)
    first = min(max(0, (start + stop - side) // 2), size - side)
    return first, first + side
