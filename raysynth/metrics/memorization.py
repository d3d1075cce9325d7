"""Memorization: is an image a copy of a training image, and how sure is that.

Every image is compared with all training images by three criteria, each blind to flips and
transposes: features of `ct-conv`, its pixels at low resolution, and the normalized correlation of
its pixels, in crops also over shifts of up to `SHIFT_PX`. What real held-out images reach says
which likeness is nothing but chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import stats

from raysynth.metrics.features import Extractor
from raysynth.window import LUNG_WINDOW_HU

CRITERIA = ("embedding", "pixel", "ncc")
"""Columns of distances; of `ncc` it is 1 minus the correlation."""

SHIFT_PX = 6
THUMB = 16
"""Pixels a side of the low resolution."""

CANDIDATES = 8
"""Training images whose correlation is taken at full resolution: the likest at the low one. A
quarter of the shifts and a sixteenth of the work, and the nearest one is hardly ever missed."""

EXACT_NCC = 0.999
"""From here on it is the same picture, up to flips, shifts and a few HU of noise."""

LEAST_DISTANCE = 1e-4
"""Distances below it are those of copies; their logarithms must stay finite."""

FLAT = 0.002
"""Standard deviation, as a share of the window, below which a picture shows nothing."""

BLOCK = 256
"""Training images at once: some 60 MB."""

TINY = 1e-12

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """Images of one region, ready to be compared.

    Attributes:
        windows: each with `margin` pixels around it on every side (n, y, x), 0 to 1.
        margin: `SHIFT_PX` or, for what cannot be shifted, 0.
        features: of the images and, of those that are looked up, their flips (1 or 8, n, dim); the
            first are the images themselves. None: they are compared by their pixels alone.
        mask: what of the images counts (n, y, x); None: all.
    """

    windows: NDArray[np.float16]
    margin: int
    features: Array | None
    mask: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def images(self) -> Array:
        """Without the margin (n, y, x)."""
        inner = slice(self.margin, self.windows.shape[1] - self.margin)
        return self.windows[:, inner, inner].astype(np.float32)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Pictures:
        """Some of them."""
        return Pictures(
            self.windows[rows],
            self.margin,
            None if self.features is None else self.features[:, rows],
            None if self.mask is None else self.mask[rows],
        )


@dataclass(frozen=True)
class Nearest:
    """How near images come to a bank.

    Attributes:
        distance: by criterion (n, 3); NaN where one does not apply.
        row: which of the bank is that near (n, 3).
    """

    distance: NDArray[np.float64]
    row: NDArray[np.int64]


def pictures_of(
    hu: NDArray[np.int16],
    margin: int,
    extractor: Extractor | None,
    window_hu: tuple[float, float] = LUNG_WINDOW_HU,
    mask: NDArray[np.bool_] | None = None,
    flipped: bool = True,
) -> Pictures:
    """Makes images comparable.

    Args:
        hu: with `margin` pixels around each (n, y, x).
        margin: `SHIFT_PX` for crops, 0 for whole slices.
        extractor: of features; None where a mask makes them meaningless.
        window_hu: HU that are told apart.
        mask: what of the images counts (n, y, x), without the margin.
        flipped: whether they will be looked up in a bank; else they can only be in one.
    """
    low, high = window_hu
    windows = (np.clip(hu.astype(np.float32), low, high) - low) / (high - low)
    inner = slice(margin, hu.shape[1] - margin)
    features = None
    if extractor is not None:
        versions = flips(hu[:, inner, inner])[: None if flipped else 1]
        features = np.stack([extractor(np.ascontiguousarray(version)) for version in versions])
    return Pictures(windows.astype(np.float16), margin, features, mask)


def flips(images: NDArray) -> list[NDArray]:
    """The eight flips and transposes of square images (n, y, x), the images themselves first."""
    turned = [images, images.transpose(0, 2, 1)]
    return [one[:, ::up, ::left] for one in turned for up in (1, -1) for left in (1, -1)]


def nearest(queries: Pictures, bank: Pictures, is_kin: NDArray[np.bool_] | None = None) -> Nearest:
    """How near images come to a bank, by every criterion.

    Args:
        queries: a few hundred at most: memory grows with their number.
        bank: what they may have been copied from.
        is_kin: (n, bank): pairs that are not to be compared, such as those of one patient.
    """
    blocked = np.zeros((len(queries), len(bank)), bool) if is_kin is None else is_kin
    by_feature = feature_distances(queries, bank)
    by_pixel, likeness = _low_resolution(queries, bank)
    tables = [by_feature, by_pixel]
    distance = np.full((len(queries), len(CRITERIA)), np.nan)
    row = np.zeros((len(queries), len(CRITERIA)), np.int64)
    for column, table in enumerate(tables):
        if table is not None:
            table = np.where(blocked, np.inf, table)
            row[:, column] = table.argmin(axis=1)
            distance[:, column] = table.min(axis=1)
    likeness = np.where(blocked, -np.inf, likeness)
    likest = np.argsort(-likeness, axis=1, kind="stable")[:, :CANDIDATES]
    for number, candidates in enumerate(likest):
        candidates = candidates[~blocked[number, candidates]]
        found = _correlations(queries.take(slice(number, number + 1)), bank.take(candidates))
        row[number, 2] = candidates[found.argmax()]
        distance[number, 2] = 1 - found.max()
    return Nearest(distance, row)


def aligned(query: Pictures, other: Pictures) -> Array:
    """One picture, flipped and shifted until it is as like another one as it can be (y, x)."""
    images = query.images
    size = images.shape[1]
    patches = _patches(other.windows.astype(np.float32), size)
    mask = None if query.mask is None else query.mask.astype(np.float32)
    found = _correlate(_templates(images, mask), patches)[:, 0, 0]
    version, place = np.unravel_index(int(found.argmax()), found.shape)
    patch: Array = patches[0, place].reshape(size, size)
    # A flip undoes itself; the transpose came first.
    transposes, up, left = version // 4, (1, -1)[version // 2 % 2], (1, -1)[version % 2]
    patch = patch[::up, ::left]
    return patch.T if transposes else patch


def feature_distances(queries: Pictures, bank: Pictures) -> Array | None:
    """Distances of features (n, bank), each the least over the query's flips."""
    if queries.features is None or bank.features is None:
        return None
    centre = bank.features[0].mean(axis=0)  # near the origin less is lost in the difference
    others = bank.features[0] - centre
    least = np.full((len(queries), len(bank)), np.inf, np.float32)
    for version in queries.features - centre:
        squared = (version**2).sum(1)[:, None] + (others**2).sum(1) - 2 * version @ others.T
        np.minimum(least, squared, out=least)
    return np.sqrt(np.maximum(least, 0))


