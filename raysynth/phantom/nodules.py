"""Real LIDC nodules in phantom lungs: shape and place from the contours, looks from the ratings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import ATTRIBUTES, LUNG_LABELS, MAX_READERS, Label, Nodule, Split
from raysynth.config.data import PhantomSource, SplitConfig
from raysynth.errors import InputError
from raysynth.formats.lidc import LidcRecord, nodule_records
from raysynth.phantom.anatomy import Anatomy
from raysynth.phantom.grid import Box, Field, Grid, Tubes, blend, edge, pieces
from raysynth.seeding import SPLIT_SALT, unit_interval
from raysynth.store.splits import split_at

_MIN_READERS = 3
_MARGIN_MM = 16.0
_ATTEMPTS = 24
_GAP = 2  # voxels between two nodules, and between a nodule and the volume's edge
# Where in the scan (relative_zyx) the lungs usually begin and end: a little outside of where 98 %
# of the database's nodules lie.
_LUNGS_IN_SCAN = ((0.12, 0.93), (0.22, 0.85), (0.10, 0.91))


@dataclass(frozen=True)
class Looks:
    """What the readers' mean scores say about the voxels (scores as in `ATTRIBUTES`).

    Attributes:
        shell_hu: the outer part; about -600 for ground glass, 30 for a solid nodule.
        core_hu: the inner part.
        core_from: share of the greatest depth at which the core begins.
        edge_mm: width of the ramp between nodule and lung.
        rough_mm: how far the visible edge strays from the contour.
        num_strands: strands radiating from a spiculated nodule.
        calcification: most frequent score; 6 = absent.
        internal_structure: most frequent score; 1 = soft tissue.
    """

    shell_hu: float
    core_hu: float
    core_from: float
    edge_mm: float
    rough_mm: float
    num_strands: int
    calcification: int
    internal_structure: int


def looks_of(ratings: tuple[tuple[int, ...], ...], radius_mm: float) -> Looks:
    """How a nodule of these ratings (readers x nine scores, 0 = not rated) is drawn."""
    scores = np.array(ratings, float)
    scores[scores == 0] = np.nan
    mean = dict(zip(ATTRIBUTES, np.nanmean(scores, axis=0), strict=True))
    texture, margin = mean["texture"], mean["margin"]
    scale = [1, 2, 3, 4, 5]
    return Looks(
        shell_hu=float(np.interp(texture, scale, [-600, -570, -520, -200, 30])),
        core_hu=float(np.interp(texture, scale, [-570, -420, -40, 20, 35])),
        core_from=float(np.interp(texture, scale, [0.6, 0.5, 0.4, 0.2, 0.0])),
        edge_mm=float(np.interp(margin, scale, [min(7, 1.3 * radius_mm), 4.0, 2.4, 1.2, 0.5])),
        rough_mm=float(np.interp(margin, scale, [1.2, 0.9, 0.5, 0.2, 0.0])),
        num_strands=round(float(np.interp(mean["spiculation"], [1, 2, 3, 5], [0, 8, 20, 40]))),
        calcification=_most_frequent(scores[:, ATTRIBUTES.index("calcification")], 6),
        internal_structure=_most_frequent(scores[:, ATTRIBUTES.index("internal_structure")], 1),
    )


def add_nodules(
    anatomy: Anatomy, grid: Grid, source: PhantomSource, split: Split, rng: np.random.Generator
) -> tuple[Nodule, ...]:
    """Draws nodules, finds each a place inside the lungs and puts it there, in `hu` and layout.

    Args:
        anatomy: the patient, changed in place.
        grid: the voxels' geometry.
        source: how many nodules, and how large.
        split: of the patient; no real nodule is lent to patients of two splits.
        rng: randomness.

    Returns:
        What was placed. Fewer than drawn only where so many fit nowhere.

    Raises:
        InputError: the database has no nodule as large as asked for.
    """
    low, high = source.nodules_per_patient
    wanted = int(rng.integers(low, high + 1))
    lent = bank(source.min_diameter_mm, split)
    if wanted and not lent:
        raise InputError(
            f"no LIDC nodule measures {source.min_diameter_mm:g} mm: "
            "lower data.source.min_diameter_mm"
        )
    free = np.isin(anatomy.layout, LUNG_LABELS)
    nodules: list[Nodule] = []
    for index in rng.permutation(len(lent))[: _ATTEMPTS + wanted]:
        if len(nodules) == wanted:
            break
        shape = ShapeOnGrid(lent[index], grid)
        corner = _find_place(shape, free, anatomy.lungs, grid, rng)
        if corner is None:
            continue
        paint_nodule(anatomy.hu, anatomy.lungs, grid, shape, corner, rng)
        nodule = _nodule(shape, corner)
        z, y, x = (slice(*ends) for ends in nodule.box_zyx)
        anatomy.layout[z, y, x][nodule.mask] = Label.NODULE
        z, y, x = (slice(start - _GAP, stop + _GAP) for start, stop in nodule.box_zyx)
        free[z, y, x] = False
        nodules.append(nodule)
    return tuple(nodules)


def _nodule(shape: ShapeOnGrid, corner: tuple[int, int, int]) -> Nodule:
    z, y, x = (float(v) for v in np.argwhere(shape.mask).mean(axis=0) + corner)
    record = shape.record
    return Nodule((z, y, x), corner, shape.mask, record.diameter_mm, record.ratings)


class ShapeOnGrid:
    """A record's contour mask, resampled to a grid whose voxel lies at the mask's middle.

    Attributes:
        record: the nodule of the database.
        mask: its voxels, bool (d, h, w), cut to their bounding box.
        distance: signed distance (mm) to its surface in that box and `margin` voxels around.
        margin: voxels (z, y, x) around the box.
    """

    def __init__(self, record: LidcRecord, grid: Grid) -> None:
        self.record = record
        native = record.mask()
        pad = [int(np.ceil((_MARGIN_MM + 6) / s)) for s in record.spacing_mm]
        padded = np.pad(native, [(p, p) for p in pad])
        signed = _signed_distance(padded, record.spacing_mm)
        middle = (np.array(padded.shape) - 1) / 2
        half = [
            int(np.floor((n * s / 2 + _MARGIN_MM) / t))
            for n, s, t in zip(native.shape, record.spacing_mm, grid.spacing_mm, strict=True)
        ]
        position = [
            np.arange(-h, h + 1) * t / s + m
            for h, t, s, m in zip(half, grid.spacing_mm, record.spacing_mm, middle, strict=True)
        ]
        mesh = np.meshgrid(*position, indexing="ij")
        distance = ndimage.map_coordinates(signed, mesh, order=1, mode="nearest")
        inside = distance < 0
        if not inside.any():  # thinner than a voxel: the one nearest to it stands for it
            inside = distance == distance.min()
        where = np.argwhere(inside)
        start, stop = where.min(axis=0), where.max(axis=0) + 1
        self.mask: NDArray[np.bool_] = inside[_slices(start, stop)].copy()
        self.margin = tuple(round(_MARGIN_MM / t * 0.9) for t in grid.spacing_mm)
        low = np.maximum(start - self.margin, 0)
        high = np.minimum(stop + self.margin, distance.shape)
        self.lead = tuple(int(v) for v in start - low)
        self.distance: Field = distance[_slices(low, high)].astype(np.float32)

    def box(self, corner: tuple[int, int, int], shape: tuple[int, ...]) -> tuple[Box, Box]:
        """Where `distance` lies in a volume if the mask begins at `corner`, and what part of it."""
        inner, outer = [], []
        for c, lead, n, size in zip(corner, self.lead, self.distance.shape, shape, strict=True):
            start = c - lead
            outer.append(slice(max(start, 0), min(start + n, size)))
            inner.append(slice(max(-start, 0), min(start + n, size) - start))
        return (outer[0], outer[1], outer[2]), (inner[0], inner[1], inner[2])


def paint_nodule(
    hu: Field,
    lungs: Field,
    grid: Grid,
    shape: ShapeOnGrid,
    corner: tuple[int, int, int],
    rng: np.random.Generator,
) -> None:
    """Paints one nodule, in place; it ends at the pleura."""
    distance = shape.distance
    depth = float(-distance.min())
    looks = looks_of(shape.record.ratings, depth)
    outer, inner = shape.box(corner, hu.shape)
    where = distance[inner]
    blur = grid.blur_mm

    wander = _wander(rng, where.shape, grid, 4.0)
    visible = where + np.float32(looks.rough_mm) * wander
    share = _soft(visible, looks.edge_mm + 0.5 * blur)
    within = edge(lungs[outer] - np.float32(1), blur)
    share *= within

    begin = -looks.core_from * depth
    core = _soft(where - np.float32(begin) + 0.8 * wander * (looks.core_from > 0), 1.2 * blur)
    grain = 14 + 0.035 * (30 - looks.shell_hu)
    value = looks.shell_hu + (looks.core_hu - looks.shell_hu) * core
    value += np.float32(grain) * _wander(rng, where.shape, grid, 2.5)
    _add_structure(value, where, depth, looks, wander, blur)

    part = hu[outer]
    # Ground glass lies over its vessels rather than in their place.
    blend(part, share, np.maximum(value, part) if looks.core_hu < -300 else value)
    hu[outer] = part
    if looks.num_strands:
        strands = _strands(rng, grid, shape, corner, looks.num_strands, depth)
        target = min(-120.0, looks.core_hu - 150)
        for box, axis_mm, radius in pieces(grid, strands, blur):
            thin = np.clip(0.5 + (radius - axis_mm) / np.float32(blur), 0, 1)
            thin *= np.minimum(1, 1.5 * radius / np.float32(blur)) * edge(lungs[box], blur)
            near = hu[box]
            blend(near, thin, np.maximum(near, np.float32(target)))
            hu[box] = near


def _add_structure(
    value: Field, where: Field, depth: float, looks: Looks, wander: Field, blur: float
) -> None:
    """Calcium, fluid, fat or air inside, as the scores name them."""
    inner = _soft(where + np.float32(0.45 * depth), blur)
    match looks.calcification:
        case 1:  # popcorn
            blend(value, np.clip(wander - 0.2, 0, 1) * _soft(where + 1, blur), 420.0)
        case 2:  # laminated
            rings = np.cos(where * np.float32(2 * np.pi / max(2.5, depth / 2))) > 0
            blend(value, rings * _soft(where + 1, blur), 330.0)
        case 3:  # solid
            blend(value, _soft(where + np.float32(0.5), blur), 420.0)
        case 4:  # non-central
            lopsided = wander > 0.6
            blend(value, lopsided * _soft(where + np.float32(0.7), blur), 380.0)
        case 5:  # central
            blend(value, inner, 400.0)
    match looks.internal_structure:
        case 2:
            blend(value, inner, 8.0)
        case 3:
            blend(value, inner, -75.0)
        case 4:
            blend(value, inner, -930.0)


def _strands(
    rng: np.random.Generator,
    grid: Grid,
    shape: ShapeOnGrid,
    corner: tuple[int, int, int],
    number: int,
    depth: float,
) -> Tubes:
    """Thin tapering lines from the nodule's surface outwards, in all directions."""
    spacing = np.array(grid.spacing_mm)
    centre = np.argwhere(shape.mask).mean(axis=0)
    origin = np.array([axis[c] for axis, c in zip(grid.axes, corner, strict=True)])
    way = rng.normal(0, 1, (number, 3)) * (0.6, 1, 1)
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    steps = np.arange(0, 60, 0.5)
    path = centre + way[:, None] * steps[:, None] / spacing + np.array(shape.lead)
    along = ndimage.map_coordinates(
        shape.distance, np.moveaxis(path, -1, 0), order=1, mode="constant", cval=9.0
    )
    reach = steps[np.argmax(along > 0, axis=1)]
    length = rng.uniform(0.6, 1.4, number) * (5 + 0.4 * depth)
    middle = origin + centre * spacing
    start = middle + way * np.maximum(reach - 1.5, 0)[:, None]
    kink = start + way * (length / 2)[:, None] + rng.normal(0, 0.6, (number, 3))
    end = start + way * length[:, None] + rng.normal(0, 1.5, (number, 3))
    thick = rng.uniform(0.7, 1.2, number)
    return Tubes(np.stack([start, kink], axis=1), np.stack([thick, 0.6 * thick], axis=1)) + Tubes(
        np.stack([kink, end], axis=1), np.stack([0.6 * thick, 0.25 * thick], axis=1)
    )


