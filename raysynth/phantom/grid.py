"""The voxels of a phantom and the two ways shapes get onto them: smooth fields and tubes.

Large organs are smooth, so their implicit functions are evaluated in float64 on nodes 5 mm apart
and refined to voxels by cubic interpolation. That is cheap, and it keeps most transcendental
functions, whose last digits depend on the machine, off the voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.volume import Triple

Field = NDArray[np.float32]
"""Values on voxels."""
Nodes = NDArray[np.float64]
"""Values on the coarse nodes."""
Box = tuple[slice, slice, slice]

NODE_MM = 5.0
WHOLE: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Tubes:
    """Straight tapering pieces of tube.

    Attributes:
        ends_mm: the two ends (z, y, x) of every piece, shape (n, 2, 3).
        radii_mm: radius at either end, shape (n, 2).
    """

    ends_mm: NDArray[np.float64]
    radii_mm: NDArray[np.float64]

    def widened(self, factor: float, by_mm: float = 0.0) -> Tubes:
        """The same course with other radii: `factor * r + by_mm`."""
        return Tubes(self.ends_mm, self.radii_mm * factor + by_mm)

    def __add__(self, other: Tubes) -> Tubes:
        return Tubes(
            np.concatenate([self.ends_mm, other.ends_mm]),
            np.concatenate([self.radii_mm, other.radii_mm]),
        )


def polyline(points: NDArray[np.float64], radii: NDArray[np.float64]) -> Tubes:
    """A tube through points (n, 3), rounded by a cubic spline, with a radius at each."""
    knots = np.arange(len(points))
    steps = np.linspace(0, len(points) - 1, 4 * (len(points) - 1) + 1)
    if len(points) > 2:
        fine = np.stack(
            [ndimage.map_coordinates(c, [steps], order=3, mode="mirror") for c in points.T], axis=1
        )
    else:
        fine = np.stack([np.interp(steps, knots, c) for c in points.T], axis=1)
    radius = np.interp(steps, knots, radii)
    return Tubes(
        np.stack([fine[:-1], fine[1:]], axis=1), np.stack([radius[:-1], radius[1:]], axis=1)
    )


class Grid:
    """Voxel centres in patient millimetres: x to the left, y to the back, z to the head.

    The middle of x and y is 0, and z counts from the lung apex (so most of it is negative).

    Args:
        spacing_mm: voxel size (z, y, x).
        bottom_mm: z of the lower face of the volume.
        extent_mm: size of the volume (z, y, x).
    """

    def __init__(self, spacing_mm: Triple, bottom_mm: float, extent_mm: Triple) -> None:
        self.spacing_mm = spacing_mm
        lower = (bottom_mm, -extent_mm[1] / 2, -extent_mm[2] / 2)
        counts = [max(1, round(e / s)) for e, s in zip(extent_mm, spacing_mm, strict=True)]
        self.axes = [
            low + (np.arange(n) + 0.5) * s
            for low, n, s in zip(lower, counts, spacing_mm, strict=True)
        ]
        self.shape = (counts[0], counts[1], counts[2])
        self.blur_mm = float(np.prod(spacing_mm)) ** (1 / 3)
        node_axes = [
            axis[0] + NODE_MM * (np.arange(np.ceil((axis[-1] - axis[0]) / NODE_MM) + 4) - 1)
            for axis in self.axes
        ]
        self.nodes = tuple(np.meshgrid(*node_axes, indexing="ij"))  # z, y, x in mm
        self._node_origin = np.array([axis[0] for axis in node_axes])
        self._taps = [
            _cubic_taps((axis - nodes[0]) / NODE_MM)
            for axis, nodes in zip(self.axes, node_axes, strict=True)
        ]

    def open_mesh(self, box: Box = WHOLE) -> tuple[Field, Field, Field]:
        """Coordinates z (n,1,1), y (1,n,1), x (1,1,n) in mm."""
        z, y, x = np.ix_(*(axis[part] for axis, part in zip(self.axes, box, strict=True)))
        return z.astype(np.float32), y.astype(np.float32), x.astype(np.float32)

    def box(self, low_mm: NDArray[np.float64], high_mm: NDArray[np.float64]) -> Box:
        """The voxels whose centres lie between two corners (z, y, x)."""
        z, y, x = (
            slice(int(np.searchsorted(axis, low)), int(np.searchsorted(axis, high, side="right")))
            for axis, low, high in zip(self.axes, low_mm, high_mm, strict=True)
        )
        return z, y, x

    def refine(self, field: Nodes, box: Box = WHOLE) -> Field:
        """Values on the voxels of `box` from values on the nodes (Catmull-Rom, 4 taps an axis)."""
        out = field.astype(np.float32)
        for axis in (2, 1, 0):  # the longest arrays last
            first, weights = self._taps[axis]
            first, weights = first[box[axis]], weights[:, box[axis]]
            shape = [1, 1, 1]
            shape[axis] = -1
            total = np.take(out, first, axis=axis) * weights[0].reshape(shape)
            for k in (1, 2, 3):
                part = np.take(out, first + k, axis=axis)
                part *= weights[k].reshape(shape)
                total += part
            out = total
        return out

    def at(self, field: Nodes, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Linear interpolation of a node field at points (n, 3)."""
        position = (points_mm - self._node_origin).T / NODE_MM
        return ndimage.map_coordinates(field, position, order=1, mode="nearest")

    def smooth_noise(self, rng: np.random.Generator, wavelength_mm: float) -> Nodes:
        """A smooth random field on the nodes, mean about 0 and deviation about 1."""
        shape = self.nodes[0].shape
        knots = [max(4, int(n * NODE_MM / wavelength_mm) + 2) for n in shape]
        lattice = rng.standard_normal(knots)
        at = [np.linspace(0.5, k - 1.5, n) for k, n in zip(knots, shape, strict=True)]
        for axis, place in enumerate(at):  # separable, so one axis at a time
            basis = ndimage.spline_filter1d(np.eye(knots[axis]), axis=0)
            rows = np.stack(
                [
                    ndimage.map_coordinates(column, [place], order=3, prefilter=False)
                    for column in basis.T
                ],
                axis=1,
            )
            lattice = np.moveaxis(np.tensordot(rows, lattice, axes=(1, axis)), 0, axis)
        return lattice * 1.35


