"""A whole patient in order: body wall, abdomen, mediastinum, bones, lungs; and the layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Label
from raysynth.phantom import tissue
from raysynth.phantom.abdomen import paint_abdomen
from raysynth.phantom.grid import Field, blend, edge
from raysynth.phantom.physique import Torso
from raysynth.phantom.skeleton import paint_skeleton
from raysynth.phantom.thorax import Chest
from raysynth.volume import AIR_HU


@dataclass(frozen=True)
class Anatomy:
    """A patient without nodules and without the scanner's noise.

    Attributes:
        hu: Hounsfield units as float32 (z, y, x).
        layout: labels uint8 (z, y, x), from the same surfaces as `hu`.
        body: signed distance to the skin, mm.
        lungs: signed distance to the lungs' surface, mm.
    """

    hu: Field
    layout: NDArray[np.uint8]
    body: Field
    lungs: Field


def build_anatomy(torso: Torso, organ_labels: bool) -> Anatomy:
    """Builds all tissue of a patient on the patient's grid.

    Args:
        torso: the patient.
        organ_labels: whether abdominal organs get labels of their own, and the liver tumours;
            otherwise they are BODY.
    """
    body, cage, diaphragm = (torso.refined(name) for name in ("body", "cage", "diaphragm"))
    hu = _body_wall(torso, body, cage)
    organs = paint_abdomen(hu, torso, with_tumours=organ_labels)
    chest = Chest(torso)
    chest.paint_mediastinum(hu)
    paint_skeleton(hu, torso, cage, body)
    lungs = chest.lungs(cage, diaphragm)
    lumen = chest.paint_lungs(hu, lungs)

    layout = np.where(body < 0, np.uint8(Label.BODY), np.uint8(Label.BACKGROUND))
    if organ_labels:
        for label, (box, distance) in organs.items():
            layout[box][distance < 0] = label
    inside = lungs < 0
    left = torso.grid.refine(torso.model[2]) > 0
    layout[inside & left] = Label.LEFT_LUNG
    layout[inside & ~left] = Label.RIGHT_LUNG
    layout[lumen > 0.5] = Label.TRACHEA
    return Anatomy(hu, layout, body, lungs)


def _body_wall(torso: Torso, body: Field, cage: Field) -> Field:
    """Skin, fat, the layers of muscle around the rib cage, and fat inside it."""
    grid = torso.grid
    blur = grid.blur_mm
    rng = torso.rng("wall")
    hu = np.full(grid.shape, AIR_HU, np.float32)
    blend(hu, edge(body, blur), tissue.SKIN_HU)
    fat = grid.refine(_fat_thickness(torso, rng))
    blend(hu, edge(body + np.float32(2), blur), tissue.FAT_HU)
    # In front the muscles are a sheet over the ribs; what bulges before them is fat.
    sheet = np.interp(torso.angle / np.pi, [0.4, 0.65], [90, 15 + torso.physique.muscle])
    muscle = np.maximum(np.maximum(body + fat, 1 - cage), grid.refine(torso.cage - sheet))
    streaks = grid.refine(grid.smooth_noise(rng, 16.0))
    lean = np.float32(tissue.MUSCLE_HU) - np.float32(14) * np.clip(streaks - np.float32(0.9), 0, 3)
    blend(hu, edge(muscle, blur), lean)
    # Fat planes part the muscles; they wander at a depth of their own.
    course = torso.cage - 13 - 7 * grid.smooth_noise(rng, 50.0)
    width = 0.5 + 0.9 * grid.smooth_noise(rng, 30.0)
    plane = np.abs(grid.refine(course)) - grid.refine(width)
    plane = np.maximum(plane, muscle + np.float32(1.5))
    blend(hu, edge(plane, blur), tissue.FAT_HU + 20)
    # Between the ribs' outer face and the pleura there is muscle again.
    blend(hu, edge(np.abs(cage - np.float32(3.5)) - np.float32(4), blur), tissue.MUSCLE_HU - 10)
    # Inside the cage there is fat, but above the lungs the muscles of the neck begin.
    neck = np.clip((torso.model[0] + 30) / 25, 0, 1)
    neck = neck * (0.75 + 0.35 * grid.smooth_noise(rng, 14.0))
    filling = tissue.FAT_HU + 8 + (tissue.MUSCLE_HU - tissue.FAT_HU - 8) * np.clip(neck, 0, 1)
    blend(hu, edge(cage, blur), grid.refine(filling))
    hu += np.float32(6) * tissue.grain(rng, grid, 5.0) * (body < 0)
    return hu


def _fat_thickness(torso: Torso, rng: np.random.Generator) -> NDArray[np.float64]:
    """Thickness of the subcutaneous fat on the nodes: thick at the sides, thin along the spine."""
    x = torso.model[2]
    uneven = 1 + 0.18 * torso.grid.smooth_noise(rng, 60.0)
    side = 0.75 + 0.5 * np.abs(np.sin(torso.angle))
    spine = 1 - 0.5 * np.exp(-((x / 25) ** 2))
    return np.clip(torso.physique.fat * uneven * side * spine, 3.5, 45)
