"""The nodule's pixels on whole slices, or its voxels in volumes, by a small U-Net."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from raysynth.case import Label
from raysynth.config.downstream import DownstreamConfig
from raysynth.evaluation.downstream.examples import Examples
from raysynth.evaluation.downstream.fit import fit
from raysynth.evaluation.downstream.tables import Table
from raysynth.evaluation.downstream.volumes import PATCH, Volumes
from raysynth.layout.morphology import Mask
from raysynth.models.monai import UNet, sliding_window_inference
from raysynth.sampling.cohort import DIAMETER_EDGES_MM, DIAMETERS
from raysynth.seeding import seed_of
from raysynth.window import LUNG_WINDOW_HU, normalize

MIN_IOU = 0.1
"""From here on a lesion counts as found."""

TESTED_BATCH = 16
DOWNSAMPLING = 8
MIN_SIDE = 2 * DOWNSAMPLING
"""With less, the smallest level has one pixel, which has no variance to be normed by."""

WINDOWS = 8
"""Crops of a volume that are looked at together."""


def learn_masks(
    train: Examples | Volumes, test: Examples, config: DownstreamConfig, seed: int
) -> Table:
    """Trains on samples and the nodules of their layouts, and draws masks on the test samples.

    Args:
        train: whole slices, or volumes of which each step sees crops.
        test: slices or volumes, which are judged whole.
        config: of the trial.
        seed: of the order of samples, and of the crops.

    Returns:
        Columns `row` (of `test`) and those that `tables.segmentation_figures` wants.
    """
    device = "cuda" if config.use_gpu else "cpu"
    network = unet(config.width, test.spatial_dims).to(device)
    rng = np.random.default_rng(seed_of("crops", seed))

    def loss_of(rows: NDArray[np.int64]) -> Tensor:
        if isinstance(train, Volumes):
            hu, layout = train.crops(rows, rng)
        else:
            hu, layout = train.hu[rows], train.layout[rows]
        truth = torch.from_numpy((layout == Label.NODULE).astype(np.float32))
        return overlap_loss(_logits(network, _images(hu, device)), truth[:, None].to(device))

    fit(network, len(train), loss_of, config, config.batch_size, seed)
    masks = np.zeros(test.layout.shape, bool)
    for start in range(0, len(test), TESTED_BATCH):
        rows = slice(start, start + TESTED_BATCH)
        with torch.inference_mode():
            drawn = _logits_of_all(network, _images(test.hu[rows], device))
        masks[rows] = (drawn[:, 0] > 0).cpu().numpy()
    return compared(masks, test)


def compared(masks: Mask, test: Examples) -> Table:
    """Drawn masks beside the true ones, in the columns of `learn_masks`."""
    true = test.layout == Label.NODULE
    axes = tuple(range(1, true.ndim))
    lesions = np.array([lesions_found(*pair) for pair in zip(masks, true, strict=True)])
    table: Table = {
        "row": np.arange(len(test)),
        "both": (masks & true).sum(axis=axes),
        "drawn": masks.sum(axis=axes),
        "true": true.sum(axis=axes),
        "lesions": lesions[:, 0],
        "found": lesions[:, 1],
    }
    if test.spatial_dims == 2:  # a slice does not say how large a lesion is
        return table
    by_size = np.array(
        [lesions_by_size(*one) for one in zip(masks, true, test.pixel_mm, strict=True)]
    )
    names = ("lesions_by_size", "found_by_size", "dice_by_size")
    table |= {name: by_size[:, place] for place, name in enumerate(names)}
    return table | {"voxels": np.full(len(test), true[0].size)}


def lesions_found(drawn: Mask, true: Mask) -> tuple[int, int]:
    """Lesions of a sample, and how many are found.

    A lesion is held against all drawn parts that touch it; it is found from an IoU of .1 on.
    """
    lesion, touching, both = overlaps(drawn, true)
    return len(lesion), int(_found(lesion, touching, both).sum())


def lesions_by_size(drawn: Mask, true: Mask, pixel_mm: float) -> NDArray[np.float64]:
    """Lesions of a volume by their diameter, that of the ball of the same volume.

    Returns:
        Numbers of lesions and of those found, and the sum of their Dice, (3, classes), in the order
        of `raysynth.sampling.cohort.DIAMETERS`.
    """
    lesion, touching, both = overlaps(drawn, true)
    diameter_mm = np.cbrt(6 / np.pi * lesion) * pixel_mm
    classes = np.digitize(diameter_mm, DIAMETER_EDGES_MM)
    counted = np.ones(len(lesion)), _found(lesion, touching, both), 2 * both / (lesion + touching)
    return np.array([np.bincount(classes, one, len(DIAMETERS)) for one in counted])


def overlaps(
    drawn: Mask, true: Mask
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of each lesion, of all drawn parts that touch it, and of both."""
    structure = np.ones((3,) * true.ndim)
    lesions, num_lesions = ndimage.label(true, structure)
    parts, num_parts = ndimage.label(drawn, structure)
    pairs = np.bincount(
        (lesions.astype(np.int64) * (num_parts + 1) + parts).ravel(),
        minlength=(num_lesions + 1) * (num_parts + 1),
    ).reshape(num_lesions + 1, num_parts + 1)  # row and column 0 are what is none
    shared = pairs[1:, 1:]
    return pairs[1:].sum(axis=1), (shared > 0) @ pairs[:, 1:].sum(axis=0), shared.sum(axis=1)


