"""Shapes in millimetres: masks grown, shrunk, opened and closed, grids made coarser and finer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.volume import Triple

Mask = NDArray[np.bool_]
IN_PLANE = ndimage.generate_binary_structure(3, 1) & (np.arange(3) == 1)[:, None, None]
"""Neighbours within one axial plane only."""
Value = TypeVar("Value", bound=np.generic)


def grow(mask: Mask, radius_mm: float, spacing_mm: Triple) -> Mask:
    """Every voxel within `radius_mm` of the mask (a ball, however the voxels are shaped).

    A ball of a few voxels is soon put together from shifted rows: SciPy's distances, which give the
    same, take ten times as long.
    """
    z, y, x = (np.arange(int(radius_mm / mm) + 2) for mm in spacing_mm)
    along_z, along_y, along_x = (
        np.square(steps * mm) for steps, mm in zip((z, y, x), spacing_mm, strict=True)
    )
    inside = np.sqrt(along_z[:, None, None] + along_y[:, None] + along_x) <= radius_mm
    lengths = inside.sum(axis=2)  # of the half row at each place off the centre, with its middle
    rows, grown = mask.copy(), np.zeros_like(mask)
    for length in range(1, int(lengths.max()) + 1):
        if length > 1:
            _or_shifted(rows, mask, (0, 0, length - 1))
        for step_z, step_y in np.argwhere(lengths == length).tolist():
            _or_shifted(grown, rows, (step_z, step_y, 0))
    return grown


def _or_shifted(target: Mask, source: Mask, steps: tuple[int, int, int]) -> None:
    """Adds the source to the target, shifted by so many voxels to either side along each axis."""
    for signs in set(itertools.product(*((-step, step) for step in steps))):
        to, from_ = (
            tuple(
                slice(max(0, sign * step), max(0, size + min(0, sign * step)))
                for step, size in zip(signs, source.shape, strict=True)
            )
            for sign in (1, -1)
        )
        target[to] |= source[from_]


def depth(mask: Mask, spacing_mm: Triple) -> NDArray[np.float64]:
    """Distance in mm of every voxel to the nearest one outside the mask, which must not fill all.

    SciPy finds that voxel. Its own distances, equal to these, take several copies of the grid.
    """
    nearest = ndimage.distance_transform_edt(
        mask, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    _, y, x = np.ogrid[tuple(slice(size) for size in mask.shape)]
    result = np.empty(mask.shape)
    for z, (to_z, to_y, to_x) in enumerate(nearest.swapaxes(0, 1)):
        steps = (to_z - z, to_y - y[0], to_x - x[0])
        along_z, along_y, along_x = (
            np.square(step * mm) for step, mm in zip(steps, spacing_mm, strict=True)
        )
        result[z] = np.sqrt(along_z + along_y + along_x)
    return result


def shrink(mask: Mask, radius_mm: float, spacing_mm: Triple) -> Mask:
    """Every voxel farther than `radius_mm` from the outside; beyond the grid counts as inside."""
    return ~grow(~mask, radius_mm, spacing_mm)


def dilate(mask: Mask, axes: Sequence[int] = (0, 1, 2)) -> Mask:
    """The mask and its neighbours along some axes.

    Shifted copies do in a tenth of the time what SciPy does voxel by voxel.
    """
    out = mask.copy()
    for axis in axes:
        from_, to = np.moveaxis(mask, axis, 0), np.moveaxis(out, axis, 0)
        to[1:] |= from_[:-1]
        to[:-1] |= from_[1:]
    return out


def erode(mask: Mask, axes: Sequence[int] = (0, 1, 2)) -> Mask:
    """Voxels whose neighbours along some axes all belong too; beyond the grid counts as inside."""
    return ~dilate(~mask, axes)


def open_planes(mask: Mask, radius_mm: float, spacing_mm: Triple) -> Mask:
    """The mask without what is thinner than about `2 * radius_mm` in its axial plane."""
    steps = max(1, round(radius_mm / min(spacing_mm[1:])))
    for _ in range(steps):
        mask = erode(mask, (1, 2))
        # Beyond the grid counts as outside here.
        mask[:, [0, -1]] = mask[:, :, [0, -1]] = False
    for _ in range(steps):
        mask = dilate(mask, (1, 2))
    return mask


def close_mask(mask: Mask, radius_mm: float, spacing_mm: Triple) -> Mask:
    """The mask with every notch filled that a ball of `radius_mm` cannot enter from outside."""
    return shrink(grow(mask, radius_mm, spacing_mm), radius_mm, spacing_mm)


def largest_component(mask: Mask) -> Mask:
    """The connected part (6 neighbours) with the most voxels; empty stays empty."""
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def fill_holes(mask: Mask, structure: Mask | None = None) -> Mask:
    """The mask and all that it encloses: what nothing connects with the sides of the grid.

    Args:
        mask: of a volume.
        structure: which neighbours connect; `IN_PLANE` asks plane by plane. None: all six.
    """
    labels, count = ndimage.label(~mask, structure)
    outside = np.zeros(count + 1, np.bool_)
    for axis in (0, 1, 2) if structure is None else (1, 2):
        outside[np.unique(labels.take([0, -1], axis))] = True
    outside[0] = False
    return ~outside[labels]


def bounding_box(mask: Mask, margin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    """Smallest box around the mask's true voxels, widened by `margin` voxels within the grid."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return (slice(0, 0),) * mask.ndim
    margins = margin or (0,) * mask.ndim
    return tuple(
        slice(max(0, box.start - extra), min(size, box.stop + extra))
        for box, extra, size in zip(found[0], margins, mask.shape, strict=True)
    )


def coarsening(spacing_mm: Triple, target_mm: float) -> tuple[int, int, int]:
    """How many voxels along each axis make up about `target_mm`, at least one."""
    z, y, x = (max(1, round(target_mm / spacing)) for spacing in spacing_mm)
    return z, y, x


def block_mean(values: NDArray[Any], factors: tuple[int, int, int]) -> NDArray[np.float32]:
    """Mean of blocks of `factors` voxels; the last block of an axis repeats the edge."""
    fz, fy, fx = factors
    pad_y, pad_x = -values.shape[1] % fy, -values.shape[2] % fx
    means = []
    for start in range(0, len(values), fz):  # a float copy of the whole scan would be 150 MB
        planes = _mean([plane.astype(np.float32) for plane in values[start : start + fz]])
        if pad_y or pad_x:
            planes = np.pad(planes, ((0, pad_y), (0, pad_x)), mode="edge")
        rows = _mean([planes[offset::fy] for offset in range(fy)])
        means.append(_mean([rows[:, offset::fx] for offset in range(fx)]))
    return np.stack(means)


def _mean(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Of a few arrays, without a copy of them all."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    total /= np.float32(len(parts))
    return total


def refine(
    blocks: NDArray[Value], factors: tuple[int, int, int], shape: tuple[int, int, int]
) -> NDArray[Value]:
    """Gives every voxel of a grid of `shape` its block's value, the reverse of `block_mean`."""
    fine = blocks
    for axis in (2, 1, 0):  # repeating whole rows and planes is the cheaper part
        fine = np.repeat(fine, factors[axis], axis=axis) if factors[axis] > 1 else fine
        fine = fine[(slice(None),) * axis + (slice(0, shape[axis]),)]
    return fine
