"""What radiologists and radiomics measure of nodules, and how far two sets of them are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats
from scipy.spatial import ConvexHull

from raysynth.errors import InputError
from raysynth.metrics.image import Hu, Mask
from raysynth.metrics.samples import Features, checked_pair, require_finite

Array = NDArray[np.float64]

RADIOMICS = {2: "radiomics@1", 3: "radiomics3d@1"}
"""Stands for `radiomic_features` of slices and of volumes where metric keys name an extractor:
circularity is another thing than sphericity, and a section another than its nodule."""

RADIOMIC_SPREADS = {
    "diameter_mm": 7.0,
    "circularity": 0.15,
    "elongation": 0.12,
    "solidity": 0.05,
    "mean_hu": 220.0,
    "sd_hu": 80.0,
    "skewness": 0.9,
    "kurtosis": 4.0,
    "entropy_bits": 0.5,
    "p10_hu": 160.0,
    "p90_hu": 260.0,
    "edge_hu_per_mm": 60.0,
    "glcm_contrast": 12.0,
    "glcm_homogeneity": 0.13,
    "glcm_correlation": 0.18,
    "ring_contrast_hu": 210.0,
}
"""Features in their order, each with its rounded standard deviation over real nodules (largest
sections of 133 of LIDC): the units in which `radiomic_features` counts them."""

RADIOMIC_NAMES = tuple(RADIOMIC_SPREADS)

MIN_PIXELS = 4
"""Smaller masks have no shape and no texture to speak of."""

MIN_RADIOMIC_SAMPLES = 2
"""Fewer have no standard deviation."""

HU_STEP = 25
"""Width of the bins of the entropy."""

GREY_RANGE_HU, GREY_STEP_HU = (-1000, 400), 50
"""Grey levels of the texture: 28."""

RING_MM = 5.0
"""Width of the ring around a nodule that it is compared with."""


def radiomics(hu: Hu, mask: Mask, pixel_mm: float | Sequence[float]) -> NDArray[np.float32]:
    """Size, shape, grey values, edge, texture and contrast of nodules, in `RADIOMIC_NAMES`' order.

    Follows Zwanenburg et al. 2020 (IBSI) where it has the feature:

    * `diameter_mm`: of the disc (ball) of equal area (volume), above 0.
    * `circularity`: `4 pi area / perimeter^2` with Crofton's perimeter, of volumes the sphericity
      `(36 pi volume^2)^(1/3) / surface` of a smoothed mesh; above 0, about 1 if round.
    * `elongation`: root of the second largest by the largest variance along an axis, 0 to 1, 1 if
      round.
    * `solidity`: share of its convex hull that it fills, 0 to 1.
    * `mean_hu`, `sd_hu`, `p10_hu`, `p90_hu` inside, and without a unit `skewness` and (excess)
      `kurtosis`, both 0 of a Gaussian and of a constant.
    * `entropy_bits`: of a histogram in fixed bins of 25 HU, from 0.
    * `edge_hu_per_mm`: mean size of the gradient in the pixels on both sides of the border, from 0.
    * `glcm_contrast`, `glcm_homogeneity`, `glcm_correlation`: of the co-occurrence of 28 fixed grey
      levels in neighbours within a slice, in the mask, all directions together (Haralick et al.
      1973); from 0, 0 to 1, -1 to 1. Of a constant 0, 1 and 1.
    * `ring_contrast_hu`: mean inside less mean of the 5 mm around.

    Ranges stand at each. None is better or worse by itself: synthetic nodules should be distributed
    as real ones are, see `radiomic_distances`. Texture is of neighbouring pixels: compare at one
    pixel size.

    Args:
        hu: crops (n, y, x) or (n, z, y, x) around a nodule each.
        mask: of the nodules, of the same shape, `MIN_PIXELS` each and not the whole crop; see
            `measurable_masks`.
        pixel_mm: side of a pixel, or one for each axis of a crop.

    Returns:
        Features (n, 16), all finite.

    Raises:
        InputError: shapes differ, a mask is too small or fills its crop, or pixels are not finite.
    """
    if hu.shape != mask.shape or hu.ndim not in (3, 4):
        raise InputError(
            f"radiomics take crops (n, y, x) or (n, z, y, x) and masks of one shape, not "
            f"{hu.shape} and {mask.shape}: cut both alike"
        )
    require_finite(hu, "radiomics", "pixels")
    mask = mask.astype(np.bool_)
    unfit = np.flatnonzero(~measurable_masks(mask))
    if len(unfit):
        raise InputError(
            f"radiomics need masks of at least {MIN_PIXELS} pixels with some outside, got "
            f"{mask[unfit[0]].sum()} of {mask[0].size} in nodule {unfit[0]}: leave out what "
            "measurable_masks does"
        )
    spacing_mm = np.broadcast_to(np.asarray(pixel_mm, np.float64), hu.ndim - 1)
    rows = [
        _radiomics(crop.astype(np.float64), inside, spacing_mm)
        for crop, inside in zip(hu, mask, strict=True)
    ]
    return np.array(rows, np.float32).reshape(-1, len(RADIOMIC_NAMES))


def measurable_masks(mask: Mask) -> Mask:
    """Which nodules (n,) can be measured: at least `MIN_PIXELS` and some pixel around them."""
    counts = mask.sum(axis=tuple(range(1, mask.ndim)))
    return (counts >= MIN_PIXELS) & (counts < np.prod(mask.shape[1:]))


def radiomic_features(hu: Hu, mask: Mask, pixel_mm: float | Sequence[float]) -> NDArray[np.float32]:
    """`radiomics` in units of real nodules' spread: the features of `RADIOMICS`.

    Fixed units keep the Fréchet distance from being one of Hounsfield units alone, and let figures
    of different runs compare; those of sections serve for volumes, too. See `radiomics` for
    arguments, shapes and errors.
    """
    spreads = np.array(list(RADIOMIC_SPREADS.values()), np.float32)
    return radiomics(hu, mask, pixel_mm) / spreads


def radiomic_distances(real: Features, synthetic: Features) -> dict[str, float]:
    """For each feature how far its synthetic distribution is from the real one.

    The 1-Wasserstein distance (Ramdas et al. 2017, section 2) in units of the real feature's
    standard deviation, so that features compare.

    Range and direction: 0 to infinity, no unit; lower is better. 1 is a shift by one standard
    deviation. Where the real feature does not vary it is 0 if all synthetic ones equal it, and
    infinite otherwise. It is biased upward at small N: compare at equal N, beside what two real
    sets reach.

    Args:
        real: `radiomics` (n, 16).
        synthetic: `radiomics` (m, 16).

    Returns:
        Distances by `RADIOMIC_NAMES`.

    Raises:
        InputError: fewer than two nodules on a side, other features, or some are not finite.
    """
    x, y = checked_pair(real, synthetic, "radiomic distances", MIN_RADIOMIC_SAMPLES)
    if x.shape[1] != len(RADIOMIC_NAMES):
        raise InputError(
            f"radiomic distances of {x.shape[1]} features, not {len(RADIOMIC_NAMES)}: give what "
            "radiomics returns"
        )
    return {
        name: _standard_distance(x[:, column], y[:, column])
        for column, name in enumerate(RADIOMIC_NAMES)
    }


def _standard_distance(real: Array, synthetic: Array) -> float:
    distance, spread = float(stats.wasserstein_distance(real, synthetic)), float(real.std(ddof=1))
    if spread:
        return distance / spread
    return math.inf if distance else 0.0


def _radiomics(hu: Array, mask: Mask, spacing_mm: Array) -> list[float]:
    """The features of one nodule."""
    return [
        *_shape(mask, spacing_mm),
        *_first_order(hu[mask]),
        _edge(hu, mask, spacing_mm),
        *_texture(hu, mask),
        _ring_contrast(hu, mask, spacing_mm),
    ]


def _shape(mask: Mask, spacing_mm: Array) -> tuple[float, float, float, float]:
    """Diameter, circularity, elongation and solidity."""
    size = mask.sum() * np.prod(spacing_mm)  # mm2 or mm3
    of_unit_radius = math.pi if mask.ndim == 2 else 4 / 3 * math.pi
    # A pixel is a square, not a point: it has a variance of its own.
    places = np.argwhere(mask) * spacing_mm
    spread = np.cov(places, rowvar=False, bias=True) + np.diag(spacing_mm**2 / 12)
    *_, second, largest = np.linalg.eigvalsh(spread)
    return (
        2 * (size / of_unit_radius) ** (1 / mask.ndim),
        _roundness(mask, size, spacing_mm),
        math.sqrt(second / largest),
        min(1.0, size / _hull_size(mask, spacing_mm)),
    )


def _hull_size(mask: Mask, spacing_mm: Array) -> float:
    """Area (volume) of the convex hull of the middles of all pixels' sides.

    They are never on one line; the corners would find a small disc less solid than a large one.
    """
    steps = np.concatenate([np.eye(mask.ndim), -np.eye(mask.ndim)]) / 2
    middles = np.unique((np.argwhere(mask)[:, None] + steps).reshape(-1, mask.ndim), axis=0)
    return float(ConvexHull(middles * spacing_mm).volume)


def _roundness(mask: Mask, size: float, spacing_mm: Array) -> float:
    """Circularity of a section, sphericity of a volume."""
    from skimage.measure import marching_cubes, mesh_surface_area, perimeter_crofton

    if mask.ndim == 2:
        # It is counted in sides of square pixels; of oblong ones the geometric mean stands for it.
        perimeter = perimeter_crofton(mask) * math.sqrt(np.prod(spacing_mm))
        return float(4 * math.pi * size / perimeter**2)
    # Smoothed by a voxel: the steps of a bare mask would count as surface. That shrinks small ones,
    # so volume and surface are both those of the mesh.
    soft = ndimage.gaussian_filter(np.pad(mask, 3).astype(np.float64), 1)
    vertices, faces, *_ = marching_cubes(soft, min(0.5, soft.max() / 2), spacing=tuple(spacing_mm))
    corners = vertices[faces].astype(np.float64)  # (faces, 3, 3)
    volume = abs(np.linalg.det(corners).sum()) / 6
    return float((36 * math.pi * volume**2) ** (1 / 3) / mesh_surface_area(vertices, faces))


def _first_order(values: Array) -> tuple[float, ...]:
    """Mean, standard deviation, skewness, kurtosis, entropy and two percentiles."""
    mean, sd = values.mean(), values.std()
    # Of a constant nothing but rounding is left to be skewed.
    standard = (values - mean) / sd if sd > 1e-9 else np.zeros(0)
    skewness = float(np.mean(standard**3)) if standard.size else 0.0
    kurtosis = float(np.mean(standard**4) - 3) if standard.size else 0.0
    _, counts = np.unique(np.floor(values / HU_STEP), return_counts=True)
    shares = counts / counts.sum()
    entropy = -float(np.sum(shares * np.log2(shares)))
    low, high = np.percentile(values, (10, 90))
    return float(mean), float(sd), skewness, kurtosis, max(0.0, entropy), float(low), float(high)


def _edge(hu: Array, mask: Mask, spacing_mm: Array) -> float:
    """Mean size of the gradient on both sides of the border."""
    border = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask, border_value=1)
    slopes = np.gradient(hu, *spacing_mm)
    return float(np.sqrt(sum(slope**2 for slope in slopes))[border].mean())


def _texture(hu: Array, mask: Mask) -> tuple[float, float, float]:
    """Contrast, homogeneity and correlation of neighbours within a slice."""
    from skimage.feature import graycomatrix, graycoprops

    low, high = GREY_RANGE_HU
    levels = (high - low) // GREY_STEP_HU
    grey = (np.clip(hu, low, high - 1) - low) // GREY_STEP_HU + 1
    # What lies outside has a level of its own, which is left out.
    shown = np.where(mask, grey, 0).astype(np.uint8).reshape(-1, *hu.shape[-2:])
    angles = [0, math.pi / 4, math.pi / 2, 3 * math.pi / 4]
    pairs = sum(graycomatrix(slice_, [1], angles, levels + 1, symmetric=True) for slice_ in shown)
    together = np.asarray(pairs)[1:, 1:].sum(axis=(2, 3), keepdims=True).astype(np.float64)
    if not together.any():  # pixels without a neighbour
        return 0.0, 1.0, 1.0
    together /= together.sum()
    contrast, homogeneity, correlation = (
        float(graycoprops(together, name)[0, 0])
        for name in ("contrast", "homogeneity", "correlation")
    )
    return contrast, homogeneity, correlation


def _ring_contrast(hu: Array, mask: Mask, spacing_mm: Array) -> float:
    """Mean inside less mean of the ring around; where pixels are coarse, the nearest ones."""
    distance = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    outside = distance[~mask]
    ring = ~mask & (distance <= max(RING_MM, outside.min()))
    return float(hu[mask].mean() - hu[ring].mean())
