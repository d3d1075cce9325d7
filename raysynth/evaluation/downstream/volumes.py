"""The training volumes of an arm, of which none is copied: a step cuts its crops from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Label
from raysynth.evaluation.downstream.augment import MAX_NOISE_HU, noisy, turned
from raysynth.evaluation.downstream.examples import Examples

PATCH = 64
"""Voxels a side of what a step sees of a larger volume."""

NODULE_SHARE = 0.5
"""Share of the crops that lie around a nodule's voxel, if the volume shows any: in crops from
anywhere there would be hardly a nodule."""


@dataclass(frozen=True)
class Volumes:
    """Volumes that networks learn from. Repeated or turned ones are views of the same examples.

    Attributes:
        hu: int16 cubes (z, y, x).
        layout: uint8 labels likewise.
        noise_hu: of each volume, the standard deviation of noise that is added to its crops.
    """

    hu: Sequence[NDArray[np.int16]]
    layout: Sequence[NDArray[np.uint8]]
    noise_hu: Sequence[float]

    def __len__(self) -> int:
        return len(self.hu)

    @classmethod
    def of(cls, examples: Examples, rows: NDArray[np.int64]) -> Volumes:
        """Some of the examples as they are; rows may be repeated."""
        hu, layout = ([values[row] for row in rows] for values in (examples.hu, examples.layout))
        return cls(hu, layout, [0.0] * len(rows))

    def __add__(self, others: Volumes) -> Volumes:
        return Volumes(
            [*self.hu, *others.hu],
            [*self.layout, *others.layout],
            [*self.noise_hu, *others.noise_hu],
        )

    def augmented(self, copies: int, rng: np.random.Generator) -> Volumes:
        """So many copies of every volume: turned in the axial plane, half mirrored, all noisy."""
        hu, layout, noise_hu = [], [], []
        for number in np.tile(np.arange(len(self)), copies):
            quarters, is_mirrored = int(rng.integers(4)), bool(rng.integers(2))
            hu.append(turned(self.hu[number], quarters, is_mirrored))
            layout.append(turned(self.layout[number], quarters, is_mirrored))
            noise_hu.append(float(rng.uniform(0, MAX_NOISE_HU)))
        return Volumes(hu, layout, noise_hu)

    def crops(
        self, rows: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """HU and labels of a crop of each of some volumes, (B, z, y, x)."""
        hu, layout = [], []
        for row in rows:
            place = random_place(self.layout[row], rng)
            hu.append(noisy(self.hu[row][place], self.noise_hu[row], rng))
            layout.append(self.layout[row][place])
        return np.stack(hu), np.stack(layout)


def random_place(layout: NDArray[np.uint8], rng: np.random.Generator) -> tuple[slice, ...]:
    """A crop of `PATCH` voxels a side, or all there is: around a nodule's voxel, or anywhere."""
    side = np.minimum(layout.shape, PATCH)
    room = layout.shape - side
    corner = rng.integers(0, room + 1)
    if room.any() and rng.uniform() < NODULE_SHARE:
        nodule = np.flatnonzero(layout == Label.NODULE)
        if len(nodule):
            voxel = np.unravel_index(nodule[rng.integers(len(nodule))], layout.shape)
            corner = np.clip(voxel - side // 2, 0, room)
    return tuple(slice(start, start + length) for start, length in zip(corner, side, strict=True))
