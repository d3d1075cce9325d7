"""What lies below the diaphragm: liver, spleen, kidneys, stomach, bowel and their great vessels."""

from __future__ import annotations

import numpy as np

from raysynth.case import Label
from raysynth.phantom import tissue
from raysynth.phantom.grid import (
    Box,
    Field,
    Nodes,
    blend,
    edge,
    ellipsoid,
    polyline,
    signed_distance,
    smooth_min,
    tube_share,
)
from raysynth.phantom.physique import Torso

_WALL_MM = 5.0

_TUMOURS, _TUMOUR_RADIUS_MM = (1, 3), (9.0, 20.0)
_TUMOUR_RIM_MM = 4.0
"""Liver around every tumour."""


def paint_abdomen(hu: Field, torso: Torso, with_tumours: bool) -> dict[Label, tuple[Box, Field]]:
    """Paints the upper abdomen over its fat, in place; the liver with tumours, if they are wanted.

    Returns:
        Of each labelled organ the box of voxels around it and its signed distance there, tumours
        last; nothing where the volume ends above the diaphragm.
    """
    dome = torso.physique.dome_depth
    if torso.grid.axes[0][0] > -dome:
        return {}
    rng = torso.rng("abdomen")
    wobble = 3.0 * torso.grid.smooth_noise(rng, 45.0)
    cavity = np.maximum(torso.cage + _WALL_MM, torso.diaphragm + 3)
    enhanced = torso.physique.contrast_hu

    _paint_muscles(hu, torso)
    _paint_bowel(hu, torso, cavity, rng)
    organs = _organs(torso, rng, wobble)
    taken = np.minimum.reduce(list(organs.values()))
    _paint_stomach(hu, torso, np.maximum(cavity, 3 - taken), rng)
    solid = {
        Label.LIVER: tissue.LIVER_HU + 0.35 * enhanced,
        Label.SPLEEN: tissue.SPLEEN_HU + 0.5 * enhanced,
        Label.LEFT_KIDNEY: tissue.KIDNEY_HU + 0.9 * enhanced,
        Label.RIGHT_KIDNEY: tissue.KIDNEY_HU + 0.9 * enhanced,
    }
    surfaces = {}
    for label, value in solid.items():
        box, distance = _reached(torso, np.maximum(organs[label], cavity))
        part = hu[box]
        blend(part, edge(distance, torso.grid.blur_mm), value)
        if label in (Label.LEFT_KIDNEY, Label.RIGHT_KIDNEY):
            _paint_sinus(part, torso, box, label)
        hu[box] = part
        surfaces[label] = box, distance
    _paint_liver_vessels(hu, torso, *surfaces[Label.LIVER], rng)
    if with_tumours:
        surfaces[Label.TUMOUR] = _paint_tumours(hu, torso, *surfaces[Label.LIVER])
    return surfaces


def kidney_centre(torso: Torso, side: int) -> tuple[float, float, float]:
    """Model centre of the right (-1) or left (1) kidney; the left one lies higher."""
    z = -torso.physique.dome_depth - (102 if side > 0 else 116)
    return z, float(torso.back_of(z)) - 34, side * 60.0


def _reached(torso: Torso, distance: Nodes) -> tuple[Box, Field]:
    """The box of voxels that an organ reaches (with 15 mm around) and its distance there."""
    inside = np.argwhere(distance < 15)
    if not len(inside):
        inside = np.zeros((1, 3), int)
    low, high = inside.min(axis=0), inside.max(axis=0)
    nodes = torso.grid.nodes
    corner = np.array([n[tuple(low)] for n in nodes])
    opposite = np.array([n[tuple(high)] for n in nodes])
    box = torso.grid.box(corner, opposite)
    return box, torso.grid.refine(distance, box)


