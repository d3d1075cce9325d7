"""Tubes of the chest: great vessels, airway, gullet, and the vessel trees inside the lungs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.phantom.grid import Nodes, Tubes, polyline
from raysynth.phantom.physique import Torso

Points = NDArray[np.float64]

_TARGET_MM = 11.0
_LEAF_RADIUS_MM = 0.52
# Murray's law has 3; measured lung vessels branch with less.
_MURRAY = 2.5
# Prim-Dijkstra trade-off: 0 gives the shortest tree (which wanders), 1 straight spokes.
_DIRECTNESS = 0.15


@dataclass(frozen=True)
class ChestTubes:
    """What is a tube in the chest, in patient millimetres.

    Attributes:
        blood: aorta and its branches, great veins, pulmonary trunk and main arteries.
        soft: gullet and lymph nodes.
        airway: lumen of trachea and main bronchi.
    """

    blood: Tubes
    soft: Tubes
    airway: Tubes


def carina_z(torso: Torso) -> float:
    """Model height of the fork of the trachea."""
    return -0.52 * torso.physique.dome_depth


def heart_z(torso: Torso) -> float:
    """Model height of the middle of the heart."""
    return -torso.physique.dome_depth + 36


def chest_tubes(torso: Torso) -> ChestTubes:
    """The large tubes of one patient; calibres vary."""
    rng = torso.rng("tubes")
    aorta_scale, airway_scale = rng.normal(1.0, 0.08), rng.normal(1.0, 0.07)
    arteries = _course(torso, _aorta(torso), aorta_scale)
    return ChestTubes(
        blood=_joined([arteries, *(_course(torso, line) for line in _other_vessels(torso))]),
        soft=_joined([_course(torso, _gullet(torso)), *_lymph_nodes(torso, rng)]),
        airway=_joined([_course(torso, line, airway_scale) for line in _airway(torso)]),
    )


Course = list[tuple[float, float, float, float]]
"""A tube of the model's patient: z, y, x and radius at some points along it."""


def _course(torso: Torso, line: Course, radius_scale: float = 1.0) -> Tubes:
    table = np.array(line, float)
    return polyline(torso.place(table[:, :3]), table[:, 3] * radius_scale)


def _by_spine(torso: Torso, z: float, forward: float, x: float, radius: float) -> Course:
    """One point of a course, `forward` of the back of the rib cage."""
    return [(z, float(torso.back_of(z)) - forward, x, radius)]


def _aorta(torso: Torso) -> Course:
    c, h, dome = carina_z(torso), heart_z(torso), torso.physique.dome_depth
    ascending_and_arch: Course = [
        (h + 14, -28, 2 + torso.physique.heart_shift / 2, 16),
        (c - 22, -40, -15, 16.5),
        (c - 2, -42, -17, 16),
        (c + 18, -30, -9, 15),
        (c + 27, -8, 6, 14),
        (c + 21, 15, 19, 13),
    ]
    return (
        ascending_and_arch
        + _by_spine(torso, c - 6, 36, 25, 12.5)
        + _by_spine(torso, -dome + 40, 36, 24, 12)
        + _by_spine(torso, -dome - 5, 44, 14, 11.5)
        + _by_spine(torso, -dome - 50, 50, 7, 11)
        + _by_spine(torso, -330, 49, 6, 9.5)
        + _by_spine(torso, -470, 48, 6, 8.5)
    )


