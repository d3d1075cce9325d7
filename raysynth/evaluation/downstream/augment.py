"""Classic augmentation: what can be had from real samples without any generator."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import Label
from raysynth.evaluation.downstream.examples import Examples, concatenate
from raysynth.volume import AIR_HU

MAX_TURN_DEG = 10.0
MAX_SHIFT = 0.04
"""Of the slice's side."""

MAX_NOISE_HU = 40.0
"""Standard deviation; each copy draws its own."""

Value = TypeVar("Value", bound=np.generic)


def augmented(examples: Examples, copies: int, rng: np.random.Generator) -> Examples:
    """So many copies of every slice: half of them mirrored, all turned, shifted and noisy.

    Layout and box go with the image.
    """
    return concatenate([_moved(examples, rng) for _ in range(copies)])


def turned(volume: NDArray[Value], quarters: int, is_mirrored: bool) -> NDArray[Value]:
    """A view of a volume (z, y, x) turned in the axial plane and mirrored left to right.

    No voxel is interpolated, and a crop of it is the crop of the volume, turned.
    """
    view = np.rot90(volume, quarters, axes=(1, 2))
    return view[:, :, ::-1] if is_mirrored else view


def noisy(hu: NDArray[np.int16], noise_hu: float, rng: np.random.Generator) -> NDArray[np.int16]:
    """With noise of that standard deviation; nothing is darker than air."""
    if not noise_hu:
        return hu
    noise = noise_hu * rng.standard_normal(hu.shape, np.float32)
    return np.rint(np.maximum(hu + noise, AIR_HU)).astype(np.int16)


def _moved(examples: Examples, rng: np.random.Generator) -> Examples:
    hu, layout = np.empty_like(examples.hu), np.empty_like(examples.layout)
    box = examples.box.copy()
    size = np.array(hu.shape[1:])
    middle = (size - 1) / 2
    for row in range(len(examples)):
        angle = np.deg2rad(rng.uniform(-MAX_TURN_DEG, MAX_TURN_DEG))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn[:, 1] *= rng.choice((-1.0, 1.0))  # mirrored, left to right
        # A pixel at p shows what was at turn @ (p - middle) + middle + shift.
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * size
        offset = middle + shift - turn @ middle
        noise_hu = rng.uniform(0, MAX_NOISE_HU) * rng.standard_normal(hu.shape[1:])
        smooth = ndimage.affine_transform(
            examples.hu[row].astype(np.float32), turn, offset, order=1, cval=AIR_HU
        )
        hu[row] = np.rint(np.maximum(smooth + noise_hu, AIR_HU))
        layout[row] = ndimage.affine_transform(
            examples.layout[row], turn, offset, order=0, cval=Label.BACKGROUND
        )
        if box[row, 0] >= 0:
            box[row] = _moved_box(box[row], turn, offset, size)
    return replace(examples, hu=hu, layout=layout, box=box)


def _moved_box(
    box: NDArray[np.int16],
    turn: NDArray[np.float64],
    offset: NDArray[np.float64],
    size: NDArray[np.int64],
) -> NDArray[np.int64]:
    """A square of the same side around where its middle went, moved into the slice."""
    side = box[2:] - box[:2]
    middle = turn.T @ ((box[:2] + box[2:] - 1) / 2 - offset)  # turns and mirrors are orthogonal
    corner = np.clip(np.rint(middle - (side - 1) / 2), 0, size - side).astype(int)
    return np.concatenate([corner, corner + side])
