"""Measures whether a slice or a volume shows a nodule where one was asked for."""

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
"""With fewer lung pixels around the box, the whole sample's lung is the background."""

DEFAULT_LUNG_HU = -850.0

MAX_LUNG_HU = -500.0
"""What is denser around a box is no lung: the nodule lies elsewhere, whatever the layout says."""

COMPACT_MM = (4.0, 40.0)
"""Diameters of what counts as nodule-like where none was asked for."""

MIN_FILLED = {2: 0.5, 3: 1 / 3}
"""Share of the square (cube) around it that a compact thing fills at least, by axes. A disc fills
0.79 and a ball 0.52: both limits are 0.64 of that."""


@dataclass(frozen=True)
class Measurement:
    """What stands in a box.

    Attributes:
        found: something of plausible density, size and place stands out from lung around it.
        contrast_hu: middle of the box minus the lung around it.
        diameter_mm: of the disc (ball) with the area (volume) of what stands out; NaN if nothing
            does.
        offset_mm: distance of its centre of mass from the box's centre; NaN if nothing does.
        mask: what stands out, of the sample's shape; None if nothing does.
    """

    found: bool
    contrast_hu: float
    diameter_mm: float
    offset_mm: float
    mask: NDArray[np.bool_] | None = None


def find_nodule(
    hu: NDArray[np.int16], lung: NDArray[np.bool_] | None, box: Box, pixel_mm: float
) -> Measurement:
    """Looks for a nodule in a box of a slice or a volume.

    What counts is what lies above half of the contrast, hangs together with the middle of the box
    and is neither much smaller nor much larger than it. Its area (volume) weighs each pixel by its
    share of the contrast, so that nodules of two pixels have a size, too.

    Args:
        hu: the sample, (y, x) or (z, y, x).
        lung: lungs and nodule of the layout that was asked for, of the same shape; None: unknown.
        box: of equal sides around the nodule asked for, half-open pixels, first corner first.
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
    diameter_px = _diameter(weights.sum(), hu.ndim)
    centre = np.array(ndimage.center_of_mass(weights)) + 0.5
    wanted = np.array([(part.start + part.stop) / 2 for part in inner])
    offset_px = float(np.linalg.norm(centre - wanted))
    side = box[hu.ndim] - box[0]
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

    Most are vessels seen end on: patients' images show how many are normal.

    Args:
        hu: the sample, (y, x) or (z, y, x).
        layout: labels, annotated or asked for.
        box: of the nodule asked for; None: there is none.
        pixel_mm: side of a pixel.
    """
    lung = np.isin(layout, NODULE_LUNG_LABELS)
    if not lung.any():
        return 0
    own = layout == Label.NODULE
    if box is not None:
        own[within(box)] = True
    # Lungs fill a third of a volume: the rest need not be searched, but for what they border on.
    (place,) = ndimage.find_objects(lung.view(np.uint8))
    around = tuple(slice(max(0, axis.start - 1), axis.stop + 1) for axis in place)
    hu, lung, own = hu[around], lung[around], own[around]
    threshold = np.median(hu[lung]) + 2 * MIN_CONTRAST_HU
    dense = lung & (hu > threshold)
    parts, count = ndimage.label(dense)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    # What touches the border of the lung is its wall.
    border = lung & ndimage.binary_dilation(~lung)
    is_excluded = np.zeros(count + 1, bool)
    is_excluded[parts[border]] = is_excluded[parts[own]] = True
    compact = 0
    for part, place in enumerate(ndimage.find_objects(parts), start=1):
        side = max(axis.stop - axis.start for axis in place)
        diameter_mm = _diameter(float(sizes[part]), hu.ndim) * pixel_mm
        is_compact = sizes[part] >= MIN_FILLED[hu.ndim] * side**hu.ndim
        if COMPACT_MM[0] <= diameter_mm <= COMPACT_MM[1] and is_compact and not is_excluded[part]:
            compact += 1
    return compact


def requested_diameter_mm(layout: NDArray[np.uint8], box: Box, pixel_mm: float) -> float:
    """Diameter of the disc (ball) with the area (volume) of the layout's nodule pixels in a box.

    A layout that shows no nodule there asks for the disc (ball) inside the box.
    """
    size = int(np.count_nonzero(layout[within(box)] == Label.NODULE))
    diameter_px = _diameter(size, layout.ndim) if size else box[layout.ndim] - box[0]
    return float(diameter_px) * pixel_mm


def stray_box(
    lung: NDArray[np.bool_], own: Box | None, others: Sequence[Box], rng: np.random.Generator
) -> Box | None:
    """A box of another sample that lies in this one's lung and clear of its own box.

    Boxes without a nodule are the chance level of `find_nodule`: what it finds there are vessels.

    Args:
        lung: lungs of this sample without its nodules, (y, x) or (z, y, x).
        own: this sample's box, if any.
        others: boxes of other samples.
        rng: decides which one.

    Returns:
        The box, or None if none of `others` fits.
    """
    for number in rng.permutation(len(others)):
        box = others[int(number)]
        if (own is None or _are_apart(box, own)) and lung[within(box)].all():
            return box
    return None


def within(box: Box) -> tuple[slice, ...]:
    """The pixels of a box, as an index of its slice or volume."""
    axes = len(box) // 2
    return tuple(slice(start, stop) for start, stop in zip(box[:axes], box[axes:], strict=True))


def _are_apart(one: Box, other: Box) -> bool:
    return any(
        a.stop <= b.start or b.stop <= a.start
        for a, b in zip(within(one), within(other), strict=True)
    )


def _diameter(size: float, axes: int) -> float:
    """Of the disc with an area, or the ball with a volume."""
    return float(2 * np.sqrt(size / np.pi) if axes == 2 else 2 * np.cbrt(size * 3 / (4 * np.pi)))


def _frame(box: Box, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The box with its surroundings in the sample, and the box within that frame."""
    parts = within(box)
    width = max(MIN_FRAME_PX, round(SURROUNDINGS * (parts[0].stop - parts[0].start)))
    frame = tuple(
        slice(max(0, part.start - width), min(size, part.stop + width))
        for part, size in zip(parts, shape, strict=True)
    )
    inner = tuple(
        slice(part.start - around.start, part.stop - around.start)
        for part, around in zip(parts, frame, strict=True)
    )
    return frame, inner


def _middle(inner: tuple[slice, ...], shape: tuple[int, ...]) -> NDArray[np.bool_]:
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
    inner: tuple[slice, ...],
) -> float:
    """Median HU of the lung around the box."""
    around = allowed.copy() if lung is not None else values < -500
    around[inner] = False
    if np.count_nonzero(around) >= MIN_LUNG_PX:
        return float(np.median(values[around]))
    whole = hu[lung] if lung is not None else hu[hu < -500]
    return float(np.median(whole)) if whole.size else DEFAULT_LUNG_HU