def _find_place(
    shape: ShapeOnGrid, free: NDArray[np.bool_], lungs: Field, grid: Grid, rng: np.random.Generator
) -> tuple[int, int, int] | None:
    """First voxel of the place nearest to the record's own where the whole mask is free lung."""
    stride = tuple(max(1, round(4.0 / s)) for s in grid.spacing_mm)
    offset = [int(rng.integers(0, s)) for s in stride]
    part = tuple(slice(o, None, s) for o, s in zip(offset, stride, strict=True))
    radius = float(-shape.distance.min())
    deep = np.argwhere(free[part] & (lungs[part] < -0.6 * radius)) * stride + offset
    if not len(deep):
        return None
    in_lungs = np.argwhere(free[part]) * stride + offset
    low, high = in_lungs.min(axis=0), in_lungs.max(axis=0)
    share = [
        np.interp(r, bounds, (0, 1))
        for r, bounds in zip(shape.record.relative_zyx, _LUNGS_IN_SCAN, strict=True)
    ]
    target = low + np.array(share) * (high - low)
    away = (((deep - target) * grid.spacing_mm) ** 2).sum(axis=1)
    size = np.array(shape.mask.shape)
    for middle in deep[np.argsort(away, kind="stable")[:3000]]:
        start = middle - size // 2
        if (start < _GAP).any() or (start + size > np.array(free.shape) - _GAP).any():
            continue
        if free[_slices(start, start + size)][shape.mask].all():
            return int(start[0]), int(start[1]), int(start[2])
    return None