def signed_distance(function: Nodes) -> Nodes:
    """An implicit function (negative inside) scaled to millimetres near its zero: f / |grad f|."""
    gradient = np.gradient(function, NODE_MM)
    slope = np.sqrt(sum(g * g for g in gradient))
    return function / np.maximum(slope, 0.15 * float(np.median(slope)) + 1e-9)


def smooth_min(a: Nodes, b: Nodes, reach_mm: float) -> Nodes:
    """Union of two shapes with a fillet of about `reach_mm`."""
    overlap = np.maximum(reach_mm - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap / (4 * reach_mm)


def ellipsoid(nodes: tuple[Nodes, ...], centre: Triple, semi_axes: Triple) -> Nodes:
    """Signed distance (mm, good near the surface) to an axis-parallel ellipsoid, all (z, y, x)."""
    square = sum(((n - c) / a) ** 2 for n, c, a in zip(nodes, centre, semi_axes, strict=True))
    return signed_distance(np.sqrt(square) - 1)


def edge(distance_mm: Field, blur_mm: float) -> Field:
    """Share of a voxel inside a surface at signed distance d: a linear ramp `blur_mm` wide."""
    return np.clip(0.5 - distance_mm / np.float32(blur_mm), 0, 1)


def blend(hu: Field, share: Field, value: Field | float) -> None:
    """Puts tissue of `value` HU over `hu`, in place, where `share` (0-1) of the voxel is it."""
    change = value - hu
    change *= share
    hu += change


def pieces(grid: Grid, tubes: Tubes, reach_mm: float) -> Iterator[tuple[Box, Field, Field]]:
    """For every piece: the voxels within `reach_mm`, their distance to its axis, and its radius."""
    for (start, end), (radius_0, radius_1) in zip(tubes.ends_mm, tubes.radii_mm, strict=True):
        margin = max(radius_0, radius_1) + reach_mm
        box = grid.box(np.minimum(start, end) - margin, np.maximum(start, end) + margin)
        if any(part.start >= part.stop for part in box):
            continue
        z, y, x = grid.open_mesh(box)
        dz, dy, dx = z - np.float32(start[0]), y - np.float32(start[1]), x - np.float32(start[2])
        az, ay, ax = (np.float32(v) for v in end - start)
        along = (dz * az + dy * ay + dx * ax) / max(az * az + ay * ay + ax * ax, np.float32(1e-6))
        along = np.clip(along, 0, 1)
        square = (dz - along * az) ** 2 + (dy - along * ay) ** 2 + (dx - along * ax) ** 2
        radius = np.float32(radius_0) + np.float32(radius_1 - radius_0) * along
        yield box, np.sqrt(square), radius


def tube_distance(grid: Grid, tubes: Tubes, reach_mm: float = 8.0) -> Field:
    """Signed distance to the surface of the nearest tube; beyond `reach_mm` it is `reach_mm`."""
    distance = np.full(grid.shape, reach_mm, np.float32)
    for box, axis_mm, radius in pieces(grid, tubes, reach_mm):
        np.minimum(distance[box], axis_mm - radius, out=distance[box])
    return distance


def tube_share(grid: Grid, tubes: Tubes) -> Field:
    """Share of every voxel filled by tubes, true in sum for tubes thinner than a voxel.

    A ramp as wide as a voxel over-counts thin tubes; its integral over the cross-section,
    pi (r^2 + w^2/12), is scaled to pi r^2.
    """
    share = np.zeros(grid.shape, np.float32)
    width = np.float32(grid.blur_mm)
    for box, axis_mm, radius in pieces(grid, tubes, grid.blur_mm):
        square = radius * radius
        part = np.clip(0.5 + (radius - axis_mm) / width, 0, 1)
        part *= square / (square + width * width / 12)
        np.maximum(share[box], part, out=share[box])
    return share


def _cubic_taps(position: NDArray[np.float64]) -> tuple[NDArray[np.intp], Field]:
    """First node and the four Catmull-Rom weights (4, n) of positions in node units."""
    base = np.floor(position).astype(np.intp)
    t = position - base
    weights = 0.5 * np.stack(
        [
            -t + 2 * t**2 - t**3,
            2 - 5 * t**2 + 3 * t**3,
            t + 4 * t**2 - 3 * t**3,
            -(t**2) + t**3,
        ]
    )
    return base - 1, weights.astype(np.float32)
