"""Where a nodule may be put in a slice or volume, and putting it there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import LUNG_LABELS, Label


def admissible_centres(
    layout: NDArray[np.uint8], radius_px: float, juxtapleural: bool = False
) -> NDArray[np.bool_]:
    """Pixels on which a nodule of this radius may be centred (methods A, improved prior).

    The whole disc or ball must be free lung: of one lung, inside the image, off other nodules. A
    juxtapleural nodule asks only for a centre in the lung; `place_nodule` clips it at the pleura.

    Args:
        layout: labels (y, x) or (z, y, x).
        radius_px: radius of the nodule in pixels.
        juxtapleural: allow the disc to leave the lung.
    """
    if juxtapleural:
        return np.isin(layout, LUNG_LABELS)
    return lung_depth(layout) > radius_px


def lung_depth(layout: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far each pixel is from whatever is not its own lung, in pixels; 0 outside the lungs.

    Outside the image there is no lung.
    """
    depth = np.zeros(layout.shape)
    inside = (slice(1, -1),) * layout.ndim
    for label in LUNG_LABELS:
        depth += ndimage.distance_transform_edt(np.pad(layout == label, 1))[inside]
    return depth


def place_nodule(
    layout: NDArray[np.uint8], centre: tuple[int, ...], radius_px: float
) -> NDArray[np.uint8]:
    """A copy of the layout with a disc or ball of NODULE, clipped to the lung of its centre.

    Args:
        layout: labels (y, x) or (z, y, x).
        centre: a pixel of lung, as many numbers.
        radius_px: radius; the centre itself is always part of the nodule.

    Raises:
        ValueError: the centre is not lung.
    """
    lung = layout[centre]
    if lung not in LUNG_LABELS:
        raise ValueError(
            f"the nodule's centre {centre} has label {lung}, not a lung's; "
            "take one of admissible_centres"
        )
    grid = np.ogrid[tuple(slice(size) for size in layout.shape)]
    squared = sum((axis - middle) ** 2 for axis, middle in zip(grid, centre, strict=True))
    placed = layout.copy()
    placed[(squared <= radius_px**2) & (layout == lung)] = Label.NODULE
    placed[centre] = Label.NODULE
    return placed


def without_nodules(layout: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A layout whose nodule pixels carry the label of the nearest lung."""
    nodule = layout == Label.NODULE
    if not nodule.any():
        return layout
    lung = np.isin(layout, LUNG_LABELS)
    if not lung.any():
        return np.where(nodule, np.uint8(Label.BODY), layout)
    nearest = ndimage.distance_transform_edt(~lung, return_distances=False, return_indices=True)
    return np.where(nodule, layout[tuple(nearest)], layout)