def _other_vessels(torso: Torso) -> list[Course]:
    c, h, dome = carina_z(torso), heart_z(torso), torso.physique.dome_depth
    lower_cava: Course = [
        (h - 22, -14, -22, 12),
        (-dome - 15, -4, -24, 12),
        (-dome - 60, 12, -24, 12),
        *_by_spine(torso, -330, 50, -20, 11),
        *_by_spine(torso, -470, 49, -17, 10),
    ]
    azygos = _by_spine(torso, c - 8, 38, -9, 4) + _by_spine(torso, -dome - 10, 38, -7, 3)
    return [
        lower_cava,
        azygos,
        # From the arch: brachiocephalic trunk, left carotid, left subclavian artery.
        [(c + 26, -14, 2, 6.5), (c + 55, -18, -14, 6), (c + 95, -12, -27, 4.5)],
        [(c + 29, -4, 9, 4.5), (c + 60, -8, 19, 4), (c + 115, -8, 26, 3.5)],
        [(c + 27, 8, 17, 5.5), (c + 66, 6, 26, 5.5), (c + 102, -10, 48, 5)],
        # Upper vena cava, left and right brachiocephalic vein.
        [(c + 52, -32, -24, 8.5), (c, -29, -27, 9.5), (c - 36, -22, -26, 10)],
        [(c + 82, -28, 50, 6), (c + 62, -42, 20, 6.5), (c + 50, -34, -20, 8)],
        [(c + 100, -30, -38, 6), (c + 75, -38, -30, 7), (c + 50, -33, -24, 8)],
        # Pulmonary trunk with the left artery, then the right artery.
        [(c - 30, -52, 16, 14), (c - 12, -34, 24, 13), (c - 6, -14, 31, 11), (c - 10, 3, 45, 8)],
        [
            (c - 14, -25, 20, 12),
            (c - 17, -15, 0, 11),
            (c - 19, -10, -22, 10),
            (c - 22, -5, -45, 7.5),
        ],
        # A pulmonary vein on either side.
        [(h + 12, 2, -22, 8), (c - 38, -2, -44, 5.5)],
        [(h + 12, 2, 26, 8), (c - 36, 4, 44, 5.5)],
    ]


def _gullet(torso: Torso) -> Course:
    c, dome = carina_z(torso), torso.physique.dome_depth
    return [
        (c + 120, 20, 4, 6),
        (c + 60, 21, 4, 7),
        (c, 24, 7, 7.5),
        *_by_spine(torso, c - 50, 46, 6, 8),
        (-dome + 5, 20, 8, 8),
        (-dome - 28, 4, 20, 8),
    ]


def _airway(torso: Torso) -> list[Course]:
    """Trachea, right and left main bronchus."""
    c = carina_z(torso)
    return [
        [(c + 130, -3, 2, 8.5), (c + 60, 4, 0, 8.5), (c - 2, 9, -3, 9)],
        [(c, 9, -4, 8), (c - 13, 9, -19, 7), (c - 26, 7, -44, 5.5)],
        [(c, 9, -2, 7.5), (c - 14, 11, 19, 6.5), (c - 25, 13, 48, 5)],
    ]


def _lymph_nodes(torso: Torso, rng: np.random.Generator) -> list[Tubes]:
    """A few beans about the fork of the trachea."""
    c = carina_z(torso)
    middle = rng.uniform((c - 35, -25, -28), (c + 35, 15, 28), (6, 3))
    half = rng.normal(0, 2.5, (6, 3))
    radius = rng.uniform(2.5, 4.5, 6)
    return [
        polyline(torso.place(np.stack([m - v, m + v])), np.array([r, r]))
        for m, v, r in zip(middle, half, radius, strict=True)
    ]


@dataclass(frozen=True)
class LungTubes:
    """Branches inside the lungs: `blood` (arteries, veins) and the `bronchi` beside arteries."""

    blood: Tubes
    bronchi: Tubes


def lung_tubes(torso: Torso, lungs: Nodes, fissures: Nodes) -> LungTubes:
    """Arteries, veins and bronchi of both lungs.

    Every tree joins its hilum to points spread evenly through its lung: denser than the eye counts,
    as far from pleura and fissures as visible vessels stay.

    Args:
        torso: the patient.
        lungs: signed distance to the lungs' surface, on the nodes.
        fissures: distance to the nearest fissure, on the nodes.
    """
    rng = torso.rng("vessels")
    c = carina_z(torso)
    blood: list[Tubes] = []
    bronchi: list[Tubes] = []
    for side in (-1, 1):
        artery_z, vein_z = (c - 22, c - 38) if side < 0 else (c - 10, c - 36)
        main_bronchus = (c - 26, 7.0, -44.0) if side < 0 else (c - 25, 13.0, 48.0)
        artery = [(artery_z, -5.0, side * 42.0), (artery_z - 4, 0.0, side * 52.0)]
        vein = [(vein_z, 0.0, side * 42.0), (vein_z - 2, 0.0, side * 50.0)]
        for trunk in (artery, vein):
            targets = _targets(rng, torso, lungs, fissures, side)
            tubes, leaves = _tree(torso.place(np.array(trunk)), targets)
            blood.append(tubes)
            if trunk is artery:
                bronchi += _bronchi(tubes, leaves, torso.place(np.array([main_bronchus])), side)
    return LungTubes(_joined(blood), _joined(bronchi))


