"""What a synthetic sample is asked to show. Every part may be absent (the null condition)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Condition:
    """A request for one sample.

    Attributes:
        layout: labels (`raysynth.case.Label`), uint8 (y, x) or (z, y, x), on the sample's grid.
        box: the square around the nodule, half-open pixels (y0, x0, y1, x1) of the sample.
        attributes: scores 1-5 in the order of `raysynth.case.CONDITION_ATTRIBUTES`; 0 = not given.
        text: a prompt.
        known_hu: int16 HU of pixels to keep, where `known_mask` is true.
        known_mask: bool, on the sample's grid.
    """

    layout: NDArray[np.uint8] | None = None
    box: Box | None = None
    attributes: tuple[int, ...] | None = None
    text: str | None = None
    known_hu: NDArray[np.int16] | None = None
    known_mask: NDArray[np.bool_] | None = None