def pixel_distances(queries: Pictures, bank: Pictures) -> Array:
    """Distances of normalized low-resolution pixels (n, bank), the least over the query's flips."""
    return _low_resolution(queries, bank)[0]


def _low_resolution(queries: Pictures, bank: Pictures) -> tuple[Array, Array]:
    """Distances without shifts, and the largest correlations over all shifts, (n, bank)."""
    size = queries.windows.shape[1] - 2 * queries.margin
    assert size % THUMB == 0, f"{size} pixels a side"
    factor, margin = size // THUMB, bank.margin * THUMB // size
    templates = _templates(
        _shrunk(queries.images, factor),
        None if queries.mask is None else _shrunk(queries.mask, factor),
    )
    still, moved = (np.empty((len(queries), len(bank)), np.float32) for _ in range(2))
    middle = margin * (2 * margin + 1) + margin
    for start in range(0, len(bank), BLOCK):
        rows = slice(start, start + BLOCK)
        found = _correlate(templates, _patches(_shrunk(bank.windows[rows], factor), THUMB))
        still[:, rows] = found[..., middle].max(axis=0)
        moved[:, rows] = found.max(axis=(0, 3))
    return np.sqrt(np.maximum(2 - 2 * still, 0)), moved


def _correlations(query: Pictures, bank: Pictures) -> Array:
    """The largest correlation of one image, at full resolution, with each of a few (bank,)."""
    mask = None if query.mask is None else query.mask.astype(np.float32)
    images = query.images
    patches = _patches(bank.windows.astype(np.float32), images.shape[1])
    largest: Array = _correlate(_templates(images, mask), patches)[:, 0].max(axis=(0, 2))
    return largest


@dataclass(frozen=True)
class _Templates:
    """Flips of images, of zero weighted mean and unit weighted norm; of flat ones all is 0.

    Attributes:
        values: times their weights (8, n, pixels).
        weight: (8, n, pixels); None: all pixels count alike.
    """

    values: Array
    weight: Array | None


def _templates(images: Array, masks: Array | None) -> _Templates:
    values = np.stack(flips(images)).reshape(8, len(images), -1)
    weight = None if masks is None else np.stack(flips(masks)).reshape(values.shape)
    each = np.ones_like(values) if weight is None else weight
    total = np.maximum(each.sum(axis=-1, keepdims=True), 1e-6)
    values = values - (each * values).sum(axis=-1, keepdims=True) / total
    square = (each * values**2).sum(axis=-1, keepdims=True)
    shows = square > FLAT**2 * total
    return _Templates(np.where(shows, each * values / np.sqrt(np.maximum(square, TINY)), 0), weight)


def _patches(windows: Array, size: int) -> Array:
    """All squares of a size in windows, as vectors (n, places, size * size)."""
    views = sliding_window_view(windows, (size, size), axis=(1, 2))
    return np.ascontiguousarray(views, dtype=np.float32).reshape(len(windows), -1, size * size)


