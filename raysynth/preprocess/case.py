"""Makes a case that was just read ready for the store: orientation checked, layout added."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Case
from raysynth.errors import UnreadableCase
from raysynth.layout.anatomy import segment_anatomy
from raysynth.layout.compose import compose, overlay

MAX_OBLIQUE_DEGREES = 45.0
MIN_LUNG_ML = 100.0
"""Less lung than this is the edge of an abdominal scan, not a chest."""


def prepare(case: Case, needs_lung: bool = True) -> Case:
    """The case with its layout; a layout that it brings along (phantoms do) is kept.

    Args:
        case: as its format's reader made it.
        needs_lung: refuse a case that shows no lung to speak of.

    Raises:
        UnreadableCase: the axes do not run along the patient's (`orientation`), or there is no lung
            (`no-lung`).
    """
    _check_orientation(case)
    layout = case.layout
    if layout is None:
        layout = compose(_anatomy(case), case.nodules)
    if needs_lung:
        # Not np.bincount: it copies what it counts into 64-bit numbers.
        voxels = sum(int(np.count_nonzero(layout == label)) for label in LUNG_LABELS)
        lung_ml = voxels * float(np.prod(case.volume.spacing_mm)) / 1000
        if lung_ml < MIN_LUNG_ML:
            raise UnreadableCase(
                "no-lung",
                f"{lung_ml:.0f} ml of lung found, a chest has at least {MIN_LUNG_ML:.0f}; "
                "leave this series out, or check that its values are HU",
            )
    return replace(case, layout=layout, outlines=None)


def _anatomy(case: Case) -> NDArray[np.uint8]:
    """What intensities tell, under what was drawn; grey values of no known unit tell nothing."""
    if case.intensity == "hu":
        anatomy = segment_anatomy(case.volume)
    else:
        anatomy = np.zeros(case.volume.shape, np.uint8)
    return anatomy if case.outlines is None else overlay(anatomy, case.outlines)


def _check_orientation(case: Case) -> None:
    along = np.abs(np.diagonal(case.volume.direction)).min()
    if along < np.cos(np.radians(MAX_OBLIQUE_DEGREES)):
        raise UnreadableCase(
            "orientation",
            f"an axis lies {np.degrees(np.arccos(along)):.0f} degrees off the patient's own, at "
            f"most {MAX_OBLIQUE_DEGREES:.0f} are read; reformat the series to axial planes",
        )
