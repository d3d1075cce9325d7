"""What a synthetic sample is asked to show. Every part may be absent (the null condition)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.case import CONDITION_ATTRIBUTES, LUNG_LABELS, Label
from raysynth.errors import InputError

NUM_SCORES = 5

Box = tuple[int, ...]
"""Half-open pixels, first corners first: (y0, x0, y1, x1), in volumes (z0, y0, x0, z1, y1, x1)."""


@dataclass(frozen=True)
class Condition:
    """A request for one sample.

    Attributes:
        layout: labels (`raysynth.case.Label`), uint8 (y, x) or (z, y, x), on the sample's grid.
        box: the square (in volumes the cube) around the nodule, in pixels of the sample.
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


def check_condition(
    condition: Condition, size: int, spatial_dims: int = 2, *, inside_lung: bool = False
) -> None:
    """Refuses a request that no model of such samples can be asked.

    Args:
        condition: the request.
        size: pixels along a sample's side.
        spatial_dims: 2 of slices, 3 of volumes.
        inside_lung: refuse also a box whose middle is no lung of its layout. The published prior
            puts boxes there.

    Raises:
        InputError: says which part, its value, and what would do.
    """
    shape = (size,) * spatial_dims
    _check_layout(condition.layout, shape)
    _check_box(condition, shape, inside_lung)
    _check_scores(condition.attributes)
    known = condition.known_hu, condition.known_mask
    if (known[0] is None) != (known[1] is None):
        raise InputError("known_hu and known_mask: give both, or neither")
    for name, part in zip(("known_hu", "known_mask"), known, strict=True):
        if part is not None and part.shape != shape:
            raise InputError(f"{name} of shape {part.shape}: this model needs {shape}")


def _check_layout(layout: NDArray[np.uint8] | None, shape: tuple[int, ...]) -> None:
    if layout is None:
        return
    if layout.shape != shape:
        raise InputError(f"layout of shape {layout.shape}: this model needs {shape}")
    if layout.dtype != np.uint8:
        raise InputError(f"layout of type {layout.dtype}: give labels as uint8")
    unknown = np.setdiff1d(layout, np.array(list(Label), np.uint8))
    if len(unknown):
        known = ", ".join(f"{label} {label.name.lower().replace('_', ' ')}" for label in Label)
        raise InputError(f"layout has unknown labels {', '.join(map(str, unknown))}: give {known}")


def _check_box(condition: Condition, shape: tuple[int, ...], inside_lung: bool) -> None:
    box, layout, axes, size = condition.box, condition.layout, len(shape), shape[0]
    if box is None:
        return
    corners = ", ".join(axis + end for end in "01" for axis in "zyx"[-axes:])
    if len(box) != 2 * axes or not all(isinstance(edge, int | np.integer) for edge in box):
        number = "four" if axes == 2 else "six"
        raise InputError(f"box {box}: give {number} whole numbers ({corners})")
    if not all(0 <= low < high <= size for low, high in zip(box[:axes], box[axes:], strict=True)):
        raise InputError(
            f"box {box}: give ({corners}) with 0 <= y0 < y1 <= {size}, and the others likewise"
        )
    # A layout of nothing but background says nothing of anatomy.
    if inside_lung and layout is not None and layout.any():
        middle = tuple(
            slice((low + high - 1) // 2, (low + high) // 2 + 1)
            for low, high in zip(box[:axes], box[axes:], strict=True)
        )
        if not np.isin(layout[middle], (*LUNG_LABELS, Label.NODULE)).any():
            raise InputError(
                f"box {box} lies outside the lungs of its layout: move it into labels "
                f"{Label.LEFT_LUNG} or {Label.RIGHT_LUNG}"
            )


def _check_scores(scores: tuple[int, ...] | None) -> None:
    if scores is None:
        return
    fit = (isinstance(one, int | np.integer) and 0 <= one <= NUM_SCORES for one in scores)
    if len(scores) != len(CONDITION_ATTRIBUTES) or not all(fit):
        raise InputError(
            f"attributes {scores}: give {len(CONDITION_ATTRIBUTES)} scores 1-{NUM_SCORES} (0: not "
            f"given) for {', '.join(CONDITION_ATTRIBUTES)}"
        )