def _organs(torso: Torso, rng: np.random.Generator, wobble: Nodes) -> dict[Label, Nodes]:
    z, y, x = torso.model
    top = -torso.physique.dome_depth
    size = rng.normal(1.0, 0.06)
    right = ellipsoid(torso.model, (top - 62, -2, -62), (82 * size, 86, 76))
    left = ellipsoid(torso.model, (top - 42, -42, 12), (36 * size, 36, 66))
    liver = smooth_min(right, left, 22.0)
    underside = (top - 118 * size) + 0.62 * (x + 95) - 0.18 * y - z  # rises to the left
    liver = -smooth_min(-liver, -underside / 1.2, 20.0)
    # Room for the spine, the crura and what runs beside them.
    hollow = np.sqrt(((x - 8) / 42) ** 2 + ((y - torso.back_y + 14) / 46) ** 2) - 1
    liver = np.maximum(liver, -signed_distance(hollow)) + wobble
    spleen = ellipsoid(
        _tilted(torso.model, (top - 66, 36, 92), 0.35),
        (0, 0, 0),
        (52 * size, 40 * size, 25),
    )
    organs = {Label.LIVER: liver, Label.SPLEEN: spleen + 0.6 * wobble}
    for side, label in ((-1, Label.RIGHT_KIDNEY), (1, Label.LEFT_KIDNEY)):
        centre = kidney_centre(torso, side)
        length = 55 * rng.normal(1.0, 0.06)
        tilted = _tilted(torso.model, centre, -0.2 * side)
        kidney = ellipsoid(tilted, (0, 0, 0), (length, 28, 26))
        hilum = ellipsoid(tilted, (0, -10, -side * 27), (16, 15, 14))
        organs[label] = np.maximum(kidney, -hilum) + 0.3 * wobble
    # The right kidney lies in the liver's hollow, with nothing but fat behind it.
    kz, ky, kx = kidney_centre(torso, -1)
    bed = ellipsoid(torso.model, (kz, ky + 20, kx), (60, 54, 38))
    organs[Label.LIVER] = -smooth_min(-liver, bed, 8.0)
    organs[Label.SPLEEN] = np.maximum(organs[Label.SPLEEN], -(organs[Label.LEFT_KIDNEY] - 5))
    return organs


def _tilted(
    model: tuple[Nodes, ...], centre: tuple[float, float, float], slope: float
) -> tuple[Nodes, Nodes, Nodes]:
    """Coordinates about `centre`, turned in the frontal plane by atan(slope)."""
    dz, dy, dx = (n - c for n, c in zip(model, centre, strict=True))
    norm = np.sqrt(1 + slope * slope)
    return (dz + slope * dx) / norm, dy, (dx - slope * dz) / norm


def _paint_sinus(part: Field, torso: Torso, box: Box, label: Label) -> None:
    """Fat and calyces in the middle of a kidney; with contrast, a darker medulla around them."""
    side = -1 if label == Label.RIGHT_KIDNEY else 1
    centre = kidney_centre(torso, side)
    tilted = _tilted(torso.model, centre, -0.2 * side)
    blur = torso.grid.blur_mm
    if torso.physique.contrast_hu > 0:
        medulla = torso.grid.refine(ellipsoid(tilted, (0, -2, -side * 5), (41, 18, 16)), box)
        blend(part, 0.45 * edge(medulla, 4.0), tissue.KIDNEY_HU)
    fat = torso.grid.refine(ellipsoid(tilted, (0, -6, -side * 13), (26, 9, 12)), box)
    blend(part, edge(fat, blur), tissue.FAT_HU)
    pelvis = torso.grid.refine(ellipsoid(tilted, (0, -7, -side * 14), (14, 5, 9)), box)
    blend(part, edge(pelvis, blur), tissue.FLUID_HU)


def _paint_muscles(hu: Field, torso: Torso) -> None:
    """Psoas on either side of the spine, and the crura of the diaphragm."""
    top = -torso.physique.dome_depth

    def by_spine(z: float, forward: float, x: float) -> tuple[float, float, float]:
        return z, float(torso.back_of(z)) - forward, x

    for side in (-1, 1):
        psoas = [by_spine(-282, 20, 24 * side), by_spine(-340, 20, 32 * side)]
        psoas += [by_spine(-400, 22, 38 * side), by_spine(-470, 24, 44 * side)]
        crus = [(top + 2, 8.0, 9 + 12.0 * side), by_spine(top - 45, 38, 6 + 14 * side)]
        crus += [by_spine(top - 110, 34, 4 + 15 * side)]
        for line, radii in ((psoas, [6, 14, 20, 24]), (crus, [5, 5.5, 4])):
            tubes = polyline(torso.place(np.array(line, float)), np.array(radii, float))
            blend(hu, tube_share(torso.grid, tubes), tissue.MUSCLE_HU)


