"""Boxes around nodules on whole slices, by Faster R-CNN with a feature pyramid."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou

from raysynth.case import Label
from raysynth.config.downstream import DownstreamConfig
from raysynth.evaluation.downstream.examples import Examples
from raysynth.evaluation.downstream.fit import fit
from raysynth.evaluation.downstream.networks import MAX_BOXES, faster_rcnn
from raysynth.evaluation.downstream.tables import DETECTION_IOUS, Table
from raysynth.layout.compose import square_box
from raysynth.preprocess.slices import MIN_BOX_PX
from raysynth.window import LUNG_WINDOW_HU, normalize

TESTED_BATCH = 8


def learn_boxes(train: Examples, test: Examples, config: DownstreamConfig, seed: int) -> Table:
    """Trains on slices and their boxes, and draws boxes on the test slices.

    Returns:
        Columns `row` (of `test`), `score` and `hit`, as `tables.localisation_figures` wants them.
    """
    device = "cuda" if config.use_gpu else "cpu"
    network = faster_rcnn(config).to(device)
    targets = [
        _target(boxes_of(one, box)) for one, box in zip(train.layout, train.box, strict=True)
    ]

    def loss_of(rows: NDArray[np.int64]) -> Tensor:
        losses = network(
            [image.to(device) for image in _images(train.hu[rows])],
            [{name: part.to(device) for name, part in targets[row].items()} for row in rows],
        )
        total: Tensor = sum(losses.values(), torch.zeros((), device=device))
        return total

    fit(network, len(train), loss_of, config, config.detection_batch_size, seed)
    tables = []
    for start in range(0, len(test), TESTED_BATCH):
        with torch.inference_mode():
            drawn = network([one.to(device) for one in _images(test.hu[start:][:TESTED_BATCH])])
        for row, found in enumerate(drawn, start):
            true = boxes_of(test.layout[row], test.box[row])
            boxes, score = found["boxes"].cpu().numpy(), found["scores"].cpu().numpy()
            tables.append({"row": row, "true": true, "boxes": boxes, "score": score})
    parts = [match(one["boxes"], one["score"], one["true"]) for one in tables]
    rows = np.repeat([one["row"] for one in tables], [len(score) for score, _ in parts])
    return {
        "row": rows.astype(np.int64),
        "score": np.concatenate([score for score, _ in parts]),
        "hit": np.concatenate([hit for _, hit in parts]),
    }


def match(
    boxes: NDArray[np.floating], score: NDArray[np.floating], true: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Which boxes of a slice find which true ones: the best box first, each true box once.

    Returns:
        Scores (drawn + true,), NaN for true boxes, and hits (drawn + true, IoUs).
    """
    order = np.argsort(-score, kind="stable")[:MAX_BOXES]
    overlap = box_iou(
        torch.from_numpy(boxes[order]).double(), torch.from_numpy(true).double()
    ).numpy()
    found = np.zeros((len(order), len(DETECTION_IOUS)), bool)
    taken = np.zeros((len(true), len(DETECTION_IOUS)), bool)
    for k, least in enumerate(DETECTION_IOUS):
        for row in range(len(order)) if len(true) else ():
            free = np.where(taken[:, k], -1.0, overlap[row])
            best = int(free.argmax())
            if free[best] >= least:
                found[row, k] = taken[best, k] = True
    scores = np.concatenate([score[order], np.full(len(true), np.nan)])
    return scores, np.concatenate([found, taken])


def boxes_of(layout: NDArray[np.uint8], box: NDArray[np.int16]) -> NDArray[np.float64]:
    """Squares (x0, y0, x1, y1) around all nodules of a layout.

    The slice's own box counts as well where the layout shows nothing in it, as some models are
    asked by the box alone.
    """
    mask = layout == Label.NODULE
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    squares = [square_box(parts == part, min_side=MIN_BOX_PX) for part in range(1, count + 1)]
    y0, x0, y1, x1 = (int(edge) for edge in box)
    if y0 >= 0 and not mask[y0:y1, x0:x1].any():
        squares.append((y0, x0, y1, x1))
    return np.array(squares, np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]


def _images(hu: NDArray[np.int16]) -> list[Tensor]:
    grey = torch.from_numpy(normalize(hu, LUNG_WINDOW_HU))
    return list(grey[:, None].expand(-1, 3, -1, -1))


def _target(boxes: NDArray[np.float64]) -> dict[str, Tensor]:
    return {
        "boxes": torch.from_numpy(boxes).float(),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
    }
