"""Brings volumes and layouts to another voxel size, with their geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from raysynth.volume import Triple, Volume

Weights: TypeAlias = sparse.csr_array
"""One row per new position, one column per old voxel; rows sum to 1, or to 0 outside the grid."""


def resample(volume: Volume, spacing_mm: Triple) -> Volume:
    """The volume on voxels of another size: interpolated, and smoothed where they become larger.

    The new voxel centres lie within the old ones (nothing is extrapolated), centred on the same
    middle; a linear ramp comes out exactly, except within a filter's width of a smoothed edge.

    Args:
        volume: any volume; an oblique one is resampled along its own axes.
        spacing_mm: wanted voxel size, (z, y, x).
    """
    grids = _grids(volume.shape, volume.spacing_mm, spacing_mm)
    along_z, along_y, along_x = (
        linear_weights(*axis)
        for axis in zip(volume.shape, volume.spacing_mm, grids, spacing_mm, strict=True)
    )
    planes = PlaneBlender(volume.hu, along_y, along_x)
    hu = np.empty((len(grids[0]), len(grids[1]), len(grids[2])), np.int16)
    for z in range(len(hu)):
        hu[z] = np.rint(planes.blend(*taps(along_z, z)))
    first = [grid[0] / old for grid, old in zip(grids, volume.spacing_mm, strict=True)]
    z0, y0, x0 = volume.position_mm((first[0], first[1], first[2]))
    return Volume(hu, spacing_mm, (float(z0), float(y0), float(x0)), volume.direction)


def resample_labels(
    layout: NDArray[np.uint8], old_spacing_mm: Triple, spacing_mm: Triple
) -> NDArray[np.uint8]:
    """The layout on the grid that `resample` gives its volume.

    Along an axis on which voxels become smaller each takes its nearest label; on which they become
    larger, the label that covers most of it.
    """
    grids = _grids(layout.shape, old_spacing_mm, spacing_mm)
    along_z, along_y, along_x = (
        label_weights(*axis)
        for axis in zip(layout.shape, old_spacing_mm, grids, spacing_mm, strict=True)
    )
    result = np.empty((len(grids[0]), len(grids[1]), len(grids[2])), np.uint8)
    for z in range(len(result)):
        indices, weights = taps(along_z, z)
        if z and len(indices) == 1 and np.array_equal(indices, taps(along_z, z - 1)[0]):
            result[z] = result[z - 1]  # the same old plane again
        else:
            result[z] = majority(layout[indices], weights, along_y, along_x)
    return result


def grid_positions(size: int, spacing_mm: float, new_spacing_mm: float) -> NDArray[np.floating]:
    """Centres of voxels of another size along one axis, in mm from the centre of old voxel 0.

    As many as fit between the first and the last old centre, with the rest shared by both ends.
    """
    span_mm = (size - 1) * spacing_mm
    count = math.floor(span_mm / new_spacing_mm + 1e-6) + 1
    first_mm = (span_mm - (count - 1) * new_spacing_mm) / 2
    return first_mm + new_spacing_mm * np.arange(count)


def linear_weights(
    size: int, spacing_mm: float, positions_mm: NDArray[np.floating], new_spacing_mm: float
) -> Weights:
    """Weights of old voxels for values at new positions.

    Linear interpolation, averaged over a box of sqrt(s^2 - 1) old voxels where voxels grow by s:
    no blur at s = 1, the new voxel's own extent at large s, and linear functions stay exact.

    Args:
        size: old voxels along the axis.
        spacing_mm: their spacing.
        positions_mm: from the centre of old voxel 0. Beyond the outer face of the first and last
            voxel a row stays empty.
        new_spacing_mm: how far apart positions lie on the new grid.
    """
    centres = positions_mm / spacing_mm
    width = math.sqrt(max((new_spacing_mm / spacing_mm) ** 2 - 1.0, 0.0))
    reach = math.ceil(width / 2) + 1
    nearest = np.floor(centres).astype(np.int64)
    columns = nearest[:, None] + np.arange(-reach, reach + 2)
    distance = centres[:, None] - columns
    if width < 1e-3:
        weights = np.maximum(0.0, 1.0 - np.abs(distance))
    else:
        upper, lower = _hat_integral(distance + width / 2), _hat_integral(distance - width / 2)
        weights = (upper - lower) / width
    return _assemble(size, centres, columns, weights)


def label_weights(
    size: int, spacing_mm: float, positions_mm: NDArray[np.floating], new_spacing_mm: float
) -> Weights:
    """As `linear_weights`, for labels: all weight on the nearest voxel unless voxels grow."""
    if new_spacing_mm > spacing_mm * (1 + 1e-6):
        return linear_weights(size, spacing_mm, positions_mm, new_spacing_mm)
    centres = positions_mm / spacing_mm
    # Half-way positions go to the upper voxel whatever the rounding error of their division.
    nearest = np.floor(centres + 0.5 + 1e-9).astype(np.int64)
    return _assemble(size, centres, nearest[:, None], np.ones((len(centres), 1)))


def taps(weights: Weights, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Old voxels that count for one new position, ascending, and their weights."""
    entries = slice(weights.indptr[row], weights.indptr[row + 1])
    return weights.indices[entries], weights.data[entries]


