"""Measures whether a slice shows a nodule where one was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import LUNG_LABELS, Label
from raysynth.condition import Box

NODULE_LUNG_LABELS = (*LUNG_LABELS, Label.NODULE)
"""Where a nodule may be: the lungs of a layout, with the nodule that overwrites them."""

MIN_CONTRAST_HU = 150.0
"""A nodule is so much denser than the lung around it."""

SIZE_RANGE = (0.4, 2.0)
"""Measured diameter over the box's side: outside, it is a vessel or not isolated."""

MAX_OFFSET = 0.5
"""Distance of the measured centre from the box's, in sides of the box."""

SURROUNDINGS = 1.0
"""Width of the measured frame around the box, in sides of the box (at least `MIN_FRAME_PX`)."""

MIN_FRAME_PX = 4
MIN_LUNG_PX = 6
"""With fewer lung pixels around the box, the whole slice's lung is the background."""

DEFAULT_LUNG_HU = -850.0

MAX_LUNG_HU = -500.0
"""What is denser around a box is no lung: the nodule lies elsewhere, whatever the layout says."""

COMPACT_MM = (4.0, 40.0)
"""Diameters of what counts as nodule-like where none was asked for."""

MIN_FILLED = 0.5
"""Share of the square around it that a compact thing fills at least; a disc fills 0.79."""


@dataclass(frozen=True)
class Measurement:
    """What stands in a box.

    Attributes:
        found: something of plausible density, size and place stands out from lung around it.
        contrast_hu: middle of the box minus the lung around it.
        diameter_mm: of the disc with the area of what stands out; NaN if nothing does.
        offset_mm: distance of its centre of mass from the box's centre; NaN if nothing does.
        mask: what stands out (y, x); None if nothing does.
    """

    found: bool
    contrast_hu: float
    diameter_mm: float
    offset_mm: float
    mask: NDArray[np.bool_] | None = None


def find_nodule(
    hu: NDArray[np.int16], lung: NDArray[np.bool_] | None, box: Box, pixel_mm: float
) -> Measurement:
    """Looks for a nodule in a box of a slice.

    What counts is what lies above half of the contrast, hangs together with the middle of the box
    and is neither much smaller nor much larger than it. Its area weighs each pixel by its share of
    the contrast, so that nodules of two pixels have a size, too.

    Args:
        hu: the slice (y, x).
        lung: lungs and nodule of the layout that was asked for (y, x); None: unknown.
        box: the square around the nodule asked for, half-open pixels.
        pixel_mm: side of a pixel.
    """
    frame, inner = _frame(box, hu.shape)
    values = hu[frame].astype(np.float64)
    allowed = np.ones(values.shape, bool) if lung is None else lung[frame]
    middle = _middle(inner, values.shape)
    background = _background(hu, lung, values, allowed, inner)
    contrast = float(values[middle].mean() - background)
    if contrast <= 0:
        return Measurement(False, contrast, np.nan, np.nan)
    share = np.clip((values - background) / contrast, 0, 1)
    parts, _ = ndimage.label((share > 0.5) & allowed)
    names = np.unique(parts[middle])
    blob = np.isin(parts, names[names > 0])
    if not blob.any():
        return Measurement(False, contrast, np.nan, np.nan)
    weights = share * (ndimage.binary_dilation(blob) & allowed)
    diameter_px = 2 * np.sqrt(weights.sum() / np.pi)
    centre = np.array(ndimage.center_of_mass(weights)) + 0.5
    wanted = np.array([(part.start + part.stop) / 2 for part in inner])
    offset_px = float(np.linalg.norm(centre - wanted))
    side = box[2] - box[0]
    found = (
        contrast >= MIN_CONTRAST_HU
        and background <= MAX_LUNG_HU
        and SIZE_RANGE[0] <= diameter_px / side <= SIZE_RANGE[1]
        and offset_px <= max(1.0, MAX_OFFSET * side)
    )
    mask = np.zeros(hu.shape, bool)
    mask[frame] = blob
    return Measurement(bool(found), contrast, diameter_px * pixel_mm, offset_px * pixel_mm, mask)