def _bronchi(arteries: Tubes, leaves: NDArray[np.float64], root: Points, side: int) -> list[Tubes]:
    """The bronchi that run beside the thicker arteries, from the end of a main bronchus `root`."""
    thick = leaves >= 10
    if not thick.any():
        return []
    way = np.array([0.35, 0.45, -0.8 * side])  # beside the artery, towards the middle
    gap = arteries.radii_mm[thick].mean(axis=1) * 1.9 + 0.6
    beside = arteries.ends_mm[thick] + (way / np.linalg.norm(way)) * gap[:, None, None]
    radii = arteries.radii_mm[thick] * 0.75
    link = Tubes(np.stack([root, beside[0, 1:]], axis=1), np.array([[5.0, radii[0, 1]]]))
    return [link, Tubes(beside[1:], radii[1:])]


def _joined(tubes: list[Tubes]) -> Tubes:
    return sum(tubes, Tubes(np.zeros((0, 2, 3)), np.zeros((0, 2))))


def _tree(trunk: Points, targets: Points) -> tuple[Tubes, NDArray[np.float64]]:
    """A tree from a trunk to all targets, and how many tips lie beyond each of its pieces."""
    if not len(targets):  # the volume ends above or below this lung
        return polyline(trunk, np.full(len(trunk), 3.0)), np.ones(4 * (len(trunk) - 1))
    targets = targets[np.argsort(((targets - trunk[-1]) ** 2).sum(axis=1), kind="stable")]
    start, leaves = _grow(trunk, targets)
    end = np.arange(1, len(leaves))
    calibre = _LEAF_RADIUS_MM * leaves ** (1 / _MURRAY)
    # A side branch begins at its own calibre, not at that of the vessel it leaves.
    radii = np.stack([np.minimum(calibre[start] * 0.95, calibre[end] * 1.2), calibre[end]], axis=1)
    points = _smooth(np.concatenate([trunk, targets]), start, end, leaves, len(trunk))
    return Tubes(np.stack([points[start], points[end]], axis=1), radii), leaves[end]


def _targets(
    rng: np.random.Generator, torso: Torso, lungs: Nodes, fissures: Nodes, side: int
) -> Points:
    """Points spread through one lung: a lattice, every point moved at random within its cell."""
    nodes = torso.grid.nodes
    low = np.array([axis.min() for axis in nodes])
    high = np.array([axis.max() for axis in nodes])
    axes = [np.arange(a, b, _TARGET_MM) for a, b in zip(low, high, strict=True)]
    lattice = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    points = lattice + rng.uniform(0, _TARGET_MM, lattice.shape)
    keep = torso.grid.at(lungs, points) < -4.0
    keep &= np.abs(torso.grid.at(fissures, points)) > 5.0
    return points[keep & (np.sign(points[:, 2]) == side)]


def _grow(trunk: Points, targets: Points) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Joins targets (nearest to the hilum first) one by one to what has grown from the trunk.

    Returns:
        Of every point of trunk + targets but the first, the point it hangs from; and of every point
        how many tips lie beyond it.
    """
    points = np.concatenate([trunk, targets])
    count, first = len(points), len(trunk) - 1
    parent = np.arange(-1, count - 1)
    path = np.zeros(count)
    for i in range(first + 1, count):
        away = np.sqrt(((points[first:i] - points[i]) ** 2).sum(axis=1))
        best = int(np.argmin(away + _DIRECTNESS * path[first:i]))
        parent[i] = best + first
        path[i] = path[parent[i]] + away[best]
    leaves = np.zeros(count)
    leaves[np.setdiff1d(np.arange(first + 1, count), parent)] = 1
    for i in range(count - 1, 0, -1):  # children come after their parents
        leaves[parent[i]] += leaves[i]
    return parent[1:], leaves


def _smooth(
    points: Points, start: NDArray[np.intp], end: NDArray[np.intp], leaves: Points, fixed: int
) -> Points:
    """Moves forks towards their thicker branches, so that main branches run on without a kink."""
    points = points.copy()
    weight = np.bincount(start, leaves[end] ** 2, len(points))
    inner = (weight > 0) & (np.arange(len(points)) >= fixed)
    parent = np.zeros(len(points), np.intp)
    parent[end] = start
    for _ in range(3):
        ahead = np.stack(
            [np.bincount(start, leaves[end] ** 2 * points[end, k], len(points)) for k in range(3)],
            1,
        )
        middle = 0.5 * (points[parent] + ahead / np.maximum(weight, 1e-9)[:, None])
        points[inner] += 0.5 * (middle - points)[inner]
    return points
