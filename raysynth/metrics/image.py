"""Errors and likeness of paired images, and how Hounsfield units spread over tissues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import LUNG_LABELS, Label


@dataclass(frozen=True)
class SquaredError:
    """Mean squared error of pairs.

    Attributes:
        mse01: of intensities that the window maps to [0, 1].
        mse_hu2: in squared Hounsfield units, `mse01 * (high - low)^2`.
    """

    mse01: float
    mse_hu2: float


class PairedError:
    """Mean squared error of synthetic images against the real ones they were guided by.

    Meaningful for paired tasks alone: a good sampler does not minimise it.

    Args:
        window_hu: HU are clipped to this range first.
    """

    def __init__(self, window_hu: tuple[float, float]) -> None:
        self.window_hu = window_hu
        self.count = 0
        self.total_hu2 = 0.0
        """Sum of squares: whole numbers for a window of whole HU, hence exact in any order."""

    def update(
        self,
        real_hu: NDArray[np.int16],
        synthetic_hu: NDArray[np.int16],
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Adds pairs of equal shape; `mask` of that shape restricts the pixels."""
        assert real_hu.shape == synthetic_hu.shape
        difference = np.clip(real_hu.astype(np.float64), *self.window_hu) - np.clip(
            synthetic_hu.astype(np.float64), *self.window_hu
        )
        if mask is not None:
            difference = difference[mask]
        self.count += difference.size
        self.total_hu2 += float(np.sum(difference**2))

    def merge(self, other: PairedError) -> None:
        """Adds what another worker saw through the same window."""
        assert other.window_hu == self.window_hu
        self.count += other.count
        self.total_hu2 += other.total_hu2

    def compute(self) -> SquaredError:
        """The error of all pixels seen."""
        if not self.count:
            raise ValueError("no pixels were compared")
        low, high = self.window_hu
        mse_hu2 = self.total_hu2 / self.count
        return SquaredError(mse_hu2 / (high - low) ** 2, mse_hu2)


SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM from the finest scale on (Wang et al. 2003, section 3.2)."""

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
"""Of the Gaussian window, in pixels: 11 x 11 (Wang et al. 2004)."""


def num_ssim_scales(size: int) -> int:
    """Scales of MS-SSIM for images of `size` pixels: five from 176 on, one below 22.

    Raises:
        ValueError: even one window does not fit.
    """
    window = 2 * SSIM_RADIUS + 1
    if size < window:
        raise ValueError(f"SSIM of images of {size} pixels: its window needs {window}")
    return min(len(SCALE_WEIGHTS), (size // window).bit_length())


def ms_ssim(
    one: NDArray[np.int16], other: NDArray[np.int16], window_hu: tuple[float, float]
) -> NDArray[np.float64]:
    """Multi-scale structural similarity of pairs (Wang et al. 2003, eq. 7); 1 only if equal.

    Luminance enters at the coarsest scale alone. Where an image is too small for all five scales
    (see `num_ssim_scales`), the exponents of those that fit are made to sum to 1 again, so values
    compare at one size only. A structure term below 0 counts as 0.

    Args:
        one: images (n, y, x).
        other: those they are compared with, of the same shape.
        window_hu: HU are clipped to this range, whose width is the dynamic range L.

    Returns:
        A value of each pair (n,), 0 to 1.
    """
    assert one.shape == other.shape
    low, high = window_hu
    x, y = (
        (np.clip(image, low, high).astype(np.float64) - low) / (high - low)
        for image in (one, other)
    )
    scales = num_ssim_scales(min(one.shape[1:]))
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    value = np.ones(len(x))
    for scale, weight in enumerate(weights, start=1):
        luminance, structure = _ssim_parts(x, y)
        terms = structure * luminance if scale == scales else structure
        value *= np.maximum(terms.mean(axis=(1, 2)), 0) ** weight
        x, y = _halved(x), _halved(y)
    return value


def _ssim_parts(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Luminance, and contrast times structure, at every place of the window; K1 .01, K2 .03."""
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)


def _windowed(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian means where the window lies inside the image."""
    kernel = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        images = ndimage.correlate1d(images, kernel, axis=axis)
    return images[:, SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS]


def _halved(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    n, height, width = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2).mean(axis=(2, 4))


TISSUES: dict[str, tuple[int, ...]] = {
    "lung": tuple(LUNG_LABELS),
    "body": (Label.BODY,),
    "nodule": (Label.NODULE,),
}
"""Tissues by the labels of the requested (or annotated) layout."""

HISTOGRAM_RANGE_HU = (-1200, 1200)
HISTOGRAM_STEP_HU = 10


def tissue_histograms(
    hu: NDArray[np.int16], layout: NDArray[np.uint8]
) -> dict[str, NDArray[np.float32]]:
    """For each tissue the counts (n, bins) of its pixels' HU in each of n samples.

    Counts add up, so they are features like any other: sum rows to merge. HU beyond
    `HISTOGRAM_RANGE_HU` count in the outermost bins.
    """
    low, high = HISTOGRAM_RANGE_HU
    num_bins = (high - low) // HISTOGRAM_STEP_HU
    bins = (np.clip(hu, low, high - 1).astype(np.int32) - low) // HISTOGRAM_STEP_HU
    sample = np.arange(len(hu)).reshape(-1, *[1] * (hu.ndim - 1))
    place = sample * num_bins + bins
    return {
        tissue: np.bincount(place[np.isin(layout, labels)], minlength=len(hu) * num_bins)
        .reshape(len(hu), num_bins)
        .astype(np.float32)
        for tissue, labels in TISSUES.items()
    }


def histogram_distance(real: NDArray[np.floating], synthetic: NDArray[np.floating]) -> float:
    """How far, in HU, intensities must be moved on average to turn one histogram into the other.

    The 1-Wasserstein distance of the pooled `tissue_histograms`, shapes (n, bins) and (m, bins);
    NaN where one holds no pixel.
    """
    totals = [counts.sum(axis=0, dtype=np.float64) for counts in (real, synthetic)]
    if not all(total.sum() for total in totals):
        return float("nan")
    real_cdf, synthetic_cdf = (np.cumsum(total / total.sum()) for total in totals)
    return float(np.abs(real_cdf - synthetic_cdf).sum() * HISTOGRAM_STEP_HU)