def _paint_stomach(hu: Field, torso: Torso, room: Nodes, rng: np.random.Generator) -> None:
    """A wall around food and fluid, with gas above (in front of) them."""
    top = -torso.physique.dome_depth
    stomach = smooth_min(
        ellipsoid(torso.model, (top - 50, -12, 58), (44, 42, 36)),
        ellipsoid(torso.model, (top - 96, -52, 22), (26, 24, 50)),
        18.0,
    )
    stomach = np.maximum(stomach + 5 * torso.grid.smooth_noise(rng, 45.0), room + 3)
    box, distance = _reached(torso, stomach)
    part = hu[box]
    blur = torso.grid.blur_mm
    blend(part, edge(distance, blur), tissue.SOFT_HU)
    blend(part, edge(distance + 4, blur), tissue.FLUID_HU + 12)
    _, y, _ = torso.grid.open_mesh(box)
    level = np.float32(rng.uniform(-52, -20))
    gas = np.maximum(distance + 4, y - level)
    blend(part, edge(gas, blur), tissue.GAS_HU)
    hu[box] = part


def _paint_bowel(hu: Field, torso: Torso, cavity: Nodes, rng: np.random.Generator) -> None:
    """Loops of bowel in front of the spine, some with gas."""
    top = -torso.physique.dome_depth
    z, y, _ = torso.model
    loops = torso.grid.smooth_noise(rng, 26.0)
    tube = signed_distance(np.abs(loops) - 0.7)
    front = np.maximum(z - (top - 84), y - torso.back_y + 62)
    box, distance = _reached(torso, np.maximum(np.maximum(tube, front), cavity + 9))
    part = hu[box]
    blend(part, edge(distance, 2.5), 28.0)
    gas = np.maximum(
        distance + 4, torso.grid.refine(0.8 - torso.grid.smooth_noise(rng, 40.0), box) * 9
    )
    blend(part, edge(gas, 2.0), tissue.GAS_HU * 0.9)
    hu[box] = part


def _paint_tumours(hu: Field, torso: Torso, box: Box, liver: Field) -> tuple[Box, Field]:
    """A few dark lumps within the liver, one surface for all."""
    rng = torso.rng("tumours")
    z, y, x = torso.grid.open_mesh(box)
    lumps = np.full(liver.shape, np.float32(1e3))
    for _ in range(rng.integers(*_TUMOURS, endpoint=True)):
        radius = rng.uniform(*_TUMOUR_RADIUS_MM)
        places = np.argwhere(liver < -radius - _TUMOUR_RIM_MM)
        if not len(places):
            continue
        middle = places[rng.integers(len(places))]
        offsets = (axis - axis.ravel()[at] for axis, at in zip((z, y, x), middle, strict=True))
        shape = rng.uniform(0.75, 1.2, 3)
        distance = np.sqrt(sum((d / s) ** 2 for d, s in zip(offsets, shape, strict=True))) - radius
        lumps = np.minimum(lumps, distance.astype(np.float32))
    lumps += (
        0.15 * _TUMOUR_RADIUS_MM[0] * torso.grid.refine(torso.grid.smooth_noise(rng, 14.0), box)
    )
    lumps = np.maximum(lumps, liver + _TUMOUR_RIM_MM)
    part = hu[box]
    value = tissue.TUMOUR_HU + 0.1 * torso.physique.contrast_hu
    blend(part, edge(lumps, torso.grid.blur_mm), value)
    hu[box] = part
    return box, lumps


def _paint_liver_vessels(
    hu: Field, torso: Torso, box: Box, liver: Field, rng: np.random.Generator
) -> None:
    """Hepatic veins fanning out from below the diaphragm, and the portal vein's branches."""
    top = -torso.physique.dome_depth
    tubes = []
    for root, spread in (((top - 22, 2, -24), 78), ((top - 92, -16, -22), 66)):
        for _ in range(7):
            way = np.array([rng.uniform(-0.8, 0.1), rng.uniform(-0.8, 0.7), rng.uniform(-1, 0.15)])
            way /= np.sqrt((way * way).sum())
            bend = rng.normal(0, 6, 3)
            line = np.array([root, root + way * spread / 2 + bend, root + way * spread])
            tubes.append(polyline(torso.place(line), np.array([4.5, 3.0, 1.0])))
    share = tube_share(torso.grid, sum(tubes[1:], tubes[0]))[box] * edge(liver + 3, 3.0)
    blood = torso.physique.blood_hu
    part = hu[box]
    blend(part, share, blood - 8 if torso.physique.contrast_hu == 0 else blood * 0.85)
    hu[box] = part
