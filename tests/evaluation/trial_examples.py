"""Samples of a trial that are easy to tell apart, and whose every figure is known."""

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


def toy_volumes(patients: int, each: int = 1, side: int = 16, seed: int = 0) -> Examples:
    """Lungs of noise, each with one bright ball; none was cut for it. All patients are held out."""
    rng = np.random.default_rng(seed)
    count = patients * each
    hu = rng.normal(-850, 60, (count, side, side, side))
    layout = np.full(hu.shape, Label.LEFT_LUNG, np.uint8)
    places = np.indices((side,) * 3)
    for volume, labels in zip(hu, layout, strict=True):
        radius = rng.uniform(2, 4)
        middle = rng.uniform(radius, side - 1 - radius, 3)
        ball = np.square(places - middle[:, None, None, None]).sum(axis=0) <= radius**2
        volume[ball], labels[ball] = 30, Label.NODULE
    return Examples(
        hu=hu.astype(np.int16),
        layout=layout,
        pixel_mm=np.ones(count, np.float32),
        box=np.full((count, 6), -1, np.int16),
        patient=np.repeat([f"p{number}" for number in range(patients)], each),
        plane=np.arange(count),
        scores=np.full((count, 5), np.nan, np.float32),
        malignancy=np.full(count, np.nan, np.float32),
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
