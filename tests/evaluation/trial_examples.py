"""Slices of a trial that are easy to tell apart, and whose every figure is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from raysynth.case import Label
from raysynth.evaluation.downstream.examples import NOBODY, TEXTURE, Examples

SIZE = 48


def toy(patients: int, each: int = 3, seed: int = 0, prefix: str = "p") -> Examples:
    """Lungs of noise, each with one bright disc; its texture score is 1 in the first slice, then 5.

    A nodule is malignant if its first score is above 3. All patients are held out.
    """
    rng = np.random.default_rng(seed)
    count = patients * each
    hu = rng.normal(-850, 60, (count, SIZE, SIZE))
    layout = np.full((count, SIZE, SIZE), Label.BODY, np.uint8)
    layout[:, 4:-4, 4:-4] = Label.LEFT_LUNG
    box = np.empty((count, 4), np.int16)
    rows = np.arange(SIZE)
    for image, labels, place in zip(hu, layout, box, strict=True):
        side = rng.integers(4, 9)
        y, x = rng.integers(6, SIZE - 16, 2)
        place[:] = y, x, y + side, x + side
        middle = (side - 1) / 2
        disc = (rows[:, None] - y - middle) ** 2 + (rows - x - middle) ** 2 <= (side / 2) ** 2
        image[disc], labels[disc] = 30, Label.NODULE
    scores = rng.uniform(1, 5, (count, 5)).astype(np.float32)
    scores[:, TEXTURE] = np.where(np.arange(count) % each == 0, 1, 5)
    return Examples(
        hu=hu.astype(np.int16),
        layout=layout,
        pixel_mm=np.ones(count, np.float32),
        box=box,
        patient=np.repeat([f"{prefix}{number}" for number in range(patients)], each),
        plane=np.arange(count),
        scores=scores,
        malignancy=np.where(scores[:, 0] > 3, 5, 1).astype(np.float32),
        held_out=np.ones(count, bool),
    )


def toy_synthetic(count: int, lender: str = NOBODY) -> Examples:
    """The same as a generator would draw them, on the layouts of one patient."""
    drawn = toy(count, 1, seed=9)
    return replace(
        drawn,
        patient=np.full(count, lender),
        malignancy=np.full(count, np.nan, np.float32),
        held_out=np.zeros(count, bool),
    )
