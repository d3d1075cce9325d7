"""How Hounsfield units spread over tissues, and how far two such spreads are apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Label
from raysynth.metrics.samples import Features, checked_pair

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


def histogram_distance(real: Features, synthetic: Features) -> float:
    """How far, in HU, intensities must be moved on average to turn one histogram into the other.

    The 1-Wasserstein distance (Vaserstein 1969) of the pooled `tissue_histograms`, computed as the
    area between their cumulative shares (Ramdas et al. 2017, section 2).

    Range and direction: 0 to the width of `HISTOGRAM_RANGE_HU`, in HU to within
    `HISTOGRAM_STEP_HU`; lower is better. NaN where one side holds no pixel of the tissue.

    Args:
        real: counts (n, bins).
        synthetic: counts (m, bins).

    Raises:
        InputError: counts of other bins, or some are not finite.
    """
    totals = [side.sum(axis=0) for side in checked_pair(real, synthetic, "the HU distance", 0)]
    if not all(total.sum() for total in totals):
        return float("nan")
    real_cdf, synthetic_cdf = (np.cumsum(total / total.sum()) for total in totals)
    return float(np.abs(real_cdf - synthetic_cdf).sum() * HISTOGRAM_STEP_HU)
