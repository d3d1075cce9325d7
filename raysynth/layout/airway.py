"""Finds the trachea and the main bronchi: a tube of air followed from the neck downwards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.layout.morphology import IN_PLANE, Mask
from raysynth.volume import Triple

LUMEN_HU = -900.0
"""Air in the trachea is near -1000; lung tissue seldom stays below this over a whole plane."""
TRACHEA_MM2 = (50.0, 800.0)
"""Cross-sections that may be a trachea."""
BRONCHUS_MM2 = 20.0
"""A smaller cross-section ends a branch."""
MAX_OFF_CENTRE_MM = 45.0
MAX_ELONGATION = 3.0
WALL_MM = 5.0
WALL_HU = -500.0
"""Most of what lies within WALL_MM of a trachea is denser; around dark lung it is not."""
MIN_LENGTH_MM = 25.0
BELOW_CARINA_MM = 35.0
"""The main bronchi end about here; farther down the tubes belong to the lungs."""


def find_airway(hu: NDArray[np.float32], spacing_mm: Triple, body: Mask, lowest_top: int) -> Mask:
    """The lumen of trachea and main bronchi.

    Args:
        hu: planes from feet to head, (z, y, x), voxels of 1-2 mm in the plane.
        spacing_mm: voxel size.
        body: what counts as patient, filled, on the same grid.
        lowest_top: the tube starts in this plane or above it.

    Returns:
        A mask on the same grid; empty where no tube of air runs down the middle of the body.
    """
    planes, count = ndimage.label((hu < LUMEN_HU) & body, structure=IN_PLANE)
    areas_mm2 = np.bincount(planes.ravel(), minlength=count + 1) * (spacing_mm[1] * spacing_mm[2])
    areas_mm2[0] = 0
    middle = _middle_of(body)
    best: list[tuple[int, list[int]]] = []
    seen: set[int] = set()
    for z in range(len(hu) - 1, lowest_top - 1, -1):
        for label in _trachea_like(hu[z], planes[z], areas_mm2, spacing_mm, middle):
            if label not in seen:
                track = _follow_down(planes, areas_mm2, spacing_mm, z, label)
                seen.update(number for _, numbers in track for number in numbers)
                best = max(best, track, key=len)
    lumen = np.zeros(hu.shape, np.bool_)
    if len(best) * spacing_mm[0] >= MIN_LENGTH_MM:
        for z, labels in best:
            lumen[z] = np.isin(planes[z], labels)
    return lumen


def _middle_of(body: Mask) -> float:
    """Middle column of the body; the median keeps one arm from shifting it."""
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    return float(np.median(columns)) if len(columns) else body.shape[2] / 2


def _trachea_like(
    hu: NDArray[np.float32],
    plane: NDArray[np.int32],
    areas_mm2: NDArray[np.floating],
    spacing_mm: Triple,
    middle: float,
) -> list[int]:
    """Labels of one plane whose size, shape, place and surroundings could be a trachea's."""
    wall = max(1, round(WALL_MM / spacing_mm[1]))
    present = np.unique(plane)
    found = []
    for label in present[present > 0]:
        if not TRACHEA_MM2[0] <= areas_mm2[label] <= TRACHEA_MM2[1]:
            continue
        y, x = np.nonzero(plane == label)
        sides_mm = (np.ptp(y) + 1) * spacing_mm[1], (np.ptp(x) + 1) * spacing_mm[2]
        central = abs(x.mean() - middle) * spacing_mm[2] <= MAX_OFF_CENTRE_MM
        if not central or max(sides_mm) > MAX_ELONGATION * min(sides_mm):
            continue
        lumen = plane == label
        around = ndimage.binary_dilation(lumen, iterations=wall) & ~lumen
        if np.median(hu[around]) > WALL_HU:
            found.append(int(label))
    return found


def _follow_down(
    planes: NDArray[np.int32],
    areas_mm2: NDArray[np.floating],
    spacing_mm: Triple,
    top: int,
    label: int,
) -> list[tuple[int, list[int]]]:
    """Plane by plane, the cross-sections that continue the tube: [(plane, labels), ...]."""
    track = [(top, [label])]
    reach = max(1, round(2.0 / spacing_mm[1]))
    carina: int | None = None
    for z in range(top - 1, -1, -1):
        above = np.isin(planes[z + 1], track[-1][1])
        area_above = float(areas_mm2[track[-1][1]].sum())
        touched = np.unique(planes[z][ndimage.binary_dilation(above, iterations=reach)])
        # A cross-section that jumps in size has broken through into the lung.
        limit = min(TRACHEA_MM2[1], 1.8 * area_above + 40.0)
        labels = [
            int(found) for found in touched if found and BRONCHUS_MM2 <= areas_mm2[found] <= limit
        ]
        if not labels:
            break
        track.append((z, labels))
        if carina is None and len(labels) > 1:
            carina = z
        if carina is not None and (carina - z) * spacing_mm[0] >= BELOW_CARINA_MM:
            break
    return track