def _found(
    lesion: NDArray[np.int64], touching: NDArray[np.int64], both: NDArray[np.int64]
) -> NDArray[np.bool_]:
    return both >= MIN_IOU * (lesion + touching - both)


def overlap_loss(guess: Tensor, truth: Tensor) -> Tensor:
    """1 - Dice of a whole batch, as many samples show no nodule, and the cross-entropy."""
    share = guess.sigmoid()
    dice = (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)
    return 1 - dice + functional.binary_cross_entropy_with_logits(guess, truth)


def unet(width: int, spatial_dims: int) -> UNet:
    """One logit a pixel of images (B, 1, H, W), or a voxel of (B, 1, D, H, W)."""
    w = max(8, width // 2)
    return UNet(
        spatial_dims=spatial_dims,
        in_channels=1,
        out_channels=1,
        channels=(w, 2 * w, 4 * w, 8 * w),
        strides=(2, 2, 2),
        num_res_units=2,
    )


def _images(hu: NDArray[np.int16], device: str) -> Tensor:
    return torch.from_numpy(normalize(hu, LUNG_WINDOW_HU))[:, None].to(device)  # (B, 1, ...)


def _logits(network: UNet, images: Tensor) -> Tensor:
    """Logits of images (B, 1, ...), whose sides need not be multiples of the U-Net's."""
    sides = images.shape[2:]
    missing = [max(MIN_SIDE - side, -side % DOWNSAMPLING) for side in sides]
    air = [edge for count in reversed(missing) for edge in (0, count)]
    logits: Tensor = network(functional.pad(images, air, value=-1.0))
    return logits[(slice(None), slice(None), *(slice(side) for side in sides))]


def _logits_of_all(network: UNet, images: Tensor) -> Tensor:
    """The same; of volumes larger than the crops that it learned from, crop by crop."""
    if images.ndim == 4 or max(images.shape[2:]) <= PATCH:
        return _logits(network, images)
    drawn = sliding_window_inference(
        images,
        roi_size=tuple(min(PATCH, side) for side in images.shape[2:]),
        sw_batch_size=WINDOWS,
        predictor=lambda crops: _logits(network, crops),
        overlap=0.5,
        mode="gaussian",
    )
    assert isinstance(drawn, Tensor)
    return drawn
