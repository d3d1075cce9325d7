"""Lung, body and nobody's air in crops whose grey values have no unit."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from raysynth.case import Label, Nodule
from raysynth.layout.crop import crop_anatomy
from raysynth.volume import Volume


def test_the_lung_is_the_dark_around_the_nodule() -> None:
    rng = np.random.default_rng(0)
    grey = 100 * ndimage.gaussian_filter(rng.standard_normal((64, 64)), 1)
    grey[:, 40:52] = 2000  # chest wall, and air beyond it
    grey[20:23, 10:13] = 1800  # a vessel
    grey[30:38, 30:38] = 1900
    mask = np.ones((1, 8, 8), bool)
    nodule = Nodule((0.0, 33.5, 33.5), (0, 30, 30), mask, 8.0, ())
    volume = Volume(grey.astype(np.int16)[None], (2.0, 0.7, 0.7))
    labels = crop_anatomy(volume, nodule, Label.LEFT_LUNG)[0]
    assert labels.dtype == np.uint8
    assert (labels[:, :30] == Label.LEFT_LUNG).all()
    assert (labels[:, 40:52] == Label.BODY).all()
    assert (labels[:, 52:] == Label.BACKGROUND).all()


def test_without_dark_beside_the_nodule_there_is_no_lung() -> None:
    grey = np.full((1, 32, 32), 1500, np.int16)
    grey[0, :, :6] = 0
    nodule = Nodule((0.0, 20.0, 20.0), (0, 19, 19), np.ones((1, 3, 3), bool), 3.0, ())
    labels = crop_anatomy(Volume(grey, (1.0, 1.0, 1.0)), nodule, Label.RIGHT_LUNG)
    assert set(np.unique(labels)) == {Label.BACKGROUND, Label.BODY}
