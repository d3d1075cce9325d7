"""Built-in patients: any number of them, each made from its seed and number alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Case, Nodule, Split
from raysynth.config.data import PhantomSource
from raysynth.phantom import tissue
from raysynth.phantom.anatomy import build_anatomy
from raysynth.phantom.grid import Grid
from raysynth.phantom.nodules import add_nodules
from raysynth.phantom.physique import Torso, draw_physique
from raysynth.seeding import seed_of
from raysynth.volume import RELATIVE_RANGE, Intensity, Volume
from raysynth.window import LUNG_WINDOW_HU, denormalize, normalize

_EXTENT_MM = {"thorax": (300.0, 260.0, 360.0), "abdomen": (210.0, 260.0, 360.0)}
# Upper face of the volume above the lung apex of the model's patient.
_TOP_MM = {"thorax": 12.0, "abdomen": -170.0}


def phantom_torso(source: PhantomSource, number: int) -> Torso:
    """The outer shapes of one patient, on the source's grid."""
    identity = ("phantom", source.seed, number)
    physique = draw_physique(np.random.default_rng(seed_of(*identity, "physique")))
    extent = _EXTENT_MM[source.anatomy]
    bottom = _TOP_MM[source.anatomy] - extent[0]
    return Torso(Grid(source.spacing_mm, bottom, extent), physique, identity)


def phantom_case(source: PhantomSource, number: int, split: Split = "train") -> Case:
    """One built-in patient with exact layout; a thorax also has nodules.

    It depends on the source's settings, `number` and, for the choice of nodules, `split` alone: no
    order, no other patient.

    Args:
        source: which anatomy, seed, voxel size and nodules.
        number: which patient, from 0; there is no last one.
        split: patients of different splits share no real nodule.
    """
    torso = phantom_torso(source, number)
    physique = torso.physique
    with_organs = source.anatomy == "abdomen"
    anatomy = build_anatomy(torso, organ_labels=with_organs)
    nodules: tuple[Nodule, ...] = ()
    if not with_organs:
        nodules = add_nodules(anatomy, torso.grid, source, split, torso.rng("nodules"))
    noise = tissue.scanner_noise(torso.rng("noise"), torso.grid, physique.noise_hu, anatomy.body)
    hu = np.add(anatomy.hu, noise, out=noise)
    z, y, x = (float(axis[0]) for axis in torso.grid.axes)
    key = f"phantom-{source.seed}-{number}"
    return Case(
        case_id=key if source.anatomy == "thorax" else f"{key}-{source.anatomy}",
        patient_key=key,
        split=split,
        volume=Volume(_values(hu, source.intensity), source.spacing_mm, (z, y, x)),
        nodules=nodules,
        layout=anatomy.layout,
        intensity=source.intensity,
        source={
            "kind": "phantom",
            "format": "phantom",
            "anatomy": source.anatomy,
            "number": float(number),
            "contrast_hu": physique.contrast_hu,
            "noise_hu": physique.noise_hu,
        },
    )


def _values(hu: NDArray[np.float32], intensity: Intensity) -> NDArray[np.int16]:
    """Hounsfield units, or the lung window as the grey values of an image without a unit."""
    whole = tissue.to_hu(hu)
    if intensity == "hu":
        return whole
    return denormalize(normalize(whole, LUNG_WINDOW_HU), RELATIVE_RANGE)
