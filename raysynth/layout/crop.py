"""The lung around a nodule, in a crop whose grey values have no unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import Label, Nodule
from raysynth.volume import Volume

REACH_MM = 3.0
"""So near to the nodule a dark part is the lung that the nodule lies in. The chest wall is thicker:
air outside the patient, or the other lung, is not taken for it."""


def crop_anatomy(volume: Volume, nodule: Nodule, lung: Label) -> NDArray[np.uint8]:
    """Labels of a crop of one plane, uint8 (1, y, x), without the nodule.

    Otsu's threshold parts dark from bright. Dark parts that come within `REACH_MM` of the nodule
    are its lung, with the vessels that they enclose; what is bright is body. Of other dark parts
    nobody knows what they are: they stay background.

    Args:
        volume: one plane, air darker than tissue.
        nodule: on the volume's grid.
        lung: the label of its lung.
    """
    from skimage.filters import threshold_otsu

    grey = volume.hu[0]
    dark = grey <= threshold_otsu(grey)
    own = np.zeros(grey.shape, bool)
    (_, _), (y0, y1), (x0, x1) = nodule.box_zyx
    own[y0:y1, x0:x1] = nodule.mask[0]
    distance_mm = ndimage.distance_transform_edt(~own, sampling=volume.spacing_mm[1:])
    parts, _ = ndimage.label(dark)
    names = np.unique(parts[dark & (distance_mm <= REACH_MM)])
    lungs = ndimage.binary_fill_holes(np.isin(parts, names[names > 0]))
    labels = np.where(dark, np.uint8(Label.BACKGROUND), np.uint8(Label.BODY))
    return np.where(lungs, np.uint8(lung), labels)[None]
