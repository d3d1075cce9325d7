"""A CT volume in Hounsfield units together with its geometry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Triple = tuple[float, float, float]

Intensity = Literal["hu", "relative"]
"""What values are: Hounsfield units, or grey values of no known unit."""

AIR_HU = -1000
"""What lies outside the scanned field: padding, and samples cut past the edge."""

RELATIVE_RANGE = (AIR_HU, AIR_HU + 4095)
"""What the lowest and highest value of an image without Hounsfield units become. The lowest is what
samples cut past the edge are filled with; 4,096 steps keep 8- and 12-bit images apart."""


@dataclass(frozen=True)
class Volume:
    """Voxels of one CT and where they lie in the patient.

    All geometry is in (z, y, x) order and in DICOM's LPS frame: z grows towards the head, y towards
    the back, x towards the patient's left. The centre of voxel `index` lies at
    `origin_mm + direction @ (index * spacing_mm)`.

    Attributes:
        hu: int16 Hounsfield units, shape (z, y, x).
        spacing_mm: distance of neighbouring voxel centres along each array axis.
        origin_mm: position of the centre of voxel (0, 0, 0).
        direction: 3x3 matrix; column k is the unit vector of array axis k.
    """

    hu: NDArray[np.int16]
    spacing_mm: Triple
    origin_mm: Triple = (0.0, 0.0, 0.0)
    direction: NDArray[np.float64] = field(default_factory=lambda: np.eye(3))

    def __post_init__(self) -> None:
        if self.hu.ndim != 3 or self.hu.dtype != np.int16:
            raise ValueError(
                f"a volume is int16 (z, y, x), not {self.hu.dtype} with {self.hu.ndim} axes"
            )
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, not {self.spacing_mm}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along (z, y, x)."""
        z, y, x = self.hu.shape
        return z, y, x

    @property
    def standard_order(self) -> tuple[slice, slice, slice]:
        """Index that makes the array axes run towards head, back and left; it is its own inverse.

        Oblique axes count by their main direction.
        """
        signs = np.sign(np.diagonal(self.direction))
        z, y, x = (slice(None, None, -1 if sign < 0 else 1) for sign in signs)
        return z, y, x

    def position_mm(self, index: NDArray[np.float64] | Triple) -> NDArray[np.float64]:
        """LPS position in (z, y, x) order of voxel coordinates, shape (..., 3)."""
        scaled = np.asarray(index, dtype=np.float64) * np.asarray(self.spacing_mm)
        return np.asarray(self.origin_mm) + scaled @ self.direction.T

    def index_of(self, position_mm: NDArray[np.float64] | Triple) -> NDArray[np.float64]:
        """Voxel coordinates (fractional) of LPS positions, the inverse of `position_mm`."""
        offset = np.asarray(position_mm, dtype=np.float64) - np.asarray(self.origin_mm)
        return (offset @ self.direction) / np.asarray(self.spacing_mm)
