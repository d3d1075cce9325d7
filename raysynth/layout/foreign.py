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
    result = np.zeros(labels.shape, np.uint8)
    for value in values[values != 0].tolist():
        name, there = class_map[value], labels == value
        if name == "lung":
            result[there] = _sides(there, volume)[there]
        elif name != "ignore":
            result[there] = Label[name.upper()]
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
    middle = float(np.average(columns, weights=np.maximum(lung.sum(axis=(0, 1)), 1e-9)))
    parts, count = ndimage.label(lung)
    sides = np.where(columns > middle, Label.LEFT_LUNG, Label.RIGHT_LUNG).astype(np.uint8)
    by_column = np.broadcast_to(sides, lung.shape)
    left = ndimage.sum_labels(by_column == Label.LEFT_LUNG, parts, np.arange(count + 1))
    size = np.bincount(parts.ravel(), minlength=count + 1)
    share = left / np.maximum(size, 1)
    side = np.where(share > 0.5, Label.LEFT_LUNG, Label.RIGHT_LUNG).astype(np.uint8)
    # A part that lies on both sides is two lungs that touch.
    both = (share > 0.1) & (share < 0.9)
    return np.where(both[parts], by_column, side[parts]).astype(np.uint8)
