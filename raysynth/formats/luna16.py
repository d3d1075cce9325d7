"""LUNA16: nodules from the table of centres and diameters, masks by the published rule."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Label, Nodule
from raysynth.errors import InputError, UnreadableCase
from raysynth.volume import Triple, Volume

COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
MAX_DIAMETER_MM = 100.0
WINDOW_HU = (-1000, 400)
"""Intensities are told apart in this window (Zhao & Hou)."""

MIN_CONTRAST_HU = 100.0
"""Two kinds of voxel closer together than this are one: the sphere itself is the nodule then."""

MAX_SHOWN = 100
"""Characters of a table's heading that a message quotes."""

LUNG_VALUES, TRACHEA_VALUE = (3, 4), 5
"""Values of the challenge's lung segmentations."""


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        centre_mm: LPS position (z, y, x).
        diameter_mm: of the nodule.
    """

    centre_mm: Triple
    diameter_mm: float


def read_annotations(path: Path) -> Mapping[str, tuple[Finding, ...]]:
    """The table's findings by SeriesInstanceUID.

    Raises:
        InputError: no such file, or not the challenge's `annotations.csv`.
    """
    findings: dict[str, list[Finding]] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                named = ", ".join(rows.fieldnames or ()) or "none"
                shown = "".join(filter(str.isprintable, named))[:MAX_SHOWN]
                raise InputError(
                    f"{path} has the columns {shown}: give LUNA16's annotations.csv "
                    f"({', '.join(COLUMNS)})"
                )
            for row in rows:
                findings[row["seriesuid"]].append(_finding(row, f"{path}, line {rows.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    return {uid: tuple(rows) for uid, rows in findings.items()}


def nodule_of(
    finding: Finding, volume: Volume, rule: Literal["sphere", "two_means"] = "two_means"
) -> Nodule:
    """The nodule of one finding on a volume's grid.

    Args:
        finding: centre and diameter.
        volume: HU.
        rule: `sphere`: every voxel whose centre lies in the sphere. `two_means`: of those, what is
            brighter than the mean of the two centres of k-means with k = 2 (Zhao & Hou 2023).

    Raises:
        UnreadableCase: the sphere lies outside the volume.
    """
    centre = volume.index_of(finding.centre_mm)
    reach = finding.diameter_mm / 2 / np.array(volume.spacing_mm)
    start = np.maximum(np.ceil(centre - reach), 0).astype(int)
    stop = np.minimum(np.floor(centre + reach) + 1, volume.shape).astype(int)
    nearest = np.rint(centre).astype(int)
    if (nearest < 0).any() or (nearest >= volume.shape).any():
        raise UnreadableCase(
            "annotations-misfit",
            f"a finding lies at voxel {tuple(nearest.tolist())}, outside the {volume.shape} that "
            "were read: is the table of these series?",
        )
    start, stop = np.minimum(start, nearest), np.maximum(stop, nearest + 1)
    axes = [
        (np.arange(a, b) - c) * spacing
        for a, b, c, spacing in zip(start, stop, centre, volume.spacing_mm, strict=True)
    ]
    z, y, x = np.ix_(*axes)
    mask = z**2 + y**2 + x**2 <= (finding.diameter_mm / 2) ** 2
    mask[tuple(nearest - start)] = True  # a nodule smaller than a voxel
    if rule == "two_means":
        part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        mask = _brighter(volume.hu[part], mask)
    kept = np.argwhere(mask)
    low, high = kept.min(axis=0), kept.max(axis=0) + 1
    tight = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    middle, corner = kept.mean(axis=0) + start, low + start
    return Nodule(
        centre_zyx=(float(middle[0]), float(middle[1]), float(middle[2])),
        corner_zyx=(int(corner[0]), int(corner[1]), int(corner[2])),
        mask=tight,
        diameter_mm=finding.diameter_mm,
        ratings=(),
    )


def two_means(values: NDArray[np.number]) -> tuple[float, float]:
    """The two centres of k-means with k = 2 of numbers (n,), the best there are: n at least 1.

    In one dimension the best clusters are the two sides of a cut of the sorted values.
    """
    ordered = np.sort(values.astype(np.float64))
    count = np.arange(1, len(ordered))
    if not len(count):
        return float(ordered[0]), float(ordered[0])
    sums = np.cumsum(ordered)
    below, above = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(ordered) - count)
    # Least scatter within is most between.
    cut = int(np.argmax(count * (len(ordered) - count) * (above - below) ** 2))
    return float(below[cut]), float(above[cut])


def anatomy_of(labels: NDArray[np.integer], volume: Volume) -> NDArray[np.uint8]:
    """`Label`s of a lung segmentation of the challenge (z, y, x); 0 where it says nothing.

    Which of its values is the left lung differs: the sides are taken from where they lie.
    """
    layout = np.zeros(labels.shape, np.uint8)
    layout[labels == TRACHEA_VALUE] = Label.TRACHEA
    sides = {}
    for value in LUNG_VALUES:
        columns = np.flatnonzero((labels == value).any(axis=(0, 1)))
        if len(columns):
            counts = (labels == value).sum(axis=(0, 1))[columns]
            sides[value] = float(np.average(columns, weights=counts)) * volume.direction[2, 2]
    middle = (
        sum(sides.values()) / 2
        if len(sides) == 2
        else (volume.shape[2] - 1) / 2 * volume.direction[2, 2]
    )
    for value, side in sides.items():
        layout[labels == value] = Label.LEFT_LUNG if side > middle else Label.RIGHT_LUNG
    return layout


def _finding(row: Mapping[str, str], where: str) -> Finding:
    try:
        x, y, z, diameter_mm = (float(row[name]) for name in COLUMNS[1:])
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: a coordinate or diameter is no number") from error
    if not (math.isfinite(x + y + z) and 0 < diameter_mm <= MAX_DIAMETER_MM):
        raise InputError(f"{where}: a nodule of {diameter_mm:g} mm at ({x:g}, {y:g}, {z:g}) mm")
    return Finding((z, y, x), diameter_mm)


def _brighter(hu: NDArray[np.int16], sphere: NDArray[np.bool_]) -> NDArray[np.bool_]:
    values = np.clip(hu, *WINDOW_HU)
    darker, brighter = two_means(values[sphere])
    if brighter - darker < MIN_CONTRAST_HU:
        return sphere
    return sphere & (values > (darker + brighter) / 2)