def count_unrequested(
    hu: NDArray[np.int16], layout: NDArray[np.uint8], box: Box | None, pixel_mm: float
) -> int:
    """How many compact dense things lie inside the lungs, the requested nodule left out.

    Most are vessels seen end on: patients' slices show how many are normal.

    Args:
        hu: the slice (y, x).
        layout: labels, annotated or asked for.
        box: of the nodule asked for; None: there is none.
        pixel_mm: side of a pixel.
    """
    lung = np.isin(layout, NODULE_LUNG_LABELS)
    if not lung.any():
        return 0
    own = layout == Label.NODULE
    if box is not None:
        own[box[0] : box[2], box[1] : box[3]] = True
    threshold = np.median(hu[lung]) + 2 * MIN_CONTRAST_HU
    dense = lung & (hu > threshold)
    parts, count = ndimage.label(dense)
    areas = np.bincount(parts.ravel(), minlength=count + 1)
    # What touches the border of the lung is its wall.
    border = lung & ndimage.binary_dilation(~lung)
    excluded = np.union1d(parts[border], parts[own])
    compact = 0
    for part, place in enumerate(ndimage.find_objects(parts), start=1):
        side = max(axis.stop - axis.start for axis in place)
        diameter_mm = 2 * np.sqrt(areas[part] / np.pi) * pixel_mm
        is_compact = areas[part] >= MIN_FILLED * side**2
        if COMPACT_MM[0] <= diameter_mm <= COMPACT_MM[1] and is_compact and part not in excluded:
            compact += 1
    return compact


def requested_diameter_mm(layout: NDArray[np.uint8], box: Box, pixel_mm: float) -> float:
    """Diameter of the disc with the area of the layout's nodule pixels in a box.

    A layout that shows no nodule there asks for the disc inside the box.
    """
    y0, x0, y1, x1 = box
    area = np.count_nonzero(layout[y0:y1, x0:x1] == Label.NODULE)
    return (2 * float(np.sqrt(area / np.pi)) if area else float(y1 - y0)) * pixel_mm


def stray_box(
    lung: NDArray[np.bool_], own: Box | None, others: Sequence[Box], rng: np.random.Generator
) -> Box | None:
    """A box of another slice that lies in this slice's lung and clear of its own box.

    Boxes without a nodule are the chance level of `find_nodule`: what it finds there are vessels.

    Args:
        lung: lungs of this slice without its nodules (y, x).
        own: this slice's box, if any.
        others: boxes of other slices.
        rng: decides which one.

    Returns:
        The box, or None if none of `others` fits.
    """
    for number in rng.permutation(len(others)):
        box = others[int(number)]
        y0, x0, y1, x1 = box
        clear = own is None or y1 <= own[0] or own[2] <= y0 or x1 <= own[1] or own[3] <= x0
        if clear and lung[y0:y1, x0:x1].all():
            return box
    return None


def _frame(box: Box, shape: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The box with its surroundings in the slice, and the box within that frame."""
    y0, x0, y1, x1 = box
    width = max(MIN_FRAME_PX, round(SURROUNDINGS * (y1 - y0)))
    top, left = max(0, y0 - width), max(0, x0 - width)
    frame = slice(top, min(shape[0], y1 + width)), slice(left, min(shape[1], x1 + width))
    return frame, (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _middle(inner: tuple[slice, slice], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The middle half of the box, at least one pixel."""
    middle = np.zeros(shape, bool)
    middle[tuple(_inner_half(part) for part in inner)] = True
    return middle


def _inner_half(part: slice) -> slice:
    trim = (part.stop - part.start + 1) // 4
    return slice(part.start + trim, part.stop - trim)


def _background(
    hu: NDArray[np.int16],
    lung: NDArray[np.bool_] | None,
    values: NDArray[np.float64],
    allowed: NDArray[np.bool_],
    inner: tuple[slice, slice],
) -> float:
    """Median HU of the lung around the box."""
    around = allowed.copy() if lung is not None else values < -500
    around[inner] = False
    if np.count_nonzero(around) >= MIN_LUNG_PX:
        return float(np.median(values[around]))
    whole = hu[lung] if lung is not None else hu[hu < -500]
    return float(np.median(whole)) if whole.size else DEFAULT_LUNG_HU
