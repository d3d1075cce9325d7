"""A chest of ellipsoids, of which every voxel's label is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from raysynth.volume import Triple, Volume

EXTENT_MM = (280.0, 260.0, 380.0)


@dataclass(frozen=True)
class Chest:
    """A volume, and what it was made of."""

    volume: Volume
    body: NDArray[np.bool_]
    left: NDArray[np.bool_]
    right: NDArray[np.bool_]
    trachea: NDArray[np.bool_]
    table: NDArray[np.bool_]
    pleural_nodule: NDArray[np.bool_]


def make_chest(
    spacing_mm: Triple = (2.5, 1.4, 1.4), *, touching: bool = False, with_lungs: bool = True
) -> Chest:
    """Feet at z = 0, front at y = 0, patient's right at x = 0; the table touches the back."""
    z, y, x = np.meshgrid(
        *(np.arange(0, extent, step) for extent, step in zip(EXTENT_MM, spacing_mm, strict=True)),
        indexing="ij",
        sparse=True,
    )

    def ellipsoid(centre: Triple, radii: Triple) -> NDArray[np.bool_]:
        offsets = ((grid - c) / r for grid, c, r in zip((z, y, x), centre, radii, strict=True))
        return sum(offset**2 for offset in offsets) <= 1

    body = (((y - 110) / 95) ** 2 + ((x - 190) / 150) ** 2 <= 1) & (z >= 0)
    gap_mm = 0.0 if touching else 12.0
    right = ellipsoid((130, 105, 190 - 60 - gap_mm), (110, 62, 62))
    left = ellipsoid((130, 105, 190 + 60 + gap_mm), (110, 62, 58))
    trachea = ((y - 130) ** 2 + (x - 190) ** 2 <= 8**2) & (z >= 170)
    # On the outer wall of the right lung; what lies in the chest wall does not show.
    pleural_nodule = ellipsoid((130, 105, 190 - 60 - gap_mm - 58), (6, 6, 6)) & right
    shell = ((y > 202) & (y < 205)) | ((y > 235) & (y < 238))
    table = shell & (np.abs(x - 190) < 150) & (z >= 0)
    if not with_lungs:
        left, right, trachea = (np.zeros_like(body) for _ in range(3))
    hu = np.full(body.shape, -1000.0)
    hu[table] = 100
    hu[body] = 40
    hu[left | right] = -850
    hu[pleural_nodule] = 40
    hu[trachea & body] = -1000
    hu += np.random.default_rng(0).normal(0, 25, hu.shape)
    return Chest(
        volume=Volume(hu.round().astype(np.int16), spacing_mm),
        body=body,
        left=left & ~right & ~trachea,
        right=right & ~left & ~trachea,
        trachea=trachea & body,
        table=table & ~body,
        pleural_nodule=pleural_nodule,
    )


@pytest.fixture(scope="session")
def chest() -> Chest:
    return make_chest()


@pytest.fixture(scope="session")
def build_chest() -> Callable[..., Chest]:
    return make_chest
