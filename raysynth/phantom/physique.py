"""How one patient is built: the numbers that vary, and the smooth outer shapes they give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.phantom.grid import (
    Field,
    Grid,
    Nodes,
    ellipsoid,
    signed_distance,
    smooth_min,
)
from raysynth.seeding import seed_of

LEVEL_MM = 24.5
"""From one vertebra (and rib) to the next."""

# Profiles along the body, by depth below the lung apex in millimetres. The back and front of the
# rib cage follow the curves of the spine and the slope of the sternum.
_DEPTH = (-40.0, 0.0, 30.0, 60.0, 100.0, 150.0, 220.0, 300.0, 360.0, 450.0)
_BACK_Y = (38.0, 50.0, 60.0, 68.0, 74.0, 77.0, 75.0, 64.0, 54.0, 48.0)
_FRONT_Y = (-18.0, -27.0, -44.0, -58.0, -72.0, -82.0, -89.0, -88.0, -84.0, -80.0)
_WIDTH = (0.52, 0.62, 0.77, 0.88, 0.96, 1.0, 1.0, 0.96, 0.92, 0.92)
# Share of the way from the width over the ribs to that over the shoulders.
_SHOULDER = (1.0, 1.0, 0.82, 0.5, 0.18, 0.0, 0.0, 0.0, 0.0, 0.0)
# Half the room that the skin keeps to, in patient millimetres: a field of view of 360 x 260 mm.
_ROOM_Y = 119.0
_ROOM_X = 164.0


@dataclass(frozen=True)
class Physique:
    """The numbers that make one patient differ from the next. Lengths in millimetres.

    Attributes:
        scale_zyx: size against the model's patient, along z, y and x.
        half_width: half the inner width of the rib cage.
        fat: subcutaneous fat over the ribs; about 6 (thin) to 28 (obese).
        muscle: thickness of the chest wall's muscles beside the ribs.
        dome_depth: right diaphragm dome below the lung apex; larger when more inflated.
        dome_drop: how far the dome falls towards its rim.
        heart_scale: heart size against the model's.
        heart_shift: heart centre further to the left.
        breasts: size of the breasts; 0 = none.
        lung_hu: parenchyma without visible vessels, at mid-height of the lung.
        gravity_hu: how much denser the lowest lung is than the highest.
        emphysema: depth of lucent patches in HU; mostly 0.
        contrast_hu: what contrast agent adds to blood; mostly 0.
        bone_scale: bone density against the model's.
        noise_hu: standard deviation of the scanner's noise.
    """

    scale_zyx: tuple[float, float, float]
    half_width: float
    fat: float
    muscle: float
    dome_depth: float
    dome_drop: float
    heart_scale: float
    heart_shift: float
    breasts: float
    lung_hu: float
    gravity_hu: float
    emphysema: float
    contrast_hu: float
    bone_scale: float
    noise_hu: float

    @property
    def blood_hu(self) -> float:
        """Blood in the great vessels."""
        return 40.0 + self.contrast_hu


def draw_physique(rng: np.random.Generator) -> Physique:
    """A patient at random; neighbouring quantities vary together as far as a picture shows it."""
    size = rng.normal(1.0, 0.035)
    fat = float(np.clip(rng.lognormal(np.log(13), 0.4), 6, 26))
    woman = rng.random() < 0.5
    return Physique(
        scale_zyx=(
            _size(size + rng.normal(0, 0.02)),
            _size(size + rng.normal(0, 0.02)),
            _size(size + rng.normal(0, 0.02)),
        ),
        half_width=float(np.clip(rng.normal(130, 5), 118, 138)),
        fat=fat,
        muscle=float(np.clip(rng.normal(8 if woman else 12, 2), 5, 15)),
        dome_depth=float(np.clip(rng.normal(186, 12), 160, 203)),
        dome_drop=float(rng.uniform(22, 34)),
        heart_scale=float(np.clip(rng.normal(1.0, 0.07), 0.85, 1.18)),
        heart_shift=float(rng.normal(0, 5)),
        breasts=float(rng.uniform(0.5, 1.0) * min(1.3, 0.7 + fat / 30)) if woman else 0.0,
        lung_hu=float(rng.normal(-880, 15)),
        gravity_hu=float(rng.uniform(40, 90)),
        emphysema=float(rng.uniform(30, 70)) if rng.random() < 0.2 else 0.0,
        contrast_hu=float(rng.uniform(70, 190)) if rng.random() < 0.4 else 0.0,
        bone_scale=float(rng.uniform(0.75, 1.2)),
        noise_hu=float(rng.uniform(15, 25)),
    )


def _size(value: float) -> float:
    return float(np.clip(value, 0.92, 1.05))


class Torso:
    """A patient's outer shapes on the nodes of a grid, and what all organs are placed by.

    Organs are described for the model's patient; `model` holds every node's coordinates there
    (scaled, and bent a little so that no two sides are alike), and `place` brings model points into
    the patient. Signed distances are millimetres, negative inside.

    Args:
        grid: the patient's voxels.
        physique: the patient's numbers.
        identity: what the patient's randomness follows from.
    """

    def __init__(self, grid: Grid, physique: Physique, identity: tuple[str | int, ...]) -> None:
        self.grid = grid
        self.physique = physique
        self.identity = identity
        rng = self.rng("shape")
        self._bend = [3.5 * grid.smooth_noise(rng, 75.0) for _ in range(3)]
        self.model = tuple(
            (node + bend) / scale
            for node, bend, scale in zip(grid.nodes, self._bend, physique.scale_zyx, strict=True)
        )
        z, y, x = self.model
        depth = -z
        self.back_y = np.interp(depth, _DEPTH, _BACK_Y)
        self.front_y = np.interp(depth, _DEPTH, _FRONT_Y)
        self.middle_y = (self.back_y + self.front_y) / 2
        half_depth = (self.back_y - self.front_y) / 2
        half_width = physique.half_width * np.interp(depth, _DEPTH, _WIDTH)
        self.cage = _cage(x, y - self.middle_y, half_width, half_depth)
        self.body = self._body(depth, half_width)
        self.angle = np.arctan2(np.abs(x) / half_width, (y - self.middle_y) / half_depth)
        """0 at the spine, pi at the sternum, on either side."""
        self.diaphragm = self._diaphragm()

    def rng(self, part: str) -> np.random.Generator:
        """Randomness of one part, which does not depend on what else is drawn."""
        return np.random.default_rng(seed_of(*self.identity, part))

    def place(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Model points (..., 3) to patient millimetres."""
        flat = np.reshape(points, (-1, 3)) * self.physique.scale_zyx
        bend = np.stack([self.grid.at(field, flat) for field in self._bend], axis=1)
        return (flat - bend).reshape(np.shape(points))

    def back_of(self, z: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Model y of the rib cage's back at model height z."""
        return np.interp(-np.asarray(z), _DEPTH, _BACK_Y)

    def front_of(self, z: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Model y of the rib cage's front at model height z."""
        return np.interp(-np.asarray(z), _DEPTH, _FRONT_Y)

    def refined(self, name: str) -> Field:
        """One of the node fields on the voxels."""
        return self.grid.refine(getattr(self, name))

    def _body(self, depth: Nodes, half_width: Nodes) -> Nodes:
        p = self.physique
        _, y, x = self.model
        room_y, room_x = _ROOM_Y / p.scale_zyx[1], _ROOM_X / p.scale_zyx[2]
        over_ribs = np.minimum(half_width + 12 + p.muscle + p.fat, room_x)
        width = over_ribs + np.interp(depth, _DEPTH, _SHOULDER) * (room_x - over_ribs)
        wall = 0.9 * p.fat + 0.3 * p.muscle
        front = np.maximum(self.front_y - 14 - wall, -room_y)
        back = np.minimum(self.back_y + 26 + wall, room_y)
        dy = (y - (front + back) / 2) / ((back - front) / 2)
        shape = (np.abs(x / width) ** 2.5 + np.abs(dy) ** 2.5) ** (1 / 2.5) - 1
        groove = 5 * np.exp(-((x / 16) ** 2)) * (dy > 0)
        body = signed_distance(shape) + groove
        if p.breasts > 0:
            z = -150.0
            chest_front = float(self.front_of(z))
            centre_y = chest_front + 12 - 0.7 * p.fat
            reach = max(chest_front - 14 - wall - 14 * p.breasts, -room_y - 1)
            for side in (-1, 1):
                semi_axes = (58.0, max(centre_y - reach, 20.0), 52.0)
                breast = ellipsoid(self.model, (z, centre_y, side * 76.0), semi_axes)
                body = smooth_min(body, breast, 18.0)
        # However the patient is bent, some air remains at the volume's sides.
        _, y, x = self.grid.nodes
        sides = np.maximum(np.abs(y) - _ROOM_Y - 6, np.abs(x) - _ROOM_X - 11)
        return -smooth_min(-body, -sides, 10.0)

    def _diaphragm(self) -> Nodes:
        """Height above the diaphragm: a dome on either side and the heart's seat between them."""
        p = self.physique
        z, y, x = self.model
        top, drop = -p.dome_depth, p.dome_drop
        right = top - drop * (((x + 64) / 50) ** 2 + ((y + 10) / 58) ** 2)
        left = top - 13 - drop * (((x - 70) / 48) ** 2 + ((y + 6) / 58) ** 2)
        middle = top - 12 - drop * (((x - 5) / 60) ** 2 + ((y + 32) / 45) ** 2)
        surface = -smooth_min(smooth_min(-right, -left, 14.0), -middle, 14.0)
        return signed_distance(z - surface)


def _cage(x: Nodes, y: Nodes, half_width: Nodes, half_depth: Nodes) -> Nodes:
    """Inner face of the rib cage: rounded, narrower in front, notched by spine and sternum."""
    dy = y / half_depth
    dx = x / (half_width * (1 - 0.10 * np.clip(-dy, 0, 1.3) ** 2))
    shape = (np.abs(dx) ** 2.35 + np.abs(dy) ** 2.35) ** (1 / 2.35)
    shape += 0.13 * np.exp(-((x / 24) ** 2)) * np.clip(2 * dy, 0, 1)
    shape += 0.04 * np.exp(-((x / 22) ** 2)) * np.clip(-2 * dy, 0, 1)
    return signed_distance(shape - 1)