@lru_cache(maxsize=4)
def bank(min_diameter_mm: float, split: Split) -> tuple[LidcRecord, ...]:
    """Nodules that enough readers outlined, large enough to place, of LIDC patients of a split."""
    return tuple(
        record
        for record in nodule_records()
        if _MIN_READERS <= len(record.annotations) <= MAX_READERS  # more: touching nodules
        and record.diameter_mm >= min_diameter_mm
        and _split_of(record) == split
    )


def _split_of(record: LidcRecord) -> Split:
    """By the default shares of real patients, whatever shares of phantoms a recipe asks for.

    So a model of phantoms has not seen the nodules of real test patients.
    """
    return split_at(unit_interval(SPLIT_SALT, record.patient_id), SplitConfig())


def _signed_distance(mask: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    """Distance to the faces between inside and outside voxels, negative inside.

    The transforms measure to voxel centres, which lie half a voxel beyond the faces.
    """
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    within = ndimage.distance_transform_edt(mask, sampling=spacing_mm)
    both = outside - within
    half = min(spacing_mm) / 2
    return np.sign(both) * np.maximum(np.abs(both) - half, np.abs(both) / 2)


def _soft(distance: Field, width_mm: float) -> Field:
    """Share inside a surface: a smooth step `width_mm` wide."""
    t = np.clip(0.5 - distance / np.float32(width_mm * 1.5), 0, 1)
    return t * t * (3 - 2 * t)


def _wander(rng: np.random.Generator, shape: tuple[int, ...], grid: Grid, size_mm: float) -> Field:
    """Smooth noise in a small box, deviation 1."""
    field = rng.standard_normal(shape, dtype=np.float32)
    field = ndimage.gaussian_filter(field, [size_mm / 2.4 / s for s in grid.spacing_mm])
    return field / max(float(field.std()), 1e-6)


def _most_frequent(scores: NDArray[np.float64], otherwise: int) -> int:
    known = scores[~np.isnan(scores)].astype(int)
    return int(np.bincount(known).argmax()) if len(known) else otherwise


def _slices(start: NDArray[np.intp], stop: NDArray[np.intp]) -> Box:
    z, y, x = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    return z, y, x
