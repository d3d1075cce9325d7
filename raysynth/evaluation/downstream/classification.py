"""Crops with a nodule or without one, told apart by an SE-ResNet-18."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from raysynth.case import LUNG_LABELS, Label
from raysynth.config.downstream import DownstreamConfig
from raysynth.errors import InputError
from raysynth.evaluation.downstream.examples import Examples
from raysynth.evaluation.downstream.fit import fit
from raysynth.evaluation.downstream.networks import se_resnet18
from raysynth.evaluation.downstream.tables import Table
from raysynth.evaluation.regions import SMALL_IMAGE, cut_crops
from raysynth.seeding import seed_of
from raysynth.window import LUNG_WINDOW_HU, normalize

NUM_CANDIDATES = 8
"""Places looked at for each crop without nodule; the densest is taken, as LUNA16's candidates are
what a detector stumbles over. Empty lung would make the task too easy."""

TESTED_BATCH = 256


def learn_nodules(train: Examples, test: Examples, config: DownstreamConfig, seed: int) -> Table:
    """Trains on crops with and without nodule, and says of the test crops what they show.

    Returns:
        Columns `row` (of `test`), `score` (probability of a nodule) and `label`.
    """
    crops, label, _ = nodule_crops(train)
    tested, truth, rows = nodule_crops(test)
    score = learn_crops(crops, label, tested, config, seed)
    return {"row": rows, "score": score, "label": truth}


def nodule_crops(
    examples: Examples,
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.int64]]:
    """A crop around each box, and one of the same slice's lung without any nodule.

    The place without nodule depends on the slice alone: it is the same in every arm. A slice in
    which there is none yields nothing.

    Returns:
        Crops, labels (1: nodule) and rows of the examples that they are from.

    Raises:
        InputError: no slice has a place without nodule.
    """
    size = crop_size(examples)
    rows = np.flatnonzero(examples.boxed)
    places = [_free_place(examples, int(row), size) for row in rows]
    found = np.array([place is not None for place in places], bool)
    if not found.any():
        raise InputError(
            "downstream.tasks classification: no slice with a nodule shows lung beside it; leave "
            "it out, or cut slices around the lungs (data.samples.centre)"
        )
    rows = rows[found]
    middle = np.array([place for place in places if place is not None])
    free = np.concatenate([middle, middle], axis=1)  # a box of no extent, around its own middle
    crops = [cut_crops(examples.hu[rows], box, size) for box in (examples.box[rows], free)]
    label = np.repeat(np.array([1, 0], np.float32), len(rows))
    return np.concatenate(crops), label, np.tile(rows, 2)


def crop_size(examples: Examples) -> int:
    """Pixels a side: 32 as published, 16 of small slices."""
    return 32 if min(examples.hu.shape[1:]) >= SMALL_IMAGE else 16


def _free_place(examples: Examples, row: int, size: int) -> NDArray[np.int64] | None:
    layout, (y0, x0, y1, x1) = examples.layout[row], examples.box[row]
    nodule = layout == Label.NODULE
    nodule[y0:y1, x0:x1] = True
    near = ndimage.maximum_filter(nodule, size)
    lung = np.argwhere(np.isin(layout, LUNG_LABELS) & ~near)
    if not len(lung):
        return None
    rng = np.random.default_rng(seed_of("free", *examples.box[row].tolist(), int(nodule.sum())))
    tried = lung[rng.integers(0, len(lung), NUM_CANDIDATES)]
    density = [examples.hu[row, y - 1 : y + 2, x - 1 : x + 2].mean() for y, x in tried.clip(1)]
    best: NDArray[np.int64] = tried[int(np.argmax(density))]
    return best


def learn_crops(
    crops: NDArray[np.int16],
    label: NDArray[np.float32],
    tested: NDArray[np.int16],
    config: DownstreamConfig,
    seed: int,
) -> NDArray[np.float64]:
    """Trains a fresh SE-ResNet-18 on crops and their labels (0 to 1); the scores of other crops."""
    device = "cuda" if config.use_gpu else "cpu"
    network = se_resnet18(config.width).to(device)
    images, target = _images(crops), torch.from_numpy(label)

    def loss_of(rows: NDArray[np.int64]) -> Tensor:
        guess = network(images[rows].to(device))[:, 0]
        return functional.binary_cross_entropy_with_logits(guess, target[rows].to(device))

    fit(network, len(crops), loss_of, config, config.batch_size, seed)
    with torch.inference_mode():
        parts = [
            network(_images(tested[start:][:TESTED_BATCH]).to(device)).cpu()
            for start in range(0, len(tested), TESTED_BATCH)
        ]
    return torch.cat(parts)[:, 0].double().sigmoid().numpy()


def _images(crops: NDArray[np.int16]) -> Tensor:
    return torch.from_numpy(normalize(crops, LUNG_WINDOW_HU))[:, None]  # (n, 1, y, x)
