"""The fixed window: HU to what networks see, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raysynth.volume import RELATIVE_RANGE, Intensity

if TYPE_CHECKING:
    import torch

LUNG_WINDOW_HU = (-1000, 400)
"""Lungs to soft tissue: what measures look at, whatever window a model was trained on."""

Array = TypeVar("Array", NDArray[Any], "torch.Tensor")
"""What comes back is of the kind, and in the place, of what went in."""


def normalize(hu: Array, window_hu: tuple[float, float]) -> Array:
    """Maps the window linearly to [-1, 1] (float32); what lies outside is clipped to its ends.

    Args:
        hu: HU of any shape and number type.
        window_hu: the (low, high) ends of the window.
    """
    low, high = window_hu
    clipped = _as_float(hu).clip(low, high)
    return (clipped - low) * (2.0 / (high - low)) - 1.0


def denormalize(normalized: Array, window_hu: tuple[float, float]) -> Array:
    """Maps [-1, 1] back to whole HU (int16), the inverse of `normalize` within half a unit.

    Networks overshoot: values outside [-1, 1] are clipped.

    Args:
        normalized: values of any shape and floating type.
        window_hu: the (low, high) ends of the window.
    """
    low, high = window_hu
    hu = (_as_float(normalized).clip(-1.0, 1.0) + 1.0) * ((high - low) / 2.0) + low
    return hu.round().astype(np.int16) if isinstance(hu, np.ndarray) else hu.round().short()


def measurable(values: NDArray[np.int16], intensity: Intensity) -> NDArray[np.int16]:
    """What extractors and the finder of nodules are shown of stored images.

    Hounsfield units as they are. Grey values without a unit are laid on `LUNG_WINDOW_HU`, the ends
    of `RELATIVE_RANGE` on its ends: thresholds in HU then are shares of the grey range.

    Args:
        values: as stored, of any shape.
        intensity: of the set they come from.
    """
    if intensity == "hu":
        return values
    return denormalize(normalize(values, RELATIVE_RANGE), LUNG_WINDOW_HU)


def _as_float(values: Array) -> Array:
    if isinstance(values, np.ndarray):
        return values.astype(np.float32)
    return values.float()
