"""What lies above the diaphragm: mediastinum, heart, lungs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysynth.phantom import tissue
from raysynth.phantom.grid import (
    Field,
    Nodes,
    blend,
    edge,
    ellipsoid,
    signed_distance,
    smooth_min,
    tube_distance,
    tube_share,
)
from raysynth.phantom.physique import Torso
from raysynth.phantom.vessels import carina_z, chest_tubes, heart_z, lung_tubes
from raysynth.volume import Triple

_PLEURA_MM = 1.5


@dataclass(frozen=True)
class HeartShape:
    """Signed distances on the nodes: the whole heart, and the blood in its four chambers."""

    outline: Nodes
    chambers: Nodes


class Chest:
    """The organs of one chest, as distances and tubes that paint themselves in order."""

    def __init__(self, torso: Torso) -> None:
        self.torso = torso
        self.tubes = chest_tubes(torso)
        self.heart = _heart(torso)

    @cached_property
    def mediastinum(self) -> Nodes:
        """Signed distance to the space between the lungs, without the tubes that bulge from it."""
        torso = self.torso
        z, y, x = torso.model
        share = (y - torso.front_y) / (torso.back_y - torso.front_y)
        width = np.interp(
            share, [0, 0.12, 0.28, 0.45, 0.62, 0.78, 1.0], [4, 5, 13, 22, 20, 20.5, 20]
        )
        inlet = np.clip((62 + z) / 40, 0, 1)  # broader where the neck's vessels enter
        width = width + inlet * np.where(share < 0.7, 9, 4)
        # Below the hila the front of the slab is heart alone.
        middle = 6 * np.clip((-z - 100) / 60, 0, 1) * (share < 0.5) + 2
        slab = np.abs(x - middle) - width
        return smooth_min(slab, self.heart.outline - 5, 12.0)

    @cached_property
    def apex(self) -> Nodes:
        """Signed distance to the domes over both lung tops."""
        z, y, x = self.torso.model
        across = ((np.abs(x) - 46) / 52) ** 2 + ((y - 14) / 60) ** 2
        return signed_distance(z + 46 * across + np.where(x > 0, 3.0, 0.0))

    @cached_property
    def fissures(self) -> Nodes:
        """Distance (signed by side) to the nearest of the three fissures."""
        z, y, x = self.torso.model
        wave = 5 * self.torso.grid.smooth_noise(self.torso.rng("fissures"), 60.0)
        oblique = (z + 126 - 0.85 * y + np.where(x > 0, 8.0, 0.0) + wave) / 1.31
        level = np.where((x < 0) & (oblique > 0), z - carina_z(self.torso) + 33 + wave, 99.0)
        return np.where(np.abs(level) < np.abs(oblique), level, oblique)

    def lungs(self, cage: Field, diaphragm: Field) -> Field:
        """Signed distance to the lungs' surface on the voxels, mm."""
        torso = self.torso
        bulges = tube_distance(torso.grid, self.tubes.blood + self.tubes.airway.widened(1, 2.0))
        bulges -= np.float32(2)
        middle = torso.grid.refine(self.mediastinum)
        overlap = np.maximum(np.float32(8) - np.abs(middle - bulges), 0)
        middle = np.minimum(middle, bulges) - overlap * overlap / np.float32(32)
        outer = np.maximum(cage + np.float32(_PLEURA_MM), torso.grid.refine(self.apex))
        np.maximum(outer, np.float32(_PLEURA_MM) - diaphragm, out=outer)
        return np.maximum(outer, -middle)

    def paint_mediastinum(self, hu: Field) -> None:
        """Heart, great vessels, gullet and nodes over the fat that is there already."""
        torso, grid = self.torso, self.torso.grid
        blur = grid.blur_mm
        blood = torso.physique.blood_hu
        centre = torso.place(np.array([[heart_z(torso), -25.0, 10.0]]))[0]
        box = grid.box(centre - np.array([95, 80, 100]), centre + np.array([95, 75, 105]))
        part = hu[box]
        blend(part, edge(grid.refine(self.heart.outline, box), blur), 48.0 + 0.25 * (blood - 40))
        blend(part, edge(grid.refine(self.heart.chambers, box), blur), blood)
        hu[box] = part
        blend(hu, tube_share(grid, self.tubes.soft), tissue.SOFT_HU)
        blend(hu, tube_share(grid, self.tubes.blood), blood)

    def paint_lungs(self, hu: Field, lungs: Field) -> Field:
        """Lung tissue with vessels, bronchi and fissures, then the airway.

        Returns:
            Share of each voxel that is the lumen of trachea and main bronchi.
        """
        torso, grid, physique = self.torso, self.torso.grid, self.torso.physique
        blend(hu, edge(lungs, grid.blur_mm), self._parenchyma())
        node_lungs = np.maximum.reduce([torso.cage, self.apex, -torso.diaphragm, -self.mediastinum])
        branches = lung_tubes(torso, node_lungs, self.fissures)
        # Vessels end at the pleura, but the hilum's run on into the mediastinum.
        within = edge(np.maximum(lungs - 25, -torso.refined("diaphragm") + 1), 2.0)
        within *= torso.refined("cage") < -2
        blend(hu, tube_share(grid, branches.bronchi.widened(1.15, 0.7)) * within, 0.0)
        blend(hu, tube_share(grid, branches.blood) * within, physique.blood_hu)
        blend(hu, tube_share(grid, branches.bronchi) * within, -960.0)
        blend(hu, tube_share(grid, self.tubes.airway.widened(1.0, 1.6)), tissue.SOFT_HU)
        lumen = tube_share(grid, self.tubes.airway)
        blend(hu, lumen, tissue.GAS_HU)
        return lumen

    def _parenchyma(self) -> Field:
        """HU of lung without visible vessels: gravity, patches, grain and fissures."""
        torso, grid, physique = self.torso, self.torso.grid, self.torso.physique
        rng = torso.rng("parenchyma")
        _, y, _ = grid.nodes
        smooth = physique.lung_hu + physique.gravity_hu * y / 150
        smooth = smooth + 9 * grid.smooth_noise(rng, 40.0)
        smooth -= physique.emphysema * np.clip(grid.smooth_noise(rng, 22.0) - 0.4, 0, 1.5)
        field = grid.refine(smooth)
        speck = tissue.grain(rng, grid, 4.0)
        field += np.float32(17) * speck
        del speck
        fissure = np.abs(grid.refine(self.fissures))
        field += np.float32(130) * np.clip(1 - fissure / np.float32(1.6), 0, 1)
        return field


