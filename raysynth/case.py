"""A case: one CT with its layout and the nodules that readers found in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysynth.volume import Intensity as Intensity
from raysynth.volume import Triple, Volume
from storage_schema.v1 import ATTRIBUTES as ATTRIBUTES
from storage_schema.v1 import CONDITION_ATTRIBUTES as CONDITION_ATTRIBUTES

Split = Literal["train", "val", "test"]

CONDITION_COLUMNS = tuple(ATTRIBUTES.index(name) for name in CONDITION_ATTRIBUTES)
"""Where the five scores that guide the attribute models stand among the nine of a reader."""

SCORE_RANGES = dict.fromkeys(ATTRIBUTES, (1, 5)) | {
    "internal_structure": (1, 4),
    "calcification": (1, 6),
}

MAX_READERS = 4


class Label(IntEnum):
    """Values of a layout voxel. The order of 0-5 is the published one; organs start at 16."""

    BACKGROUND = 0
    LEFT_LUNG = 1
    RIGHT_LUNG = 2
    TRACHEA = 3
    BODY = 4
    NODULE = 5
    LIVER = 16
    LEFT_KIDNEY = 17
    RIGHT_KIDNEY = 18
    SPLEEN = 19
    TUMOUR = 20


LUNG_LABELS = (Label.LEFT_LUNG, Label.RIGHT_LUNG)


@dataclass(frozen=True)
class Nodule:
    """One nodule, as its readers saw it.

    Attributes:
        centre_zyx: centre of the consensus voxels, in voxel coordinates of the case's grid.
        corner_zyx: first voxel of the consensus mask's bounding box in that grid.
        mask: consensus voxels inside the bounding box, bool (d, h, w).
        diameter_mm: mean over readers of the largest in-plane diameter.
        ratings: one row of nine scores a reader, in the order of `ATTRIBUTES`; 0 = not rated.
    """

    centre_zyx: Triple
    corner_zyx: tuple[int, int, int]
    mask: NDArray[np.bool_]
    diameter_mm: float
    ratings: tuple[tuple[int, ...], ...]

    @property
    def box_zyx(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Half-open ranges (start, stop) of the bounding box along z, y and x."""
        z, y, x = (
            (start, start + size)
            for start, size in zip(self.corner_zyx, self.mask.shape, strict=True)
        )
        return z, y, x


@dataclass(frozen=True)
class Case:
    """One CT of one patient, ready to be stored.

    Attributes:
        case_id: pseudonym of the series (keyed hash); names the group in the store.
        patient_key: pseudonym of the patient (keyed hash); the same for all series of a patient.
        split: decided by the patient alone.
        layout: labels (`Label`) on the volume's grid, uint8 (z, y, x); None until preprocessing.
        outlines: what somebody else drew, as `Label`s on the same grid; 0 where it says nothing.
        source: what may be kept of where it came from: format, and allow-listed acquisition values.
    """

    case_id: str
    patient_key: str
    split: Split
    volume: Volume
    nodules: tuple[Nodule, ...] = ()
    layout: NDArray[np.uint8] | None = None
    outlines: NDArray[np.uint8] | None = None
    intensity: Intensity = "hu"
    source: dict[str, str | float] = field(default_factory=dict)
