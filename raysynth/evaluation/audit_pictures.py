"""What an audit compares: nodule crops, whole slices, or what was made anew in holes.

A volume is compared by the mean of some axial planes through its nodule, or through its middle.
Whoever copies a volume copies these; and shifts of a plane or two hardly change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Label
from raysynth.config import ExperimentConfig, HoleFilling, LayoutGuided
from raysynth.evaluation.regions import SMALL_IMAGE, SOFT_TISSUE_HU, cut_crops
from raysynth.layout.holes import ORGANS, told_labels
from raysynth.layout.morphology import Mask
from raysynth.metrics.features import Extractor, load_extractor
from raysynth.metrics.memorization import SHIFT_PX, THUMB, Pictures, pictures_of
from raysynth.store.reader import SampleSet
from raysynth.window import LUNG_WINDOW_HU, measurable

Region = Literal["nodule", "slice", "generated"]
REGIONS: tuple[Region, ...] = ("nodule", "slice", "generated")

MAX_SIDE = {"slice": 64, "generated": 96}
"""Larger slices are made smaller by a whole factor first: copies are copies at any size."""

NUM_PLANES = 5
"""Of a volume that are averaged."""

EXTRACTOR = "ct-conv"


@dataclass(frozen=True)
class Look:
    """How samples are shown to the audit.

    Attributes:
        region: what of them.
        size: side of a compared picture, pixels.
        margin: around it, for shifts.
        factor: by which slices are made smaller first.
        window_hu: HU that are told apart.
        holes: of `generated`, the labels that one hole takes away; several kinds of holes.
    """

    region: Region
    size: int
    margin: int
    factor: int
    window_hu: tuple[float, float]
    holes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Items:
    """Pictures of some samples; a sample may give several or none.

    Attributes:
        rows: which of their set the samples are (n,).
        pictures: of them.
    """

    rows: NDArray[np.int64]
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Items:
        """Some of them."""
        return Items(self.rows[chosen], self.pictures.take(chosen))


def looks_of(config: ExperimentConfig, synthetic: SampleSet) -> list[Look]:
    """How the run's samples are compared: those with a box by nodule, others as whole slices."""
    side = min(synthetic.shape)
    model = config.model
    holes: tuple[tuple[int, ...], ...] = ()
    if isinstance(model, HoleFilling):
        holes = tuple(ORGANS[organ] for organ in model.organs)
    elif isinstance(model, LayoutGuided) and config.copies:
        holes = (tuple(told_labels(model.layout_labels)),)
    if holes:
        factor = max(1, -(-side // MAX_SIDE["generated"]))
        size = max(THUMB, side // factor // 2 // THUMB * THUMB)
        in_lung = {label for labels in holes for label in labels} <= {*LUNG_LABELS, Label.NODULE}
        window = LUNG_WINDOW_HU if in_lung else SOFT_TISSUE_HU
        if synthetic.attrs["intensity"] != "hu":
            window = LUNG_WINDOW_HU  # all grey values, see `measurable`
        return [Look("generated", size, SHIFT_PX, factor, window, holes)]
    looks = []
    boxed = synthetic.index["box"][:, 0] >= 0
    if boxed.any():
        # Two thirds of the size from which on evaluation shows 32: there is more to tell by.
        size = 32 if side >= SMALL_IMAGE * 2 // 3 else 16
        looks.append(Look("nodule", size, SHIFT_PX, 1, LUNG_WINDOW_HU))
    if not boxed.all():
        factor = max(1, side // MAX_SIDE["slice"])
        size = side // factor // THUMB * THUMB
        looks.append(Look("slice", size, 0, factor, LUNG_WINDOW_HU))
    return looks


def cut_synthetic(
    samples: SampleSet, start: int, stop: int, look: Look, hole: Mask | None = None
) -> Items:
    """Pictures of a run's rows.

    Args:
        samples: the run.
        start: first row.
        stop: the one after the last.
        look: how they are shown.
        hole: what was made in them (n, y, x); None: what their layouts show.
    """
    hu, box = _read(samples, start, stop, look)
    if look.region == "generated":
        if hole is None:
            hole = np.isin(_layouts(samples, start, stop), look.holes[0])
        shrunk = _shrunk(hole.astype(np.float32), look.factor) > 0.5
        places = hole_boxes(shrunk)
        mask = cut_crops(shrunk.astype(np.int16), places, look.size) == 1
        return _items(np.arange(start, stop), hu, places, look, flipped=True, mask=mask)
    boxed = box[:, 0] >= 0
    chosen = np.flatnonzero(boxed if look.region == "nodule" else ~boxed)
    return _items(start + chosen, hu[chosen], box[chosen], look, flipped=True)


def cut_real(
    samples: SampleSet,
    start: int,
    stop: int,
    look: Look,
    wanted: NDArray[np.bool_],
    flipped: bool,
) -> Items:
    """Pictures of a sample set's `wanted` rows (n,); of whole slices those with nodules, too."""
    hu, box = _read(samples, start, stop, look)
    rows = np.flatnonzero(wanted & ((box[:, 0] >= 0) | (look.region != "nodule")))
    places = box[rows]
    if look.region == "generated":
        layout = _layouts(samples, start, stop)
        found = [
            (row, hole_boxes(organ[None])[0])
            for row in rows
            for labels in look.holes
            if (organ := np.isin(layout[row], labels)).any()
        ]
        rows = np.array([row for row, _ in found], np.int64)
        places = np.array([place for _, place in found], np.int16).reshape(-1, 4) // look.factor
    return _items(start + rows, hu[rows], places, look, flipped=flipped)


def hole_boxes(holes: Mask) -> NDArray[np.int16]:
    """The boxes around what is true in each plane (n, 4); of an empty one, all of it."""
    boxes = np.empty((len(holes), 4), np.int16)
    for box, hole in zip(boxes, holes, strict=True):
        y, x = np.nonzero(hole) if hole.any() else np.nonzero(np.ones_like(hole))
        box[:] = y.min(), x.min(), y.max() + 1, x.max() + 1
    return boxes


def joined(parts: Sequence[Items]) -> Items | None:
    """All items of all parts; None if there are none."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return None
    pictures = [part.pictures for part in parts]
    features = [one.features for one in pictures if one.features is not None]
    masks = [one.mask for one in pictures if one.mask is not None]
    return Items(
        np.concatenate([part.rows for part in parts]),
        Pictures(
            np.concatenate([one.windows for one in pictures]),
            pictures[0].margin,
            np.concatenate(features, axis=1) if features else None,
            np.concatenate(masks) if masks else None,
        ),
    )


def with_masks_of(items: Items, others: Items, seed: int) -> Items:
    """Real pictures that are judged by what the holes of others show, at random."""
    if others.pictures.mask is None:
        return items
    chosen = np.random.default_rng(seed).integers(len(others), size=len(items))
    return Items(items.rows, replace(items.pictures, mask=others.pictures.mask[chosen]))


def _read(
    samples: SampleSet, start: int, stop: int, look: Look
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """HU of slices (n, y, x), or of planes of volumes, and boxes there (n, 4)."""
    hu = measurable(samples.read("hu", start, stop), samples.attrs["intensity"])
    box = samples.index["box"][start:stop]
    if hu.ndim == 4:
        around = [
            volume[max(0, z - NUM_PLANES // 2) : z + NUM_PLANES // 2 + 1].mean(axis=0)
            for volume, z in zip(hu, _heights(samples, start, stop), strict=True)
        ]
        hu, box = np.rint(np.stack(around)).astype(np.int16), box[:, (1, 2, 4, 5)]
    if look.factor > 1:
        hu = np.rint(_shrunk(hu, look.factor)).astype(np.int16)
    return hu, box


def _layouts(samples: SampleSet, start: int, stop: int) -> NDArray[np.uint8]:
    """Layouts of slices (n, y, x), or of the middle ones of volumes' planes."""
    layout: NDArray[np.uint8] = samples.read("layout", start, stop)
    if layout.ndim == 3:
        return layout
    return layout[np.arange(len(layout)), _heights(samples, start, stop)]


def _heights(samples: SampleSet, start: int, stop: int) -> NDArray[np.int64]:
    """The plane through the middle of each volume's box; without one, through its own (n,)."""
    box = samples.index["box"][start:stop].astype(np.int64)
    return np.where(box[:, 0] >= 0, (box[:, 0] + box[:, 3]) // 2, samples.shape[0] // 2)


def _items(
    rows: NDArray[np.int64],
    hu: NDArray[np.int16],
    places: NDArray[np.int16],
    look: Look,
    *,
    flipped: bool,
    mask: Mask | None = None,
) -> Items:
    if look.region == "slice":
        trimmed = [(side - look.size) // 2 for side in hu.shape[1:]]
        y, x = (slice(start, start + look.size) for start in trimmed)
        windows = hu[:, y, x]
    else:
        windows = cut_crops(hu, places, look.size + 2 * look.margin)
    # Features of a picture of which a part is not to be seen would mean nothing.
    extractor = None if look.region == "generated" else _extractor()
    return Items(rows, pictures_of(windows, look.margin, extractor, look.window_hu, mask, flipped))


def _shrunk(images: NDArray[Any], factor: int) -> NDArray[np.float32]:
    n, height, width = images.shape
    height, width = height // factor, width // factor
    even = images[:, : height * factor, : width * factor].astype(np.float32)
    means: NDArray[np.float32] = even.reshape(n, height, factor, width, factor).mean(axis=(2, 4))
    return means


@lru_cache(maxsize=1)
def _extractor() -> Extractor:
    return load_extractor(EXTRACTOR)
