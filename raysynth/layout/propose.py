"""Where a nodule may be put in a plane, and putting it there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import LUNG_LABELS, Label


def admissible_centres(
    layout: NDArray[np.uint8], radius_px: float, juxtapleural: bool = False
) -> NDArray[np.bool_]:
    """Pixels on which a nodule of this radius may be centred (methods A, improved prior).

    The whole disc must be free lung: of one lung, inside the image, off other nodules. A
    juxtapleural nodule asks only for a centre in the lung; `place_nodule` clips it at the pleura.

    Args:
        layout: labels of one plane, (y, x).
        radius_px: radius of the nodule in pixels.
        juxtapleural: allow the disc to leave the lung.
    """
    centres = np.zeros(layout.shape, np.bool_)
    for label in LUNG_LABELS:
        lung = layout == label
        if juxtapleural:
            centres |= lung
        else:
            depth = ndimage.distance_transform_edt(np.pad(lung, 1))[1:-1, 1:-1]
            centres |= depth > radius_px
    return centres


def place_nodule(
    layout: NDArray[np.uint8], centre: tuple[int, int], radius_px: float
) -> NDArray[np.uint8]:
    """A copy of the layout with a disc of NODULE around `centre`, clipped to that pixel's lung.

    Args:
        layout: labels of one plane, (y, x).
        centre: a pixel of lung, (y, x).
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
    y, x = np.ogrid[: layout.shape[0], : layout.shape[1]]
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius_px**2
    placed = layout.copy()
    placed[disc & (layout == lung)] = Label.NODULE
    placed[centre] = Label.NODULE
    return placed
