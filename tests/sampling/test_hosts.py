"""Where holes are made, and where another patient's tissue is put."""

from __future__ import annotations

import numpy as np

from raysynth.case import Label
from raysynth.sampling.hosts import place_tissue

SIDE = 40


def layout(with_tumour: bool) -> np.ndarray:
    """A disc of liver in the body, maybe with a tumour in it."""
    y, x = np.mgrid[:SIDE, :SIDE]
    made = np.full((SIDE, SIDE), Label.BODY, np.uint8)
    made[(y - 20) ** 2 + (x - 16) ** 2 < 12**2] = Label.LIVER
    made[2:8, 30:38] = Label.SPLEEN
    if with_tumour:
        made[18:22, 12:18] = Label.TUMOUR
        made[22, 14] = Label.TUMOUR
    return made


def test_tissue_keeps_its_shape_and_lies_in_its_organ() -> None:
    host, donor = layout(False), layout(True)
    corners = set()
    for seed in range(40):
        placed = place_tissue(host, donor, Label.TUMOUR, np.random.default_rng(seed))
        assert placed is not None
        new = placed == Label.TUMOUR
        assert (host[new] == Label.LIVER).all()
        assert np.array_equal(placed[~new], host[~new])
        (y, x), (dy, dx) = np.argwhere(new).min(axis=0), np.argwhere(donor == Label.TUMOUR).min(0)
        assert np.array_equal(np.roll(donor == Label.TUMOUR, (y - dy, x - dx), (0, 1)), new)
        corners.add((y, x))
    assert len(corners) > 20


def test_a_host_without_the_organ_takes_nothing() -> None:
    host = np.where(layout(False) == Label.LIVER, Label.BODY, layout(False)).astype(np.uint8)
    assert place_tissue(host, layout(True), Label.TUMOUR, np.random.default_rng(0)) is None