def _heart(torso: Torso) -> HeartShape:
    h, size, shift = heart_z(torso), torso.physique.heart_scale, torso.physique.heart_shift
    left = 26.0 + shift
    ventricles = _spindle(
        torso.model, (h - 4, -30, left), (-0.50, -0.42, 0.75), 60 * size, 41 * size
    )
    right_atrium = ellipsoid(
        torso.model, (h + 2, -22, -20 + shift / 2), (36 * size, 28 * size, 24 * size)
    )
    left_atrium = ellipsoid(torso.model, (h + 15, 3, 4), (23 * size, 20 * size, 33 * size))
    outflow = ellipsoid(torso.model, (h + 22, -50, 14 + shift / 2), (34, 20, 22))
    outline = smooth_min(ventricles, smooth_min(right_atrium, left_atrium, 10.0), 14.0)
    outline = smooth_min(outline, outflow, 14.0)
    left_cavity = _spindle(torso.model, (h - 3, -18, left + 10), (-0.50, -0.42, 0.75), 44, 19)
    right_cavity = _spindle(torso.model, (h - 5, -48, left - 8), (-0.5, -0.3, 0.81), 46, 16)
    chambers = np.minimum.reduce(
        [left_cavity, right_cavity, right_atrium + 3, left_atrium + 2.5, outflow + 3]
    )
    return HeartShape(outline, np.maximum(chambers, outline + 3))


def _spindle(
    nodes: tuple[Nodes, ...], centre: Triple, axis: Triple, long_mm: float, short_mm: float
) -> Nodes:
    """Signed distance to an ellipsoid of revolution about a slanting axis, all (z, y, x)."""
    unit = np.array(axis) / np.linalg.norm(axis)
    offsets = [n - c for n, c in zip(nodes, centre, strict=True)]
    along = sum(o * u for o, u in zip(offsets, unit, strict=True))
    square = sum(o * o for o in offsets)
    across = square - along * along
    return signed_distance(np.sqrt((along / long_mm) ** 2 + across / short_mm**2) - 1)