def _correlate(templates: _Templates, patches: Array) -> Array:
    """Correlations with patches (8, n, bank, places); 0 where one of both is flat."""
    count, places, pixels = patches.shape
    flat = patches.reshape(-1, pixels)
    values = templates.values.reshape(-1, pixels)
    if templates.weight is None:
        flat = flat - flat.mean(axis=1, keepdims=True)
        norm = np.sqrt((flat**2).sum(axis=1, keepdims=True))
        flat = np.where(norm > FLAT * pixels**0.5, flat / np.maximum(norm, TINY), 0)
        found = values @ flat.T
    else:
        # The template's weighted mean is 0, so the patch's own mean takes nothing away here.
        weight = templates.weight.reshape(-1, pixels)
        total = np.maximum(weight.sum(axis=1, keepdims=True), 1e-6)
        square = weight @ (flat**2).T - (weight @ flat.T) ** 2 / total
        shows = square > FLAT**2 * total
        found = np.where(shows, values @ flat.T / np.sqrt(np.maximum(square, TINY)), 0)
    return found.reshape(*templates.values.shape[:2], count, places)


def _shrunk(images: NDArray, factor: int) -> Array:
    """Means of squares of `factor` pixels a side."""
    n, height, width = images.shape
    height, width = height // factor, width // factor
    even = images[:, : height * factor, : width * factor].astype(np.float32)
    return even.reshape(n, height, factor, width, factor).mean(axis=(2, 4))


@dataclass(frozen=True)
class Scale:
    """Brings the criteria to one scale, so that one number says how suspicious an image is.

    Attributes:
        middle: median log distance between images of different patients, by criterion.
        spread: from there to the 5th percentile.
    """

    middle: NDArray[np.float64]
    spread: NDArray[np.float64]

    @classmethod
    def of(cls, distance: NDArray[np.float64]) -> Scale:
        """From distances of training images to those of other patients (n, 3).

        They are no part of what thresholds are set by, so the score is fixed before that.
        """
        logs = np.log(np.maximum(distance, LEAST_DISTANCE))
        middle, low = np.quantile(logs, (0.5, 0.05), axis=0)
        return cls(middle, np.maximum(middle - low, 1e-3))

    def by_criterion(self, distance: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many spreads nearer than usual (n, 3)."""
        logs = np.log(np.maximum(distance, LEAST_DISTANCE))
        return np.where(np.isnan(distance), -np.inf, (self.middle - logs) / self.spread)

    def scores(self, distance: NDArray[np.float64]) -> NDArray[np.float64]:
        """By the criterion that finds each image most suspicious (n,)."""
        scores: NDArray[np.float64] = self.by_criterion(distance).max(axis=1)
        return scores


@dataclass(frozen=True)
class Threshold:
    """The score from which on an image counts as a copy.

    Attributes:
        score: an image is flagged if its own is larger.
        alarms: held-out images at or above it, of `count`.
        count: held-out images.
        expected: share of honest images that are flagged, mean over draws of the held-out.
        at_most: and with 97.5 % confidence in these held-out images.
    """

    score: float
    alarms: int
    count: int
    expected: float
    at_most: float


def least_held_out(rate: float) -> int:
    """Held-out images that a threshold at this rate of false alarms needs."""
    return int(np.ceil(1 / rate))


def threshold_of(scores: NDArray[np.float64], rate: float) -> Threshold:
    """Calibrates on held-out images, by all criteria together (split conformal).

    The share of honest images above the k-th largest of m held-out scores is distributed as
    Beta(k, m + 1 - k) over draws of both, whatever the scores are (Vovk 2012). k is the largest for
    which that share is at most `rate` with 95 % confidence; with fewer than 299 images at 1 % there
    is none, and the largest score is taken, where the mean share is at most `rate`.

    Args:
        scores: of held-out images (m,), at least `least_held_out`.
        rate: largest share of honest images that may be flagged.
    """
    m = len(scores)
    assert m >= least_held_out(rate), m
    ks = np.arange(1, max(2, int(rate * m) + 1))
    sure = ks[stats.beta.ppf(0.95, ks, m + 1 - ks) <= rate]
    k = int(sure.max(initial=1))
    score = float(np.sort(scores)[-k])
    at_most = float(stats.beta.ppf(0.975, k, m + 1 - k))
    return Threshold(score, k, m, k / (m + 1), at_most)


def is_exact(distance: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which images are the same picture as a training image (n,)."""
    exact: NDArray[np.bool_] = distance[:, 2] <= 1 - EXACT_NCC
    return exact


def auc(inside: NDArray[np.floating], outside: NDArray[np.floating]) -> float:
    """How well a small distance tells one group from another: .5 not at all, 1 wholly."""
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    n, m = len(inside), len(outside)
    return float(1 - (ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
