"""Bones: ribs with their cartilage, spine, sternum, shoulder blades, collar bones."""

from __future__ import annotations

import numpy as np

from raysynth.phantom.grid import Field, Tubes, blend, edge, polyline, tube_distance
from raysynth.phantom.physique import LEVEL_MM, Torso

TRABECULAR_HU = 190.0
CORTICAL_HU = 620.0
CARTILAGE_HU = 105.0
DISC_HU = 85.0
CORD_HU = 35.0

# Where ribs 1-12 turn to cartilage and where that ends, as shares of the way to the sternum.
_BONE_UNTIL = np.array([0.74, 0.80, 0.82, 0.82, 0.80, 0.78, 0.76, 0.72, 0.68, 0.62, 0.50, 0.34])
_CARTILAGE_UNTIL = np.array([0.93, 0.95, 0.96, 0.96, 0.96, 0.96, 0.96, 0.88, 0.80, 0.70, 0.5, 0.34])


def paint_skeleton(hu: Field, torso: Torso, cage: Field, body: Field) -> None:
    """Puts all bones into `hu`, in place.

    Args:
        hu: the voxels so far.
        torso: the patient.
        cage: signed distance to the rib cage's inner face, on the voxels.
        body: signed distance to the skin, on the voxels.
    """
    density = torso.physique.bone_scale
    _paint_ribs(hu, torso, cage, body, density)
    _paint_spine(hu, torso, body, density)
    _paint_sternum(hu, torso, cage, density)
    _paint_shoulders(hu, torso, cage, body, density)


def paint_bone(
    hu: Field, distance: Field, blur_mm: float, density: float, cortex_mm: float = 1.5
) -> None:
    """A bone with surface distance `distance`: a dense shell around spongy bone."""
    blend(hu, edge(distance, blur_mm), CORTICAL_HU * density)
    blend(hu, edge(distance + np.float32(cortex_mm), blur_mm), TRABECULAR_HU * density)


def _paint_ribs(hu: Field, torso: Torso, cage: Field, body: Field, density: float) -> None:
    """Twelve pairs at once: height along the cage, counted in rib spacings, repeats every whole."""
    z, _, _ = torso.model
    way = torso.angle / np.pi
    slope = np.clip(34 + 0.28 * -z, 34, 92)  # lower ribs hang further down
    bony = 0.5 - 0.5 * np.cos(np.pi * np.clip(way / 0.82, 0, 1))
    rise = np.clip((way - 0.8) / 0.2, 0, 1) * 0.42  # cartilage climbs back to the sternum
    phase_nodes = (-z - 6 - slope * (bony - rise)) / LEVEL_MM

    near = (cage > -3) & (cage < 14) & (body < -4)
    phase = torso.grid.refine(phase_nodes)[near]
    way_round = torso.grid.refine(way)[near]
    number = np.rint(phase)
    rib = np.clip(number, 0, 11).astype(np.intp)
    inside = (number == rib) & (way_round > 0.10)
    along = (phase - number) * np.float32(LEVEL_MM)
    across = cage[near] - np.float32(5.5)
    radius = np.sqrt((along / np.float32(6.2)) ** 2 + (across / np.float32(3.9)) ** 2)
    distance = (radius - 1) * np.float32(4.4)

    part = hu[near]
    blur = torso.grid.blur_mm
    far = np.float32(9)
    is_bone = inside & (way_round < _BONE_UNTIL[rib])
    is_cartilage = inside & ~is_bone & (way_round < _CARTILAGE_UNTIL[rib])
    blend(part, edge(np.where(is_cartilage, distance, far), blur), CARTILAGE_HU)
    paint_bone(part, np.where(is_bone, distance, far), blur, density, 1.3)
    hu[near] = part


def _paint_spine(hu: Field, torso: Torso, skin: Field, density: float) -> None:
    grid = torso.grid
    scale = torso.physique.scale_zyx
    middle = torso.place(np.array([[-150.0, 90.0, 0.0]]))[0]
    reach = np.array([2000.0, 72.0, 52.0])
    box = grid.box(middle - reach, middle + reach)
    z_nodes, y_nodes, x_nodes = torso.model
    x = grid.refine(x_nodes * scale[2], box)
    y = grid.refine((y_nodes - torso.back_y) * scale[1], box)
    level = grid.refine(-z_nodes / LEVEL_MM, box) + np.float32(0.2)
    size = np.clip(0.86 + 0.022 * level, 0.8, 1.25)  # vertebrae grow downwards
    x, y = x / size, y / size

    part = hu[box]
    blur = grid.blur_mm
    body = np.sqrt((x / 17) ** 2 + ((y + 19) / 13.5) ** 2) * 15 - 15
    blend(part, edge(body - 1, blur), DISC_HU)
    distance = np.maximum(_vertebra(x, y, level, body), skin[box] + np.float32(5))
    paint_bone(part, distance, blur, density)
    canal = np.sqrt(x * x + (y - 3) ** 2)
    blend(part, edge(canal - 8, blur), 5.0)
    blend(part, edge(canal - 5, blur), CORD_HU)
    hu[box] = part


