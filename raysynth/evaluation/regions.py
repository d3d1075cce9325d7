"""The parts of a slice that are judged apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.layout.holes import ORGANS
from raysynth.sampling.adherence import NODULE_LUNG_LABELS
from raysynth.volume import AIR_HU

SMALL_IMAGE = 96
"""Below this side a crop of 32 pixels would be most of the slice: then it is 16."""


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
    hu: NDArray[np.int16], layout: NDArray[np.uint8], box: NDArray[np.int16]
) -> dict[str, Region]:
    """The regions of some slices, by the name they have in metric keys.

    * `all`: the slice.
    * `lung`: all but lungs and nodule of the layout is air. The layout of a synthetic slice is what
      was asked for, so a slice that ignores it shows chest wall there. Likewise `liver`, `kidney`,
      `spleen` and `tumour`. Slices whose layout lacks the organ are left out.
    * `nodule32` (`nodule16` for slices of less than 96 pixels): a crop around the box that was
      asked for or, of real slices, annotated. Slices without a box are left out.

    Args:
        hu: slices (n, y, x).
        layout: their labels.
        box: their boxes (n, 4), -1 for none.
    """
    every = np.arange(len(hu))
    boxed = np.flatnonzero(box[:, 0] >= 0)
    size = 32 if min(hu.shape[1:]) >= SMALL_IMAGE else 16
    return {
        "all": Region(hu, every),
        **_organs(hu, layout),
        f"nodule{size}": Region(cut_crops(hu[boxed], box[boxed], size), boxed),
    }


def _organs(hu: NDArray[np.int16], layout: NDArray[np.uint8]) -> dict[str, Region]:
    organs = {**ORGANS, "lung": NODULE_LUNG_LABELS}
    del organs["nodule"]  # crops show more of it
    regions = {}
    for name, labels in organs.items():
        mask = np.isin(layout, labels)
        rows = np.flatnonzero(mask.any(axis=(1, 2)))
        if len(rows):
            regions[name] = Region(np.where(mask[rows], hu[rows], np.int16(AIR_HU)), rows)
    return regions


def cut_crops(hu: NDArray[np.int16], box: NDArray[np.int16], size: int) -> NDArray[np.int16]:
    """Squares of `size` pixels around the boxes' centres; what lies outside the slice is air."""
    half = size // 2
    padded = np.pad(hu, ((0, 0), (half, half), (half, half)), constant_values=AIR_HU)
    corners = (box[:, :2].astype(int) + box[:, 2:]) // 2  # in the padded slice
    crops = np.empty((len(hu), size, size), np.int16)
    for crop, image, (y, x) in zip(crops, padded, corners, strict=True):
        crop[:] = image[y : y + size, x : x + size]
    return crops
