"""Benign and malignant nodules: what labels may be had for synthetic ones, and from where.

No run asks for malignancy, so no synthetic nodule has any. What a synthetic one would be called is
read off the five scores it was asked for, and its size, by a logistic regression that real nodules
of the fold's training patients have taught. Its probability is the label: it knows no more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysynth.config.downstream import DownstreamConfig
from raysynth.errors import InputError
from raysynth.evaluation.downstream.arms import MIDDLE
from raysynth.evaluation.downstream.classification import crop_size, learn_crops
from raysynth.evaluation.downstream.examples import Examples
from raysynth.evaluation.downstream.tables import Table
from raysynth.evaluation.regions import cut_crops

RIDGE, NUM_STEPS = 1.0, 25


def learn_malignancy(train: Examples, test: Examples, config: DownstreamConfig, seed: int) -> Table:
    """Trains on nodule crops, and says of the test crops how likely they are malignant.

    Returns:
        Columns `row` (of `test`), `score` and `label`.
    """
    size = crop_size(train)
    train_crops, test_crops = (cut_crops(one.hu, one.box, size) for one in (train, test))
    score = learn_crops(train_crops, labels_of(train), test_crops, config, seed)
    truth = (test.malignancy > MIDDLE).astype(np.float32)
    return {"row": np.arange(len(test)), "score": score, "label": truth}


def labels_of(train: Examples) -> NDArray[np.float32]:
    """1 for malignant, 0 for benign; of synthetic nodules, the regression's probability.

    Raises:
        InputError: the real nodules that have scores are all of one kind.
    """
    rated = np.isfinite(train.malignancy)
    label = (train.malignancy > MIDDLE).astype(np.float32)
    if not rated.all():
        told = np.isfinite(train.scores).all(axis=1)
        known = rated & told
        features = np.column_stack([train.scores, np.log(train.side)])
        if len(np.unique(label[known])) < 2:
            raise InputError(
                "downstream.tasks malignancy: too few real nodules have all scores to label "
                "synthetic ones by; leave the task out"
            )
        label[~rated] = logistic(features[known], label[known], features[~rated])
    return label


def logistic(
    features: NDArray[np.floating], label: NDArray[np.floating], others: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Probabilities of `others` by a ridge logistic regression, fitted by Newton's steps."""
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, seen = (
        np.column_stack([np.ones(len(part)), (part - mean) / scale]).astype(np.float64)
        for part in (features, others)
    )
    penalty = RIDGE * np.eye(x.shape[1])
    penalty[0, 0] = 1e-6  # the offset is free
    weights = np.zeros(x.shape[1])
    for _ in range(NUM_STEPS):
        p = _sigmoid(x @ weights)
        gradient = x.T @ (label - p) - penalty @ weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x + penalty
        weights += np.linalg.solve(curvature, gradient)
    return _sigmoid(seen @ weights)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    probability: NDArray[np.float64] = 1 / (1 + np.exp(-logits.clip(-30, 30)))
    return probability
