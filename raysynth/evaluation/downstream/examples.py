"""The samples of a trial, of patients or synthetic, as plain arrays: no store is known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from raysynth.case import CONDITION_ATTRIBUTES, Label
from raysynth.config.sampling import TextureClass
from raysynth.sampling.cohort import TEXTURE_EDGES, TEXTURES

NOBODY = ""
"""The patient of a synthetic sample that was drawn on nobody's layout."""

TEXTURE = CONDITION_ATTRIBUTES.index("texture")


@dataclass(frozen=True)
class Examples:
    """Slices or volumes of one origin; row i of every array is sample i.

    Attributes:
        hu: int16 (n, y, x), of volumes (n, z, y, x).
        layout: uint8 labels of the same shape; of synthetic samples, what was asked for.
        pixel_mm: float32, side of a pixel in millimetres.
        box: int16 (n, 4), the square around the sample's own nodule, of volumes (n, 6) the cube;
            -1: it was cut for none.
        patient: key of the patient; of synthetic samples, of the one who lent the layout.
        plane: rows of the same image, cut for different nodules, have the same number.
        scores: float32 (n, 5), means of the readers, or as asked for; NaN: none.
        malignancy: float32, mean of the readers; NaN: none, as in every synthetic sample.
        held_out: whether the generator was trained without this patient; False in synthetic ones.
    """

    hu: NDArray[np.int16]
    layout: NDArray[np.uint8]
    pixel_mm: NDArray[np.float32]
    box: NDArray[np.int16]
    patient: NDArray[np.str_]
    plane: NDArray[np.int64]
    scores: NDArray[np.float32]
    malignancy: NDArray[np.float32]
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.hu)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Examples:
        """Some of the samples; rows may be repeated."""
        return Examples(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def spatial_dims(self) -> int:
        """2 of slices, 3 of volumes."""
        return self.hu.ndim - 1

    @property
    def boxed(self) -> NDArray[np.bool_]:
        """Which samples were cut for a nodule."""
        return self.box[:, 0] >= 0

    @property
    def showing(self) -> NDArray[np.bool_]:
        """Which samples have a nodule to show. Volumes around lungs were cut for none of theirs."""
        if self.spatial_dims == 2:
            return self.boxed
        return np.array([(one == Label.NODULE).any() for one in self.layout], bool)

    @property
    def side(self) -> NDArray[np.float64]:
        """Pixels of the box's side; that of a slice's cut of the nodule, not of its diameter."""
        return (self.box[:, self.spatial_dims] - self.box[:, 0]).astype(np.float64)


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Samples of several origins, one after the other."""
    return Examples(
        *(np.concatenate([getattr(one, field.name) for one in parts]) for field in fields(Examples))
    )


def of_texture(examples: Examples, texture: TextureClass) -> NDArray[np.bool_]:
    """Which samples were cut for a nodule of that texture, by its mean score."""
    score = examples.scores[:, TEXTURE]
    known = np.isfinite(score) & examples.boxed
    classes = np.digitize(np.where(known, score, 0), TEXTURE_EDGES)
    chosen: NDArray[np.bool_] = known & (classes == TEXTURES.index(texture))
    return chosen
