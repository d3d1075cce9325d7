"""Holes that an inpainting model fills: organs, the boxes around them, and strokes of a brush.

A hole is a bool array on the sample's grid, true where pixels are to be made. Several organs share
one hole: it says where something is missing, not what.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Label
from raysynth.layout.morphology import Mask, bounding_box

Kind = Literal["organ", "box", "free"]

ORGANS: dict[str, tuple[Label, ...]] = {
    "lung": LUNG_LABELS,
    "nodule": (Label.NODULE,),
    "liver": (Label.LIVER,),
    "kidney": (Label.LEFT_KIDNEY, Label.RIGHT_KIDNEY),
    "spleen": (Label.SPLEEN,),
    "tumour": (Label.TUMOUR,),
}
"""The labels of an organ."""

KINDS: dict[Kind, float] = {"organ": 0.5, "box": 0.25, "free": 0.25}
"""How often each is drawn in training."""

UNION_RATE = 0.2
"""Chance that a training hole covers several organs, if there are."""

MARGIN_PX = (4, 16)
"""Least and greatest margin of a training box."""

STROKES, CORNERS = (1, 4), (2, 6)
STEP, WIDTH = (0.05, 0.25), (0.04, 0.15)
"""Strokes and their corners, inclusive; length between corners and width, shares of the side."""


def labels_of(organs: Iterable[str]) -> list[Label]:
    """The labels of some of `ORGANS`."""
    return [label for organ in organs for label in ORGANS[organ]]


def channels_of(organs: Sequence[str]) -> list[tuple[Label, ...]]:
    """The labels behind each channel of a model guided by these organs.

    As published, a nodule is no lung to a model that hears of nodules; to one that does not, it is.
    """
    of_lung = LUNG_LABELS if "nodule" in organs else (*LUNG_LABELS, Label.NODULE)
    return [of_lung if organ == "lung" else ORGANS[organ] for organ in organs]


def told_labels(organs: Sequence[str]) -> list[Label]:
    """All labels behind the channels of a model guided by these organs."""
    return [label for labels in channels_of(organs) for label in labels]


def layout_hole(layout: NDArray[np.uint8], organs: Sequence[str]) -> Mask:
    """What a model guided by these organs fills where all else is known."""
    return organ_hole(layout, told_labels(organs))


def organ_hole(layout: NDArray[np.uint8], organs: Sequence[int] | NDArray[np.uint8]) -> Mask:
    """All voxels of some organs (`raysynth.case.Label`) in one mask."""
    return np.isin(layout, organs)


def box_hole(mask: Mask, margin_px: int) -> Mask:
    """The bounding box of a mask and a margin on every side, within the image.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("an empty mask has no box around it")
    hole = np.zeros_like(mask)
    hole[bounding_box(mask, (margin_px,) * mask.ndim)] = True
    return hole


def free_hole(shape: Sequence[int], rng: np.random.Generator) -> Mask:
    """Strokes of a round brush from corner to corner; in a volume, of a ball.

    Args:
        shape: of the image, two or three axes.
        rng: draws the strokes.
    """
    side = min(shape)
    hole = np.zeros(shape, bool)
    for _ in range(rng.integers(*STROKES, endpoint=True)):
        here = rng.uniform(0, shape)
        radius = rng.uniform(*WIDTH) * side / 2
        for _ in range(rng.integers(*CORNERS, endpoint=True)):
            towards = rng.normal(size=len(shape))
            step = towards / np.linalg.norm(towards) * rng.uniform(*STEP) * side
            there = np.clip(here + step, 0, np.array(shape) - 1)
            _stroke(hole, here, there, max(radius, 1.0))
            here = there
    return hole


def draw_hole(layout: NDArray[np.uint8], organs: Sequence[int], rng: np.random.Generator) -> Mask:
    """A training hole: an organ, a box around one, or free-form; of several organs at times.

    Where the layout shows none of the organs the hole is free-form.

    Args:
        layout: labels (y, x) or (z, y, x).
        organs: labels to make holes of.
        rng: draws the hole.
    """
    there = np.intersect1d(layout, organs)
    kind = rng.choice(list(KINDS), p=list(KINDS.values())) if len(there) else "free"
    if kind == "free":
        return free_hole(layout.shape, rng)
    several = len(there) > 1 and rng.random() < UNION_RATE
    count = int(rng.integers(2, len(there), endpoint=True)) if several else 1
    mask = organ_hole(layout, rng.choice(there, count, replace=False))
    return mask if kind == "organ" else box_hole(mask, int(rng.integers(*MARGIN_PX, endpoint=True)))


def _stroke(hole: Mask, start: NDArray, stop: NDArray, radius: float) -> None:
    """Paints all pixels within `radius` of the line from `start` to `stop`."""
    low = np.maximum(np.floor(np.minimum(start, stop) - radius), 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(start, stop) + radius) + 1, hole.shape).astype(int)
    part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    grid = np.moveaxis(np.indices(high - low), 0, -1) + low
    line = stop - start
    along = np.clip((grid - start) @ line / max(float(line @ line), 1e-12), 0, 1)
    hole[part] |= np.linalg.norm(grid - start - along[..., None] * line, axis=-1) <= radius
