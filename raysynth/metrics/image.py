"""Errors of synthetic images against the real ones they were guided by, in 2D and 3D alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError
from raysynth.metrics.samples import require_finite

Array = NDArray[np.float64]
Hu = NDArray[np.int16] | NDArray[np.floating]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class PairedErrors:
    """Mean errors of pairs.

    Attributes:
        mse01: mean squared error of intensities that the window maps to [0, 1], over all pixels
            together; 0 to 1, lower is better.
        mse_hu2: in squared Hounsfield units, `mse01 * (high - low)^2`; lower is better.
        psnr_db: mean of the pairs' `psnr`; 0 to infinity, higher is better. Infinite as soon as one
            pair is equal.
    """

    mse01: float
    mse_hu2: float
    psnr_db: float


class PairedError:
    """Mean squared error and PSNR of synthetic images against the real ones they were guided by.

    MSE `sum (x - y)^2 / n`, over all pixels of all pairs together; PSNR (Huynh-Thu and Ghanbari
    2008), the mean over pairs. Ranges, units and directions: see `PairedErrors`; a lower MSE
    and a higher PSNR are better. Meaningful for paired tasks alone: a good sampler does not
    minimise it. Workers update their own and merge them in any order.

    Args:
        window_hu: HU are clipped to this range first.
    """

    def __init__(self, window_hu: tuple[float, float]) -> None:
        self.window_hu = window_hu
        self.count = 0
        self.total_hu2 = 0.0
        """Sum of squares: whole numbers for a window of whole HU, hence exact in any order."""
        self.num_pairs = 0
        self.total_db = 0.0

    def update(self, real_hu: Hu, synthetic_hu: Hu, mask: Mask | None = None) -> None:
        """Adds pairs (n, y, x) or (n, z, y, x); `mask` of that shape restricts the pixels.

        A pair of which the mask shows nothing has no PSNR and is left out of its mean.

        Raises:
            InputError: shapes differ, or there are voxels that are not finite.
        """
        squares, shown = _squares(real_hu, synthetic_hu, self.window_hu, mask, "MSE")
        self.count += int(shown.sum())
        self.total_hu2 += float(squares.sum())
        seen = shown > 0
        self.num_pairs += int(seen.sum())
        self.total_db += float(_decibels(squares[seen] / shown[seen], self.window_hu).sum())

    def merge(self, other: PairedError) -> None:
        """Adds what another worker saw through the same window."""
        assert other.window_hu == self.window_hu
        self.count += other.count
        self.total_hu2 += other.total_hu2
        self.num_pairs += other.num_pairs
        self.total_db += other.total_db

    def compute(self) -> PairedErrors:
        """The errors of all pixels seen.

        Raises:
            InputError: there were none.
        """
        if not self.count:
            raise InputError("MSE needs at least 1 pixel, got 0: give pairs that the mask shows")
        low, high = self.window_hu
        mse_hu2 = self.total_hu2 / self.count
        return PairedErrors(mse_hu2 / (high - low) ** 2, mse_hu2, self.total_db / self.num_pairs)


def psnr(
    one: Hu, other: Hu, window_hu: tuple[float, float], mask: Mask | None = None
) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of pairs, `10 log10(L^2 / MSE)` with the window's width as L.

    Huynh-Thu and Ghanbari 2008. Range and direction: 0 dB to infinity, higher is better;
    infinite for equal images. A wider window gives higher values: compare at one window alone.

    Args:
        one: images (n, y, x) or volumes (n, z, y, x).
        other: those they are compared with, of the same shape.
        window_hu: HU are clipped to this range, whose width is L.
        mask: of the same shape; None: all pixels count.

    Returns:
        Decibels of each pair (n,).

    Raises:
        InputError: shapes differ, there are voxels that are not finite, or a mask shows none.
    """
    squares, shown = _squares(one, other, window_hu, mask, "PSNR")
    if not shown.all():
        raise InputError(
            f"PSNR needs at least 1 pixel a pair, got 0 of pair {np.argmin(shown)}: leave it out"
        )
    return _decibels(squares / shown, window_hu)


def windowed_pair(
    one: Hu, other: Hu, window_hu: tuple[float, float], metric: str
) -> tuple[Array, Array]:
    """Pairs of images clipped to a window, which becomes [0, 1].

    Args:
        one: images (n, y, x) or volumes (n, z, y, x).
        other: of the same shape.
        window_hu: (low, high).
        metric: what they are for, for the message.

    Raises:
        InputError: shapes differ or are others, or there are voxels that are not finite.
    """
    low, high = window_hu
    x, y = _clipped_pair(one, other, window_hu, metric)
    return (x - low) / (high - low), (y - low) / (high - low)


def _clipped_pair(
    one: Hu, other: Hu, window_hu: tuple[float, float], metric: str
) -> tuple[Array, Array]:
    if one.shape != other.shape or one.ndim not in (3, 4):
        raise InputError(
            f"{metric} compares images (n, y, x) or volumes (n, z, y, x) of one shape, not "
            f"{one.shape} and {other.shape}: crop or resample them first"
        )
    for images in (one, other):
        require_finite(images, metric, "voxels")
    # Clipped in their own type, then widened: what comes out is exact for whole HU.
    x, y = (np.clip(images, *window_hu).astype(np.float64) for images in (one, other))
    return x, y


def _squares(
    one: Hu, other: Hu, window_hu: tuple[float, float], mask: Mask | None, metric: str
) -> tuple[Array, NDArray[np.int64]]:
    """Of each pair the sum of squared differences in HU, and over how many pixels (n,)."""
    x, y = _clipped_pair(one, other, window_hu, metric)
    places = tuple(range(1, x.ndim))
    if mask is None:
        shown = np.full(len(x), x[0].size if len(x) else 0, np.int64)
        return ((x - y) ** 2).sum(axis=places), shown
    if mask.shape != one.shape:
        raise InputError(f"a mask {mask.shape} for images {one.shape}: give one of their shape")
    shown = mask.sum(axis=places, dtype=np.int64)
    return np.where(mask, (x - y) ** 2, 0).sum(axis=places), shown


def _decibels(mse_hu2: Array, window_hu: tuple[float, float]) -> Array:
    low, high = window_hu
    with np.errstate(divide="ignore"):  # equal images have no error
        decibels: Array = 10 * np.log10((high - low) ** 2 / mse_hu2)
    return decibels
