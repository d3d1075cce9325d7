"""Volumes in a report: which places of which samples are shown, and beside what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Label
from raysynth.condition import Box
from raysynth.config.model import Window
from raysynth.evaluation.regions import nodule_boxes
from raysynth.layout.morphology import bounding_box
from raysynth.report.html import Scroll, Tile
from raysynth.report.pictures import PLANES, beside, plane_boxes, planes, three_planes
from raysynth.sampling.adherence import within
from raysynth.store.reader import SampleSet
from raysynth.volume import AIR_HU
from storage_schema.v1 import SPLITS

NUM_SCROLLS = 3
NUM_COMPARED = 2
"""Samples of each; the first of a run, nobody chose them."""

SPAN_HU = 500
"""A difference as large as that is white or black."""

SHOWN_HU = {
    Label.LEFT_LUNG: -850,
    Label.RIGHT_LUNG: -850,
    Label.BODY: 40,
    Label.NODULE: 300,
}
"""As what labels are drawn where a layout is a picture of its own; all others are air."""

Voxel = tuple[int, int, int]


def middle_of(layout: NDArray[np.uint8], box: Box | None) -> Voxel:
    """Where to look at a volume: the middle of its nodule; else of its lungs; else its own.

    Args:
        layout: labels (z, y, x).
        box: of the nodule asked for; None: the layout's largest one.
    """
    if box is None:
        (cube,) = nodule_boxes(layout[None]).tolist()
        box = tuple(cube) if cube[0] >= 0 else None
    if box is not None:
        parts = within(box)
    else:
        lungs = np.isin(layout, LUNG_LABELS)
        parts = bounding_box(lungs if lungs.any() else np.ones(layout.shape, bool))
    z, y, x = ((part.start + part.stop) // 2 for part in parts)
    return z, y, x


def planes_tile(
    hu: NDArray[np.int16], layout: NDArray[np.uint8], box: Box | None, caption: str
) -> Tile:
    """Axial, coronal and sagittal plane through the middle of what was asked for, side by side."""
    at = middle_of(layout, box)
    boxes = beside(plane_boxes(box, hu.shape), hu.shape) if box else ()
    return Tile(three_planes(hu, at, AIR_HU), three_planes(layout, at), boxes, caption)


def scrolls(real: SampleSet, synthetic: SampleSet, reference: str) -> list[Scroll]:
    """Animations of synthetic volumes, each beside a real one: its host, if it has a held-out one.

    Args:
        real: the sample set.
        synthetic: the run.
        reference: `real`, or `phantom`.
    """
    held_out = np.flatnonzero(real.index["split"] == SPLITS.index("test"))
    pairs = []
    for number in range(min(NUM_SCROLLS, synthetic.count)):
        host = int(synthetic.index["source_sample"][number])
        is_shown = host in held_out
        row = host if is_shown else int(held_out[number % len(held_out)])
        said = "the patient who lent the layout" if is_shown else "another held-out patient"
        caption = f"left: {reference}, {said}; right: synthetic"
        volumes = {reference: _one(real, "hu", row), "synthetic": _one(synthetic, "hu", number)}
        pairs.append(Scroll(volumes, caption))
    return pairs


def compared_tiles(
    real: SampleSet, synthetic: SampleSet, reference: str, window_hu: Window
) -> list[Sequence[Tile]]:
    """Host, layout, sample and difference of the first samples, a row for each of the `PLANES`."""
    rows: list[Sequence[Tile]] = []
    for number in range(min(NUM_COMPARED, synthetic.count)):
        host = _one(real, "hu", int(synthetic.index["source_sample"][number]))
        sample, layout = (_one(synthetic, name, number) for name in ("hu", "layout"))
        box = tuple(synthetic.index["box"][number].tolist())
        rows += compared_rows(
            host, layout, sample, box if box[0] >= 0 else None, reference, window_hu
        )
    return rows


def compared_rows(
    host: NDArray[np.int16],
    layout: NDArray[np.uint8],
    sample: NDArray[np.int16],
    box: Box | None,
    reference: str,
    window_hu: Window,
) -> list[Sequence[Tile]]:
    """One sample beside its host, a row for each of the `PLANES`.

    Args:
        host: HU (z, y, x) of the patient who lent the layout.
        layout: that was asked for.
        sample: HU of what was made of it.
        box: of the nodule asked for.
        reference: what the host is: `real`, or `phantom`.
        window_hu: in which tiles are shown; differences are laid on it.
    """
    at, (low, high) = middle_of(layout, box), window_hu
    share = 0.5 + (sample.astype(np.float64) - host) / (2 * SPAN_HU)
    difference = np.rint(low + share.clip(0, 1) * (high - low)).astype(np.int16)
    drawn = np.full(layout.shape, AIR_HU, np.int16)
    for label, hu in SHOWN_HU.items():
        drawn[layout == label] = hu
    images = (planes(one, at) for one in (host, drawn, sample, difference))
    boxes = [[one] for one in plane_boxes(box, layout.shape)] if box else [[]] * len(PLANES)
    rows: list[Sequence[Tile]] = []
    for plane, outline, asked, *of_plane in zip(
        PLANES, planes(layout, at), boxes, *images, strict=True
    ):
        captions = (
            f"{reference} host, {plane}",
            "layout asked for",
            "synthetic",
            f"synthetic less {reference}, ±{SPAN_HU} HU",
        )
        rows.append(
            [
                Tile(hu, outline if number != 3 else None, asked, caption)
                for number, (hu, caption) in enumerate(zip(of_plane, captions, strict=True))
            ]
        )
    return rows


def _one(samples: SampleSet, name: str, row: int) -> NDArray[Any]:
    array: NDArray[Any] = samples.read(name, row, row + 1)[0]
    return array
