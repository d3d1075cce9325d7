"""What networks said of test samples, as tables, and the figures of such tables.

Every row of a table has a weight: how often its patient was drawn. With weights of 1 a figure is
the plain one; other weights make its bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.sampling.cohort import DIAMETERS

Table = dict[str, NDArray[Any]]
"""Columns of equal length, by name."""

Weights = NDArray[np.float64]

DETECTION_IOUS = (0.5, 0.6, 0.7)


def join(tables: Sequence[Table]) -> Table:
    """The rows of several tables."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def classification_figures(table: Table, weight: Weights) -> dict[str, float]:
    """Accuracy, precision, recall, specificity and F1 at a score of one half, and the AUC.

    Args:
        table: columns `score` and `label`.
        weight: of its rows.
    """
    said, true = table["score"] >= 0.5, table["label"] > 0.5
    hit, miss = weight[said & true].sum(), weight[~said & true].sum()
    alarm, passed = weight[said & ~true].sum(), weight[~said & ~true].sum()
    return {
        "accuracy": _share(hit + passed, weight.sum(), np.nan),
        "precision": _share(hit, hit + alarm) if hit + miss else np.nan,
        "recall": _share(hit, hit + miss, np.nan),
        "specificity": _share(passed, alarm + passed, np.nan),
        "f1": _share(2 * hit, 2 * hit + alarm + miss) if hit + miss else np.nan,
        "auc": area_under_roc(table["score"], true, weight),
    }


def area_under_roc(score: NDArray[np.floating], label: NDArray[np.bool_], weight: Weights) -> float:
    """The probability that a positive sample has the higher score; ties count half."""
    _, place = np.unique(score, return_inverse=True)
    positive = np.bincount(place, weight * label)
    negative = np.bincount(place, weight * ~label)
    below = np.cumsum(negative) - negative
    pairs = positive.sum() * negative.sum()
    return _share(float((positive * (below + negative / 2)).sum()), pairs, np.nan)


def localisation_figures(table: Table, weight: Weights) -> dict[str, float]:
    """AP at an IoU of .5 and .6, and recall at .5, .6 and .7 among up to 100 boxes a slice.

    Args:
        table: columns `score`, NaN in rows of true boxes, and `hit` (rows, 3): whether a box found
            a true one that no better box had found, or a true box was found, at each IoU.
        weight: of its rows.
    """
    drawn = np.isfinite(table["score"])
    score, found, of_drawn = table["score"][drawn], table["hit"][drawn], weight[drawn]
    true, of_true = table["hit"][~drawn], weight[~drawn]
    figures = {
        f"ap{iou * 100:.0f}": average_precision(score, found[:, k], of_drawn, of_true.sum())
        for k, iou in enumerate(DETECTION_IOUS[:2])
    }
    for k, iou in enumerate(DETECTION_IOUS):
        recalled = float((of_true * true[:, k]).sum())
        figures[f"ar{iou * 100:.0f}"] = _share(recalled, of_true.sum(), np.nan)
    return figures


def average_precision(
    score: NDArray[np.floating], hit: NDArray[np.bool_], weight: Weights, num_true: float
) -> float:
    """The area under precision over recall; precision is the best at that recall or a higher one.

    Args:
        score: of all drawn boxes.
        hit: whether a box found a true one.
        weight: of the boxes.
        num_true: (weighted) number of true boxes.
    """
    if not num_true:
        return np.nan
    order = np.argsort(-score, kind="stable")
    right, drawn = np.cumsum((weight * hit)[order]), np.cumsum(weight[order])
    precision = np.divide(right, drawn, out=np.zeros_like(right), where=drawn > 0)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(right / num_true, prepend=0.0)
    return float((steps * best).sum())


def segmentation_figures(table: Table, weight: Weights) -> dict[str, float]:
    """Mean Dice of patients, and the share of lesions found.

    Of volumes also sensitivity and specificity of voxels, means of patients as well, and the mean
    Dice of lesions; lesions besides by classes of their diameter, NaN where there are none.

    Args:
        table: columns `patient` (by number), `both`, `drawn`, `true` (pixels of a sample),
            `lesions` and `found` (numbers in a sample). Of volumes also `voxels` (of a sample) and,
            by `DIAMETERS` (n, 4), numbers `lesions_by_size` and `found_by_size`, and
            `dice_by_size`, the sum over the lesions.
        weight: of its rows; the rows of a patient have the same.
    """
    case = table["patient"]
    both, drawn, true = (np.bincount(case, table[name]) for name in ("both", "drawn", "true"))
    rows = np.bincount(case)
    of_case = np.divide(np.bincount(case, weight), rows, out=np.zeros(len(rows)), where=rows > 0)

    def mean(part: NDArray[Any], whole: NDArray[Any], judged: NDArray[np.bool_]) -> float:
        of_judged = of_case[judged]
        total = float((of_judged * (part[judged] / whole[judged])).sum())
        return _share(total, of_judged.sum(), np.nan)

    lesions, found = ((weight * table[name]).sum() for name in ("lesions", "found"))
    figures = {
        "dice": mean(2 * both, drawn + true, true > 0),
        "lesion_sensitivity": _share(found, lesions, np.nan),
    }
    if "voxels" not in table:
        return figures
    others = np.bincount(case, table["voxels"]) - true
    by_size = {name: weight @ table[f"{name}_by_size"] for name in ("lesions", "found", "dice")}
    figures |= {
        "lesion_dice": _share(by_size["dice"].sum(), lesions, np.nan),
        "voxel_sensitivity": mean(both, true, true > 0),
        "voxel_specificity": mean(others - drawn + both, others, others > 0),
    }
    for figure, name in (("lesion_dice", "dice"), ("lesion_sensitivity", "found")):
        for size, part, whole in zip(DIAMETERS, by_size[name], by_size["lesions"], strict=True):
            figures[f"{figure}_{size}"] = _share(part, whole, np.nan)
    return figures


def _share(part: float, whole: float, otherwise: float = 0.0) -> float:
    return float(part / whole) if whole > 0 else otherwise