def _vertebra(x: Field, y: Field, level: Field, body: Field) -> Field:
    """Distance to bone: bodies, arches around the canal, transverse and spinous processes."""
    height = np.float32(LEVEL_MM)

    def offset(shift: float | Field) -> Field:
        moved = level + shift
        return np.abs(moved - np.rint(moved)) * height  # mm from the middle of the nearest vertebra

    bodies = np.maximum(body, offset(0.0) - 9.6)
    ring = np.abs(np.sqrt(x * x + (y - 3) ** 2) - 10.5) - 2.4
    arches = np.maximum(ring, offset(0.15) - 8.5)
    behind = y - 12
    spinous = np.maximum(np.abs(x) - 3.2, offset(-0.028 * behind) - 5.5)
    spinous = np.maximum(spinous, np.abs(behind - 9) - 10)
    sideways = np.maximum(np.abs(np.abs(x) - 20) - 13, np.abs(y - 6 - 0.22 * np.abs(x)) - 3.6)
    transverse = np.maximum(sideways, offset(0.22) - 5.5)
    return np.minimum(np.minimum(bodies, arches), np.minimum(spinous, transverse))


def _paint_sternum(hu: Field, torso: Torso, cage: Field, density: float) -> None:
    grid = torso.grid
    z, y, x = torso.model
    half_width = np.interp(-z, [44, 56, 80, 100, 150, 172, 190], [20, 30, 25, 15, 18, 16, 5])
    sideways = np.abs(x) - half_width
    front = grid.box(np.array([-1e4, -1e4, -70.0]), np.array([1e4, 0.0, 70.0]))
    ends = grid.refine(np.maximum(np.abs(-z - 116) - 72, sideways), front)
    plate = np.abs(cage[front] - np.float32(8.5)) - np.float32(4.6)
    forward = grid.refine(y - torso.middle_y, front)
    distance = np.maximum(np.maximum(ends, plate), forward)
    part = hu[front]
    paint_bone(part, distance, grid.blur_mm, 0.85 * density, 1.2)
    hu[front] = part


def _paint_shoulders(hu: Field, torso: Torso, cage: Field, body: Field, density: float) -> None:
    grid = torso.grid
    depth = -torso.model[0]
    way = torso.angle / np.pi
    inner = 0.20 + 0.02 * np.sin(depth / 25)
    outer = 0.53 - 0.0021 * np.clip(depth - 10, 0, None)
    margin = np.maximum(inner - way, way - outer) * 330  # a share of the way round is about 330 mm
    blade = np.maximum(margin, np.maximum(8 - depth, depth - 148))
    distance = np.maximum(grid.refine(blade), np.abs(cage - np.float32(19)) - np.float32(2.2))
    bones = np.minimum(distance, tube_distance(grid, _shoulder_tubes(torso), 6.0))
    inside = np.maximum(bones, body + np.float32(7))
    near = inside < 3
    part = hu[near]
    paint_bone(part, inside[near], grid.blur_mm, density, 1.6)
    hu[near] = part


def _shoulder_tubes(torso: Torso) -> Tubes:
    """Collar bones, and the spines and thick outer rims of the shoulder blades."""
    tubes = []
    for side in (-1.0, 1.0):
        clavicle = np.array(
            [[-40, -66, 20], [-34, -66, 50], [-22, -48, 95], [-8, -20, 128], [0, 0, 150]], float
        )
        spine = np.array([[-48, 84, 62], [-38, 86, 85], [-22, 70, 118], [-6, 40, 146]], float)
        rim = np.array([[-14, 28, 142], [-32, 40, 138], [-62, 62, 126]], float)
        for line, radii in (
            (clavicle, [8.0, 5.5, 5.0, 5.5, 6.5]),
            (spine, [3.0, 4.5, 6.0, 8.0]),
            (rim, [11.0, 6.0, 3.5]),
        ):
            line = line * (1, 1, side)
            tubes.append(polyline(torso.place(line), np.array(radii)))
    return sum(tubes[1:], tubes[0])
