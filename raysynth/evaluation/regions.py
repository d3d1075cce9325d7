"""The parts of a slice that are judged apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.layout.holes import ORGANS
from raysynth.layout.morphology import Mask
from raysynth.sampling.adherence import NODULE_LUNG_LABELS
from raysynth.volume import AIR_HU
from raysynth.window import LUNG_WINDOW_HU

SMALL_IMAGE = 96
"""Below this side a crop of 32 pixels would be most of the slice: then it is 16."""

SOFT_TISSUE_HU = (-160.0, 240.0)
"""The window of abdominal organs: in that of lungs they would be one grey."""

MASKED = {
    **{name: labels for name, labels in ORGANS.items() if name != "nodule"},
    "lung": NODULE_LUNG_LABELS,
}
"""Organs judged with all else blanked out; of nodules, crops show more."""

GENERATED = "generated_"
"""Begins the names of regions without a pixel that was copied."""


@dataclass(frozen=True)
class Region:
    """Some samples, shown in part.

    Attributes:
        hu: (n, y, x).
        rows: which of the samples they are (n,).
    """

    hu: NDArray[np.int16]
    rows: NDArray[np.int64]


def cut_regions(
    hu: NDArray[np.int16],
    layout: NDArray[np.uint8],
    box: NDArray[np.int16],
    hole: Mask | None = None,
) -> dict[str, Region]:
    """The regions of some slices, by the name they have in metric keys.

    * `all`: the slice.
    * `lung`: all but lungs and nodule of the layout is air. The layout of a synthetic slice is what
      was asked for, so a slice that ignores it shows chest wall there. Slices whose layout lacks
      the organ are left out.
    * `liver`, `kidney`, `spleen`, `tumour`: likewise, and the soft-tissue window is stretched over
      what extractors see.
    * `generated_lung` and so on, instead of these in slices with holes: only slices whose hole
      covers the whole organ, so that nothing of it is the patient's.
    * `nodule32` (`nodule16` for slices of less than 96 pixels): a crop around the box that was
      asked for or, of real slices, annotated. Slices without a box are left out.

    Args:
        hu: slices (n, y, x).
        layout: their labels.
        box: their boxes (n, 4), -1 for none.
        hole: what of them was filled; None: they were drawn (or scanned) as a whole.
    """
    every = np.arange(len(hu))
    boxed = np.flatnonzero(box[:, 0] >= 0)
    size = 32 if min(hu.shape[1:]) >= SMALL_IMAGE else 16
    return {
        "all": Region(hu, every),
        **_organs(hu, layout, hole),
        f"nodule{size}": Region(cut_crops(hu[boxed], box[boxed], size), boxed),
    }


def _organs(
    hu: NDArray[np.int16], layout: NDArray[np.uint8], hole: Mask | None
) -> dict[str, Region]:
    regions = {}
    for name, labels in MASKED.items():
        mask = np.isin(layout, labels)
        shown = mask.any(axis=(1, 2))
        if hole is not None:
            shown &= ~(mask & ~hole).any(axis=(1, 2))
        rows = np.flatnonzero(shown)
        if len(rows):
            seen = hu[rows] if name == "lung" else _stretched(hu[rows])
            masked = np.where(mask[rows], seen, np.int16(AIR_HU))
            regions[name if hole is None else GENERATED + name] = Region(masked, rows)
    return regions


def _stretched(hu: NDArray[np.int16]) -> NDArray[np.int16]:
    """The soft-tissue window as wide as the extractors' own."""
    (low, high), (to_low, to_high) = SOFT_TISSUE_HU, LUNG_WINDOW_HU
    share = np.clip((hu - low) / (high - low), 0, 1)
    stretched: NDArray[np.int16] = np.round(to_low + share * (to_high - to_low)).astype(np.int16)
    return stretched


def shows_nodules(region: str) -> bool:
    """Whether a region is that of crops around nodules."""
    return region.startswith("nodule") and region != "nodule"


def cut_crops(hu: NDArray[np.int16], box: NDArray[np.int16], size: int) -> NDArray[np.int16]:
    """Squares of `size` pixels around the boxes' centres; what lies outside the slice is air."""
    half = size // 2
    padded = np.pad(hu, ((0, 0), (half, half), (half, half)), constant_values=AIR_HU)
    corners = (box[:, :2].astype(int) + box[:, 2:]) // 2  # in the padded slice
    crops = np.empty((len(hu), size, size), np.int16)
    for crop, image, (y, x) in zip(crops, padded, corners, strict=True):
        crop[:] = image[y : y + size, x : x + size]
    return crops