class PlaneBlender:
    """Weighted sums of planes of a volume, each plane resampled within itself only once.

    Ask for ascending planes: those below the lowest one asked for are forgotten, so memory stays
    at a few planes.

    Args:
        array: (z, y, x).
        along_y: weights of rows.
        along_x: weights of columns.
    """

    def __init__(self, array: NDArray[np.int16], along_y: Weights, along_x: Weights) -> None:
        self._array = array
        self._along_y = along_y
        self._along_x = along_x
        self._planes: dict[int, NDArray[np.float32]] = {}

    def blend(
        self, indices: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Sum of the planes at `indices` (ascending), resampled and weighted."""
        self._planes = {z: plane for z, plane in self._planes.items() if z >= indices[0]}
        total = np.zeros((self._along_y.shape[0], self._along_x.shape[0]), np.float32)
        for index, weight in zip(indices.tolist(), weights, strict=True):
            if index not in self._planes:
                plane = self._array[index].astype(np.float32)
                self._planes[index] = resample_plane(plane, self._along_y, self._along_x)
            total += weight * self._planes[index]
        return total


def resample_plane(
    plane: NDArray[np.float32], along_y: Weights, along_x: Weights
) -> NDArray[np.float32]:
    """One plane at new rows and columns; 0 where either lies outside."""
    rows = along_y @ plane
    return np.ascontiguousarray((along_x @ np.ascontiguousarray(rows.T)).T)


def majority(
    planes: NDArray[np.uint8],
    weights: Sequence[float] | NDArray[np.float32],
    along_y: Weights,
    along_x: Weights,
) -> NDArray[np.uint8]:
    """The label that covers most of each new pixel; 0 outside.

    Args:
        planes: labels of the old planes that count, (n, y, x).
        weights: how much each of them counts.
        along_y: weights of rows.
        along_x: weights of columns.
    """
    labels = np.zeros((along_y.shape[0], along_x.shape[0]), np.uint8)
    most = np.zeros(labels.shape, np.float32)
    for label in np.flatnonzero(np.bincount(planes.ravel())):
        here = np.tensordot(np.asarray(weights, np.float32), planes == label, axes=1)
        cover = resample_plane(here.astype(np.float32), along_y, along_x)
        more = cover > most
        labels[more] = label
        most[more] = cover[more]
    return labels


def _grids(
    shape: tuple[int, ...], old_spacing_mm: Triple, spacing_mm: Triple
) -> list[NDArray[np.floating]]:
    return [grid_positions(*axis) for axis in zip(shape, old_spacing_mm, spacing_mm, strict=True)]


def _hat_integral(t: NDArray[np.floating]) -> NDArray[np.floating]:
    """Integral from minus infinity to t of the hat function max(0, 1 - |t|)."""
    inner = np.clip(t, -1.0, 1.0)
    return np.asarray(0.5 + inner - 0.5 * inner * np.abs(inner))


def _assemble(
    size: int,
    centres: NDArray[np.floating],
    columns: NDArray[np.int64],
    weights: NDArray[np.floating],
) -> Weights:
    """A sparse matrix of the weights; what falls off the ends counts for the outermost voxel."""
    inside = (centres >= -0.5 - 1e-9) & (centres <= size - 0.5 + 1e-9)
    weights = np.where(inside[:, None], weights, 0.0)
    rows = np.broadcast_to(np.arange(len(centres))[:, None], columns.shape)
    kept = weights > 1e-9
    matrix = sparse.coo_array(
        (weights[kept].astype(np.float32), (rows[kept], np.clip(columns, 0, size - 1)[kept])),
        shape=(len(centres), size),
    ).tocsr()
    matrix.sum_duplicates()
    return matrix
