"""Segments body, lungs and airway of a CT by thresholds and shape, without a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import Label
from raysynth.layout.airway import find_airway
from raysynth.layout.lungs import AIR_HU, close_lung, lung_candidates, split_lungs
from raysynth.layout.morphology import (
    IN_PLANE,
    Mask,
    block_mean,
    coarsening,
    dilate,
    erode,
    largest_component,
    open_planes,
    refine,
)
from raysynth.volume import Triple, Volume

BODY_HU = -303.0
"""Soft tissue lies above: level 127 of 255 in the published window [-1000, 400] HU."""
COARSE_MM = 2.2
"""Grid on which shapes are found; their edges are then redrawn on the volume's own voxels."""
WALL_MM = 20.0
"""Half the width of the widest gap in the chest wall that opening may tear."""
AIRWAY_MM = 1.3
TABLE_MM = 3.0
"""Opening radius that parts the patient from the table's thin shells, clothes and tubes."""
CENTRAL_MM = 70.0
"""Trachea and main bronchi lie within this distance of the body's middle, to either side."""


def segment_anatomy(volume: Volume) -> NDArray[np.uint8]:
    """Labels background, left lung, right lung, trachea and body (`raysynth.case.Label` 0-4).

    The lungs include their vessels and nodules that touch the pleura; the trachea includes the
    main bronchi; the body leaves out the table. A volume without lungs yields body alone.

    Args:
        volume: HU; coarse voxels and fields of view that cut the body are fine.

    Returns:
        uint8 (z, y, x) on the volume's grid.
    """
    turn = volume.standard_order
    hu = volume.hu[turn]
    factors = coarsening(volume.spacing_mm, COARSE_MM)
    coarse_mm = _times(volume.spacing_mm, factors)
    coarse = block_mean(hu, factors)
    body = _find_body(coarse, coarse_mm)
    air = lung_candidates(coarse, body & (coarse < AIR_HU), coarse_mm)
    lumen = _lumen(hu, volume.spacing_mm, body, air, factors)
    wall = dilate(block_mean(lumen, factors) > 0)
    left, right = _find_lungs(coarse, air & ~wall, body & ~wall, coarse_mm)

    blocks = _Blocks(
        body=erode(body),
        body_edge=dilate(body),
        left=erode(left.closed) | (left.closed & ~left.air),
        left_edge=dilate(left.closed) & ~right.closed,
        right=erode(right.closed) | (right.closed & ~right.air),
        right_edge=dilate(right.closed) & ~left.closed,
        wall=wall,
    )
    return _redraw(blocks, hu, factors)[turn]


class _Blocks(NamedTuple):
    """What the coarse grid says of each block of voxels: `edge`s leave it to the voxels' HU.

    A shape's edge may run through every block whose neighbours do not all belong, and through
    neighbours of the shape.
    """

    body: Mask
    body_edge: Mask
    left: Mask
    left_edge: Mask
    right: Mask
    right_edge: Mask
    wall: Mask


