"""The nodule's pixels on whole slices, by a small U-Net."""

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
from raysynth.layout.morphology import Mask
from raysynth.models.monai import UNet
from raysynth.window import LUNG_WINDOW_HU, normalize

MIN_IOU = 0.1
"""From here on a lesion counts as found."""

TESTED_BATCH = 16
DOWNSAMPLING = 8


def learn_masks(train: Examples, test: Examples, config: DownstreamConfig, seed: int) -> Table:
    """Trains on slices and the nodule of their layouts, and draws masks on the test slices.

    Returns:
        Columns `row` (of `test`) and those that `tables.segmentation_figures` wants.
    """
    device = "cuda" if config.use_gpu else "cpu"
    network = unet(config.width).to(device)

    def loss_of(rows: NDArray[np.int64]) -> Tensor:
        truth = torch.from_numpy((train.layout[rows] == Label.NODULE).astype(np.float32))
        return overlap_loss(_drawn(network, train.hu[rows], device), truth[:, None].to(device))

    fit(network, len(train), loss_of, config, config.batch_size, seed)
    masks = np.zeros(test.layout.shape, bool)
    for start in range(0, len(test), TESTED_BATCH):
        rows = slice(start, start + TESTED_BATCH)
        with torch.inference_mode():
            masks[rows] = (_drawn(network, test.hu[rows], device)[:, 0] > 0).cpu().numpy()
    true = test.layout == Label.NODULE
    lesions = np.array([lesions_found(*pair) for pair in zip(masks, true, strict=True)])
    return {
        "row": np.arange(len(test)),
        "both": (masks & true).sum(axis=(1, 2)),
        "drawn": masks.sum(axis=(1, 2)),
        "true": true.sum(axis=(1, 2)),
        "lesions": lesions[:, 0],
        "found": lesions[:, 1],
    }


def lesions_found(drawn: Mask, true: Mask) -> tuple[int, int]:
    """Lesions of a slice, and how many are found.

    A lesion is held against all drawn parts that touch it; it is found from an IoU of .1 on.
    """
    lesions, count = ndimage.label(true, np.ones((3, 3)))
    parts, _ = ndimage.label(drawn, np.ones((3, 3)))
    found = 0
    for number in range(1, count + 1):
        lesion = lesions == number
        touching = np.unique(parts[lesion & drawn])
        mask = np.isin(parts, touching) & drawn
        found += bool((mask & lesion).sum() >= MIN_IOU * (mask | lesion).sum())
    return count, found


def overlap_loss(guess: Tensor, truth: Tensor) -> Tensor:
    """1 - Dice of a whole batch, as many slices show no nodule, and the cross-entropy."""
    share = guess.sigmoid()
    dice = (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)
    return 1 - dice + functional.binary_cross_entropy_with_logits(guess, truth)


def unet(width: int) -> UNet:
    """One logit a pixel of images (B, 1, H, W)."""
    w = max(8, width // 2)
    return UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(w, 2 * w, 4 * w, 8 * w),
        strides=(2, 2, 2),
        num_res_units=2,
    )


def _drawn(network: UNet, hu: NDArray[np.int16], device: str) -> Tensor:
    """Logits (B, 1, H, W) of slices; their sides need not be multiples of the U-Net's."""
    height, width = hu.shape[1:]
    images = torch.from_numpy(normalize(hu, LUNG_WINDOW_HU))[:, None]
    air = (0, -width % DOWNSAMPLING, 0, -height % DOWNSAMPLING)
    logits: Tensor = network(functional.pad(images, air, value=-1.0).to(device))
    return logits[:, :, :height, :width]
