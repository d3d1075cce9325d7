"""The parts of a slice, or of a volume, that are judged apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import Label
from raysynth.layout.compose import cube_box
from raysynth.layout.holes import ORGANS
from raysynth.layout.morphology import Mask
from raysynth.sampling.adherence import NODULE_LUNG_LABELS
from raysynth.volume import AIR_HU
from raysynth.window import LUNG_WINDOW_HU

SMALL_IMAGE = 96
"""Below this side a crop of 32 pixels would be most of the sample: then it is 16."""

SOFT_TISSUE_HU = (-160.0, 240.0)
"""The window of abdominal organs: in that of lungs they would be one grey."""

MASKED = {
    **{name: labels for name, labels in ORGANS.items() if name != "nodule"},
    "lung": NODULE_LUNG_LABELS,
}
"""Organs judged with all else blanked out; of nodules, crops show more."""

GENERATED = "generated"
"""The region of what a model guided by layouts made; also begins the names of organs (followed by
an underscore) of which no pixel was copied."""

MIN_BOX_PX = 2
"""Least side of a box around a nodule of a layout."""


@dataclass(frozen=True)
class Region:
    """Some samples, shown in part.

    Attributes:
        hu: (n, y, x) or (n, z, y, x).
        rows: which of the samples they are (n,).
    """

    hu: NDArray[np.int16]
    rows: NDArray[np.int64]


def cut_regions(
    hu: NDArray[np.int16],
    layout: NDArray[np.uint8],
    box: NDArray[np.int16],
    hole: Mask | None = None,
    made_of: Sequence[int] = (),
) -> dict[str, Region]:
    """The regions of some slices or volumes, by the name they have in metric keys.

    * `all`: the sample.
    * `lung`: all but lungs and nodule of the layout is air. The layout of a synthetic sample is
      what was asked for, so one that ignores it shows chest wall there. Samples whose layout lacks
      the organ are left out.
    * `liver`, `kidney`, `spleen`, `tumour`: likewise, and the soft-tissue window is stretched over
      what extractors see.
    * `generated_lung` and so on, instead of these in samples with holes: only samples whose hole
      covers the whole organ, so that nothing of it is the patient's.
    * `generated`: all but the labels `made_of` is air: what a model guided by layouts makes, and of
      real samples what it would have made on their layouts.
    * `nodule32` (`nodule16` for samples of less than 96 pixels a side): a square (cube) around the
      box that was asked for or, of real samples, annotated. Samples without a box are left out.

    Args:
        hu: slices (n, y, x) or volumes (n, z, y, x).
        layout: their labels.
        box: their boxes (n, 4) or (n, 6), -1 for none.
        hole: what of them was filled; None: they were drawn (or scanned) as a whole.
        made_of: labels of a model that keeps all others as they were; none: there is no such model.
    """
    every = np.arange(len(hu))
    boxed = np.flatnonzero(box[:, 0] >= 0)
    size = 32 if min(hu.shape[1:]) >= SMALL_IMAGE else 16
    return {
        "all": Region(hu, every),
        **_organs(hu, layout, hole),
        **_made(hu, layout, made_of),
        f"nodule{size}": Region(cut_crops(hu[boxed], box[boxed], size), boxed),
    }


def _organs(
    hu: NDArray[np.int16], layout: NDArray[np.uint8], hole: Mask | None
) -> dict[str, Region]:
    regions = {}
    for name, labels in MASKED.items():
        mask = np.isin(layout, labels)
        places = tuple(range(1, hu.ndim))
        shown = mask.any(axis=places)
        if hole is not None:
            shown &= ~(mask & ~hole).any(axis=places)
        rows = np.flatnonzero(shown)
        if len(rows):
            seen = hu[rows] if name == "lung" else _stretched(hu[rows])
            masked = np.where(mask[rows], seen, np.int16(AIR_HU))
            regions[name if hole is None else made_whole(name)] = Region(masked, rows)
    return regions


def _made(
    hu: NDArray[np.int16], layout: NDArray[np.uint8], made_of: Sequence[int]
) -> dict[str, Region]:
    if not made_of:
        return {}
    mask = np.isin(layout, made_of)
    rows = np.flatnonzero(mask.any(axis=tuple(range(1, hu.ndim))))
    masked = np.where(mask[rows], hu[rows], np.int16(AIR_HU))
    return {GENERATED: Region(masked, rows)} if len(rows) else {}


def _stretched(hu: NDArray[np.int16]) -> NDArray[np.int16]:
    """The soft-tissue window as wide as the extractors' own."""
    (low, high), (to_low, to_high) = SOFT_TISSUE_HU, LUNG_WINDOW_HU
    share = np.clip((hu - low) / (high - low), 0, 1)
    stretched: NDArray[np.int16] = np.round(to_low + share * (to_high - to_low)).astype(np.int16)
    return stretched


def shows_nodules(region: str) -> bool:
    """Whether a region is that of crops around nodules."""
    return region.startswith("nodule") and region != "nodule"


def made_whole(organ: str) -> str:
    """The region of an organ of which no pixel was copied."""
    return f"{GENERATED}_{organ}"


def is_generated(region: str) -> bool:
    """Whether a region shows no pixel that was copied."""
    return region.partition("_")[0] == GENERATED


def cut_crops(hu: NDArray[np.int16], box: NDArray[np.int16], size: int) -> NDArray[np.int16]:
    """Squares (cubes) of `size` pixels around the boxes' centres; outside the sample is air."""
    axes = hu.ndim - 1
    firsts = (box[:, :axes].astype(int) + box[:, axes:]) // 2 - size // 2
    crops = np.full((len(hu), *[size] * axes), AIR_HU, np.int16)
    for crop, image, first in zip(crops, hu, firsts, strict=True):
        start = np.maximum(first, 0)
        stop = np.maximum(np.minimum(first + size, image.shape), start)
        inside = tuple(map(slice, start - first, stop - first))
        crop[inside] = image[tuple(map(slice, start, stop))]
    return crops


def nodule_boxes(layout: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Cubes around the largest nodule of each layout (n, z, y, x); -1 where there is none."""
    boxes = np.full((len(layout), 6), -1, np.int16)
    for box, labels in zip(boxes, layout, strict=True):
        parts, count = ndimage.label(labels == Label.NODULE)
        if count:
            sizes = np.bincount(parts.ravel())[1:]
            box[:] = cube_box(parts == 1 + sizes.argmax(), min_side=MIN_BOX_PX)
    return boxes