def _redraw(
    blocks: _Blocks, hu: NDArray[np.int16], factors: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """The layout on the volume's own voxels, plane by plane from a table of all that can be."""
    codes = np.zeros(blocks.body.shape, np.uint8)
    for bit, mask in enumerate(blocks):
        codes |= mask.astype(np.uint8) << bit
    every_code, tissue = np.arange(1 << len(blocks))[:, None], np.arange(3)
    bits = (every_code >> bit & 1 == 1 for bit in range(len(blocks)))
    table = _paint(_Blocks(*bits), bodily=tissue == 2, airy=tissue == 0)
    labels = [column[codes] for column in table.T]

    layout = np.empty(hu.shape, np.uint8)
    for z, plane in enumerate(hu):
        if z % factors[0] == 0:
            block = slice(z // factors[0], z // factors[0] + 1)
            airy, between, bodily = (
                refine(label[block], (1, *factors[1:]), (1, *plane.shape))[0] for label in labels
            )
        layout[z] = np.where(plane > np.int16(BODY_HU), bodily, between)
        np.copyto(layout[z], airy, where=plane < np.int16(AIR_HU))
    return layout


def _paint(blocks: _Blocks, bodily: Mask, airy: Mask) -> NDArray[np.uint8]:
    """The labels of voxels: later ones cover earlier ones."""
    shape = np.broadcast_shapes(blocks.body.shape, bodily.shape)
    layout = np.zeros(shape, np.uint8)
    for label, there in (
        (Label.BODY, blocks.body | (blocks.body_edge & bodily)),
        (Label.LEFT_LUNG, blocks.left | (blocks.left_edge & airy)),
        (Label.RIGHT_LUNG, blocks.right | (blocks.right_edge & airy)),
        (Label.TRACHEA, blocks.wall & airy),
    ):
        layout[np.broadcast_to(there, shape)] = label
    return layout


@dataclass(frozen=True)
class _Lung:
    """One lung on the coarse grid: its `air`, and the `closed` outline with all that lies in it."""

    air: Mask
    closed: Mask


def _find_body(hu: NDArray[np.float32], spacing_mm: Triple) -> Mask:
    """The patient, filled: the largest thing left once thin shells are gone."""
    tissue = hu > BODY_HU
    solid = largest_component(open_planes(tissue, TABLE_MM, spacing_mm))
    # Thin parts of the chest wall come back, or the lungs would lie open.
    steps = max(1, round(WALL_MM / min(spacing_mm[1:])))
    for _ in range(steps):
        solid = dilate(solid, (1, 2)) & tissue
    planes, count = ndimage.label(~solid, structure=IN_PLANE)
    # Air from the front or from below the back is outside. A lung that the field of view cuts
    # touches the sides alone.
    outside = np.zeros(count + 1, np.bool_)
    outside[np.unique(planes[:, [0, -1]])] = True
    outside[0] = False
    return open_planes(~outside[planes], TABLE_MM, spacing_mm)


def _lumen(
    hu: NDArray[np.int16],
    spacing_mm: Triple,
    body: Mask,
    air: Mask,
    factors: tuple[int, int, int],
) -> Mask:
    """The airway's lumen on the volume's grid, sought near the middle of the body."""
    lumen = np.zeros(hu.shape, np.bool_)
    airy = np.flatnonzero(air.any(axis=(1, 2)))
    if len(airy) == 0:
        return lumen
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    middle = (np.median(columns) + 0.5) * factors[2]
    reach = CENTRAL_MM / spacing_mm[2]
    central = slice(max(0, int(middle - reach)), int(middle + reach))
    part = hu[:, :, central]
    fine = coarsening(spacing_mm, AIRWAY_MM)
    inside = block_mean(refine(body, factors, hu.shape)[:, :, central], fine) > 0.5
    # The trachea comes down from above the middle of the lungs, the bowel's gas stays below it.
    lowest_top = int(airy.mean()) * factors[0] // fine[0]
    found = find_airway(block_mean(part, fine), _times(spacing_mm, fine), inside, lowest_top)
    lumen[:, :, central] = refine(found, fine, part.shape)
    return lumen


def _find_lungs(
    hu: NDArray[np.float32], air: Mask, free: Mask, spacing_mm: Triple
) -> tuple[_Lung, _Lung]:
    """Left and right lung from `air`, closed as far as `free` goes."""
    left, right = split_lungs(hu, air, spacing_mm)
    left_closed = close_lung(hu, left, free & ~right, spacing_mm)
    right_closed = close_lung(hu, right, free & ~left, spacing_mm)
    both = left_closed & right_closed  # the mediastinum where it is thin belongs to neither
    return _Lung(left, left_closed & ~both), _Lung(right, right_closed & ~both)


def _times(spacing_mm: Triple, factors: tuple[int, int, int]) -> Triple:
    z, y, x = (spacing * factor for spacing, factor in zip(spacing_mm, factors, strict=True))
    return z, y, x
