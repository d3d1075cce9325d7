"""Structural similarity of pairs, at one scale and at several, in 2D and 3D alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.errors import InputError
from raysynth.metrics.image import Array, Hu, windowed_pair

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM from the finest scale on (Wang et al. 2003, section 3.2)."""

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
"""Of the Gaussian window, in pixels: 11 a side (Wang et al. 2004)."""


@dataclass(frozen=True)
class Similarity:
    """Mean similarity of pairs; of both, higher is better, and 1 is equal.

    Attributes:
        ssim: mean of `ssim`, -1 to 1.
        ms_ssim: mean of `ms_ssim`, 0 to 1.
        count: pairs.
    """

    ssim: float
    ms_ssim: float
    count: int


class PairedSimilarity:
    """Mean SSIM and MS-SSIM of synthetic images with the real ones they were guided by.

    Wang et al. 2004 and 2003. Definitions, ranges and directions: see `ssim` and `ms_ssim`; for
    both, higher is better.
    Workers update their own and merge them in any order.

    Args:
        window_hu: HU are clipped to this range, whose width is the dynamic range L.
    """

    def __init__(self, window_hu: tuple[float, float]) -> None:
        self.window_hu = window_hu
        self.count = 0
        self.total_ssim = 0.0
        self.total_ms_ssim = 0.0

    def update(self, real_hu: Hu, synthetic_hu: Hu) -> None:
        """Adds pairs (n, y, x) or (n, z, y, x).

        Raises:
            InputError: shapes differ, no window fits, or there are voxels that are not finite.
        """
        self.count += len(real_hu)
        self.total_ssim += float(ssim(real_hu, synthetic_hu, self.window_hu).sum())
        self.total_ms_ssim += float(ms_ssim(real_hu, synthetic_hu, self.window_hu).sum())

    def merge(self, other: PairedSimilarity) -> None:
        """Adds what another worker saw through the same window."""
        assert other.window_hu == self.window_hu
        self.count += other.count
        self.total_ssim += other.total_ssim
        self.total_ms_ssim += other.total_ms_ssim

    def compute(self) -> Similarity:
        """The means of all pairs seen.

        Raises:
            InputError: there were none.
        """
        if not self.count:
            raise InputError("SSIM needs at least 1 pair, got 0: give some")
        return Similarity(self.total_ssim / self.count, self.total_ms_ssim / self.count, self.count)


def num_ssim_scales(size: int) -> int:
    """Scales of MS-SSIM for images of `size` pixels: five from 176 on, one below 22.

    Raises:
        InputError: even one window does not fit.
    """
    window = 2 * SSIM_RADIUS + 1
    if size < window:
        raise InputError(
            f"SSIM of images of {size} pixels: its window needs {window}, give larger ones"
        )
    return min(len(SCALE_WEIGHTS), (size // window).bit_length())


def ssim(one: Hu, other: Hu, window_hu: tuple[float, float]) -> NDArray[np.float64]:
    """Structural similarity of pairs, the mean over places (Wang et al. 2004, eq. 13 and 17).

    Gaussian window of 11 pixels a side and sigma 1.5, where it lies inside the image; K1 = 0.01,
    K2 = 0.03; variances without Bessel's correction. Volumes have a window of 11^3.

    Range and direction: -1 to 1, no unit; higher is better, and 1 only if equal.

    Args:
        one: images (n, y, x) or volumes (n, z, y, x), at least 11 pixels a side.
        other: those they are compared with, of the same shape.
        window_hu: HU are clipped to this range, whose width is the dynamic range L.

    Returns:
        A value of each pair (n,).

    Raises:
        InputError: shapes differ, no window fits, or there are voxels that are not finite.
    """
    x, y = windowed_pair(one, other, window_hu, "SSIM")
    num_ssim_scales(min(x.shape[1:]))
    luminance, structure = _ssim_parts(x, y)
    return (luminance * structure).mean(axis=_places(x))


def ms_ssim(one: Hu, other: Hu, window_hu: tuple[float, float]) -> NDArray[np.float64]:
    """Multi-scale structural similarity of pairs (Wang et al. 2003, eq. 7).

    Luminance enters at the coarsest scale alone. Where an image is too small for all five scales
    (see `num_ssim_scales`), the exponents of those that fit are made to sum to 1 again, so values
    compare at one size only. A structure term below 0 counts as 0.

    Range and direction: 0 to 1, no unit; of paired images higher is better, and 1 only if equal. Of
    two samples of one request the value of real pairs is the aim: neither extreme is better.

    Args:
        one: images (n, y, x) or volumes (n, z, y, x), at least 11 pixels a side.
        other: those they are compared with, of the same shape.
        window_hu: HU are clipped to this range, whose width is the dynamic range L.

    Returns:
        A value of each pair (n,).

    Raises:
        InputError: shapes differ, no window fits, or there are voxels that are not finite.
    """
    x, y = windowed_pair(one, other, window_hu, "MS-SSIM")
    scales = num_ssim_scales(min(x.shape[1:]))
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    value = np.ones(len(x))
    for scale, weight in enumerate(weights, start=1):
        luminance, structure = _ssim_parts(x, y)
        terms = structure * luminance if scale == scales else structure
        value *= np.maximum(terms.mean(axis=_places(x)), 0) ** weight
        x, y = _halved(x), _halved(y)
    return value


def _places(images: Array) -> tuple[int, ...]:
    """All axes but the first."""
    return tuple(range(1, images.ndim))


def _ssim_parts(x: Array, y: Array) -> tuple[Array, Array]:
    """Luminance, and contrast times structure, at every place of the window; K1 .01, K2 .03."""
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)


def _windowed(images: Array) -> Array:
    """Gaussian means where the window lies inside the image."""
    kernel = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    kernel /= kernel.sum()
    inside = slice(SSIM_RADIUS, -SSIM_RADIUS)
    for axis in _places(images):
        images = ndimage.correlate1d(images, kernel, axis=axis)
    return images[:, *[inside] * (images.ndim - 1)]


def _halved(images: Array) -> Array:
    """Means of 2 x 2 (x 2) pixels; an odd last plane, row or column is left out."""
    halves = [size // 2 for size in images.shape[1:]]
    even = images[:, *(slice(2 * half) for half in halves)]
    blocks = even.reshape(len(images), *(size for half in halves for size in (half, 2)))
    return blocks.mean(axis=tuple(range(2, blocks.ndim, 2)))
