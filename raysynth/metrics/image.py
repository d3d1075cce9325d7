"""Errors of paired images, and how Hounsfield units spread over tissues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
