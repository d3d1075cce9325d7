"""What tissue looks like: Hounsfield units, their grain, and the scanner's noise."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from raysynth.phantom.grid import Field, Grid
from raysynth.volume import AIR_HU

FAT_HU = -100.0
MUSCLE_HU = 52.0
SKIN_HU = 10.0
SOFT_HU = 40.0
LIVER_HU = 58.0
TUMOUR_HU = 28.0
"""Of a liver metastasis: it takes up little contrast."""
SPLEEN_HU = 50.0
KIDNEY_HU = 32.0
FLUID_HU = 12.0
GAS_HU = -980.0

_NOISE_MM = 0.65


def grain(rng: np.random.Generator, grid: Grid, size_mm: float) -> Field:
    """Fine random texture on the voxels, deviation 1, blobs of about `size_mm`."""
    sigma = [size_mm / 2.4 / s for s in grid.spacing_mm]
    field = rng.standard_normal(grid.shape, dtype=np.float32)
    ndimage.gaussian_filter(field, sigma, output=field, truncate=3.0)
    field /= np.float32(_deviation_after(sigma))
    return field


def scanner_noise(rng: np.random.Generator, grid: Grid, deviation_hu: float, body: Field) -> Field:
    """Correlated noise of a reconstructed CT.

    It is correlated within a plane (the reconstruction kernel) and hardly across planes, and grows
    with the tissue that a ray crosses: towards the middle and in planes through much body.

    Args:
        rng: randomness.
        grid: the voxels.
        deviation_hu: standard deviation in the middle of an average plane.
        body: signed distance to the skin, mm.
    """
    field = grain(rng, grid, 2.4 * _NOISE_MM)
    filled = (body < 0).mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    thickness = np.clip(filled / 0.55, 0.6, 1.25)
    inside = 0.62 + np.clip(-body, 0, 60) * np.float32(0.38 / 60)
    field *= inside
    field *= thickness * np.float32(deviation_hu)
    return field


def to_hu(field: Field) -> np.ndarray:
    """Rounded to int16 within what scanners give."""
    np.rint(field, out=field)
    return np.clip(field, AIR_HU - 24, 3071).astype(np.int16)


def _deviation_after(sigma: list[float]) -> float:
    """Deviation that unit white noise keeps after the Gaussian filter of these widths in voxels."""
    share = 1.0
    for width in sigma:
        impulse = np.zeros(33)
        impulse[16] = 1
        share *= float((ndimage.gaussian_filter1d(impulse, width, truncate=3.0) ** 2).sum())
    return share**0.5
