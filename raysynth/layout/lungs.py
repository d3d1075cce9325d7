"""Turns air inside the body into a left and a right lung with smooth, closed outlines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.layout.morphology import (
    IN_PLANE,
    Mask,
    bounding_box,
    close_mask,
    depth,
    fill_holes,
)
from raysynth.volume import Triple

AIR_HU = -400.0
"""Half way between lung and soft tissue: below it a voxel counts as lung."""
GAS_HU = -970.0
GAS_SHARE = 0.15
GAS_MM3 = 500e3
"""Smaller parts with more than this share below GAS_HU are bowel gas or room air: lungs, even with
emphysema, lie below it in single spots, and no bowel holds half a litre in one piece."""
MIN_LUNG_MM3 = 50e3
APART_MM = 50.0
"""The middles of two lungs lie at least so far apart from side to side."""
SMALLER_LUNG = 0.1
"""The smaller lung has at least this share of the larger one's volume."""
CLOSING_MM = 10.0
BONE_HU = 250.0


def lung_candidates(hu: NDArray[np.float32], air: Mask, spacing_mm: Triple) -> Mask:
    """The parts of `air` that are large enough for a lung and no gas of the bowel."""
    labels, count = ndimage.label(air)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    empty = np.bincount(labels[hu < GAS_HU], minlength=count + 1)
    sizes_mm3 = sizes * float(np.prod(spacing_mm))
    keep = (sizes_mm3 >= GAS_MM3) | ((sizes_mm3 >= MIN_LUNG_MM3) & (empty < GAS_SHARE * sizes))
    keep[0] = False
    return keep[labels]


def split_lungs(hu: NDArray[np.float32], candidates: Mask, spacing_mm: Triple) -> tuple[Mask, Mask]:
    """The air of the (left, right) lung, the axes running to head, back and patient's left.

    Args:
        hu: HU on a grid of about 2 mm.
        candidates: what may be lung, outside the airway.
        spacing_mm: voxel size.

    Returns:
        Two disjoint masks, either or both empty where there is no such lung.
    """
    none = np.zeros_like(candidates)
    cores = _find_cores(candidates, spacing_mm)
    if not cores:
        return none, none
    owner = _flood(hu, candidates, cores)
    parts = [owner == number for number in range(1, len(cores) + 1)]
    if len(parts) == 2:
        right, left = sorted(parts, key=_middle_x)
        return left, right
    # A lone lung, or the one that the field of view kept: the spine tells the side.
    (lung,) = parts
    bone = hu > BONE_HU
    middle = _middle_x(bone) if bone.any() else (lung.shape[2] - 1) / 2
    return (lung, none) if _middle_x(lung) > middle else (none, lung)


def close_lung(hu: NDArray[np.float32], lung: Mask, free: Mask, spacing_mm: Triple) -> Mask:
    """The lung with its vessels and with nodules that lean on the pleura.

    Notches and holes narrower than a ball of `CLOSING_MM` radius are filled, larger holes only
    where lung surrounds them on all sides. Bone at the edge stays out.

    Args:
        hu: HU on the same grid.
        lung: the air of one lung.
        free: voxels that the closed lung may take.
        spacing_mm: voxel size.
    """
    if not lung.any():
        return lung
    margin_z, margin_y, margin_x = (int(CLOSING_MM / spacing) + 2 for spacing in spacing_mm)
    box = bounding_box(lung, (margin_z, margin_y, margin_x))
    closed = close_mask(lung[box], CLOSING_MM, spacing_mm)
    closed = fill_holes(closed)
    # Ribs dent the outline, vessels full of contrast lie within it.
    closed &= fill_holes(closed & (hu[box] < BONE_HU), IN_PLANE)
    result = lung.copy()
    result[box] |= closed & free[box]
    return result


def _find_cores(candidates: Mask, spacing_mm: Triple) -> list[Mask]:
    """One connected part of each lung, the lungs eroded only as far as it takes to part them."""
    # With a margin the nearest voxel outside lies in the box as well.
    box = bounding_box(candidates, (1, 1, 1))
    cores = []
    for part in _part_lungs(candidates[box], spacing_mm) if candidates.any() else []:
        cores.append(np.zeros_like(candidates))
        cores[-1][box] = part
    return cores


def _part_lungs(candidates: Mask, spacing_mm: Triple) -> list[Mask]:
    voxel_mm3 = float(np.prod(spacing_mm))
    whole: list[Mask] = []
    inner = candidates
    depth_mm: NDArray[np.float64] | None = None  # most lungs lie apart as they are
    for radius_mm in (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 13.0, 16.0):
        if radius_mm > 0:
            depth_mm = depth(candidates, spacing_mm) if depth_mm is None else depth_mm
            inner = depth_mm > radius_mm
        labels, count = ndimage.label(inner)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        sizes[0] = 0
        order = np.argsort(sizes)[::-1]
        first = labels == order[0]
        if radius_mm == 0:
            if sizes[order[0]] * voxel_mm3 < MIN_LUNG_MM3:
                return []
            whole = [first]
        least = SMALLER_LUNG * sizes[order[0]]
        for label in order[1:4]:
            other = labels == label
            if sizes[label] < least or sizes[label] == 0:
                break
            if abs(_middle_x(first) - _middle_x(other)) * spacing_mm[2] >= APART_MM:
                return [first, other]
    return whole


def _flood(hu: NDArray[np.float32], candidates: Mask, cores: list[Mask]) -> NDArray[np.int32]:
    """Gives each voxel connected to a core the number of that core (from 1).

    Where lungs touch, the floods meet on the brighter line of the pleura between them.
    """
    markers = np.zeros(candidates.shape, np.int32)
    for number, core in enumerate(cores, start=1):
        markers[core] = number
    rest, count = ndimage.label(candidates)
    of_cores = np.zeros(count + 1, np.bool_)
    of_cores[np.unique(rest[markers > 0])] = True
    connected = of_cores[rest]
    if np.array_equal(connected, markers > 0):
        return markers
    from skimage.segmentation import watershed  # half a second to import, seldom needed

    return watershed(hu, markers, mask=connected)


def _middle_x(mask: Mask) -> float:
    columns = mask.sum(axis=(0, 1))
    return float(columns @ np.arange(len(columns)) / columns.sum())
