"""Label maps that somebody else drew: their values translated, their nodules taken one by one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import Label, Nodule
from raysynth.errors import UnreadableCase
from raysynth.volume import Volume

MAX_SHOWN = 8
"""Values of a label map that a message names."""


def translate(
    labels: NDArray[np.integer], class_map: Mapping[int, str], volume: Volume
) -> NDArray[np.uint8]:
    """Somebody's label map as `Label`s.

    Args:
        labels: any values (z, y, x).
        class_map: value -> name of a `Label` in small letters, `lung` (either one) or `ignore`.
        volume: on the same grid; its geometry tells left from right.

    Raises:
        UnreadableCase: a value is not in the map (`unknown-label`).
    """
    values = np.unique(labels)
    unknown = [int(value) for value in values if value and int(value) not in class_map]
    if unknown:
        shown = ", ".join(map(str, unknown[:MAX_SHOWN])) + (", ..." * (len(unknown) > MAX_SHOWN))
        raise UnreadableCase(
            "unknown-label",
            f"the label map has values {shown} that data.source.class_map does not name: say what "
            "they mean, or `ignore`",
        )
    result, lung = np.zeros(labels.shape, np.uint8), np.zeros(labels.shape, bool)
    for value in values[values != 0].tolist():
        name, there = class_map[value], labels == value
        if name == "lung":
            lung |= there
        elif name != "ignore":
            result[there] = Label[name.upper()]
    result[lung] = _sides(lung, volume)[lung]
    return result


def nodules_of(layout: NDArray[np.uint8], volume: Volume) -> tuple[Nodule, ...]:
    """Every connected part of label 5 as a nodule without ratings.

    Its diameter is that of the disc with the area of its largest axial section.
    """
    parts, _ = ndimage.label(layout == Label.NODULE, structure=np.ones((3, 3, 3)))
    pixel_mm2 = volume.spacing_mm[1] * volume.spacing_mm[2]
    nodules = []
    for number, box in enumerate(ndimage.find_objects(parts), 1):
        mask = parts[box] == number
        z, y, x = np.argwhere(mask).mean(axis=0) + [part.start for part in box]
        area_mm2 = float(mask.sum(axis=(1, 2)).max()) * pixel_mm2
        nodules.append(
            Nodule(
                centre_zyx=(float(z), float(y), float(x)),
                corner_zyx=(box[0].start, box[1].start, box[2].start),
                mask=mask,
                diameter_mm=2 * float(np.sqrt(area_mm2 / np.pi)),
                ratings=(),
            )
        )
    return tuple(nodules)


def _sides(lung: NDArray[np.bool_], volume: Volume) -> NDArray[np.uint8]:
    """Left or right for every voxel: by the part it belongs to, or by the middle of one part."""
    towards_left = np.sign(volume.direction[2, 2])
    columns = np.arange(lung.shape[2]) * towards_left
    weights = lung.sum(axis=(0, 1))
    middle = (lung.shape[2] - 1) / 2 * towards_left
    share = weights[columns > middle].sum() / max(weights.sum(), 1)
    if not _one_sided(
        share
    ):  # both lungs: their own middle, for the patient may lie off the scan's
        middle = np.average(columns, weights=weights)
    by_column = np.where(columns > middle, Label.LEFT_LUNG, Label.RIGHT_LUNG).astype(np.uint8)
    by_voxel = np.broadcast_to(by_column, lung.shape)
    parts, count = ndimage.label(lung)
    shares = ndimage.mean(by_voxel == Label.LEFT_LUNG, parts, np.arange(count + 1))
    side = np.where(shares > 0.5, Label.LEFT_LUNG, Label.RIGHT_LUNG).astype(np.uint8)
    # A part that lies on both sides is two lungs that touch.
    return np.where(_one_sided(shares)[parts], side[parts], by_voxel)


def _one_sided(left_share: NDArray[np.floating]) -> NDArray[np.bool_]:
    return np.abs(left_share - 0.5) >= 0.4
