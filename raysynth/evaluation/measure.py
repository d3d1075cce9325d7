"""Measures some samples: features of every region, tissue histograms, and each nodule again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raysynth.case import LUNG_LABELS, Intensity, Label
from raysynth.condition import Box
from raysynth.evaluation.regions import cut_regions
from raysynth.layout.morphology import Mask
from raysynth.metrics.features import Extractor
from raysynth.metrics.histogram import TISSUES, tissue_histograms
from raysynth.metrics.kernel import FeatureTable
from raysynth.metrics.nodule import RADIOMICS, RING_MM, measurable_masks, radiomic_features
from raysynth.sampling.adherence import (
    NODULE_LUNG_LABELS,
    count_unrequested,
    find_nodule,
    requested_diameter_mm,
    stray_box,
    within,
)
from raysynth.seeding import seed_of

HISTOGRAMS = "histogram@1"
"""Stands for `tissue_histograms` where metric keys name an extractor."""

ADHERENCE_COLUMNS = (
    "found",
    "contrast_hu",
    "requested_mm",
    "measured_mm",
    "offset_mm",
    "stray_found",
    "lung",
)
"""Of a sample with a box; `stray_found` is NaN where no stray box fitted. `lung` is the label of
the lung around the box, 0 where the layout shows none."""

RELATIVE = "-relative@"
"""Marks extractors of grey values without a unit."""

Place = tuple[str, str]
"""A region (or tissue) and an extractor."""

Computed = dict[Place, tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Rows and features of every region and extractor."""


def told(computed: Computed, intensity: Intensity) -> Computed:
    """What may be told: of grey values without a unit nothing in HU, and features under a mark.

    A figure of theirs is none to compare with one of images in HU, so its key is another.
    """
    if intensity == "hu":
        return computed
    return {
        (region, extractor.replace("@", RELATIVE)): found
        for (region, extractor), found in computed.items()
        if extractor != HISTOGRAMS
    }


def measured_by(extractor: str) -> str:
    """The extractor under a name that `told` may have marked."""
    return extractor.replace(RELATIVE, "@")


class Measures:
    """What was measured of a set of samples; workers measure shards and merge."""

    def __init__(self) -> None:
        self.tables: dict[Place, FeatureTable] = {}
        self.adherence = FeatureTable()
        self.boxes = FeatureTable()
        self.unrequested = FeatureTable()

    def update(
        self,
        first_row: int,
        hu: NDArray[np.int16],
        layout: NDArray[np.uint8],
        box: NDArray[np.int16],
        pixel_mm: float,
        extractors: Sequence[Extractor],
        stray_boxes: Sequence[Box],
        hole: Mask | None = None,
        made_of: Sequence[int] = (),
    ) -> None:
        """Measures consecutive samples.

        Args:
            first_row: number of the first one in its set.
            hu: slices (n, y, x) or volumes (n, z, y, x).
            layout: labels, annotated or asked for.
            box: boxes (n, 4) or (n, 6), -1 for none.
            pixel_mm: side of a pixel.
            extractors: of features.
            stray_boxes: boxes of other samples, for the chance level of adherence.
            hole: what of them was filled, of their shape; None: they have no holes.
            made_of: labels that a model guided by layouts makes, see `cut_regions`.
        """
        for region, part in cut_regions(hu, layout, box, hole, made_of).items():
            for extractor in extractors:
                features = extractor(part.hu)
                self._table(region, extractor.name).update(first_row + part.rows, features)
        shown, radiomics = _radiomics(hu, layout, box, pixel_mm)
        self._table("nodule", RADIOMICS[hu.ndim - 1]).update(first_row + shown, radiomics)
        for tissue, counts in tissue_histograms(hu, layout).items():
            seen = np.flatnonzero(counts.any(axis=1))
            self._table(tissue, HISTOGRAMS).update(first_row + seen, counts[seen])
        places = tuple(range(1, hu.ndim))
        with_lung = np.flatnonzero(np.isin(layout, LUNG_LABELS).any(axis=places))
        unrequested = [
            count_unrequested(hu[i], layout[i], _box(box[i]), pixel_mm) for i in with_lung
        ]
        self.unrequested.update(
            first_row + with_lung, np.array(unrequested, np.float32).reshape(-1, 1)
        )
        boxed = np.flatnonzero(box[:, 0] >= 0)
        self.boxes.update(first_row + boxed, box[boxed].astype(np.float32))
        rows = [
            _adherence(first_row + int(i), hu[i], layout[i], asked, pixel_mm, stray_boxes)
            for i in boxed
            if (asked := _box(box[i])) is not None
        ]
        self.adherence.update(
            first_row + boxed, np.array(rows, np.float32).reshape(-1, len(ADHERENCE_COLUMNS))
        )

    def merge(self, other: Measures) -> None:
        """Adds what another worker measured."""
        for place, table in other.tables.items():
            self._table(*place).merge(table)
        self.adherence.merge(other.adherence)
        self.boxes.merge(other.boxes)
        self.unrequested.merge(other.unrequested)

    def compute(self) -> Computed:
        """Rows and features of every region and extractor."""
        return {place: table.compute() for place, table in sorted(self.tables.items())}

    def _table(self, region: str, extractor: str) -> FeatureTable:
        assert extractor != HISTOGRAMS or region in TISSUES
        return self.tables.setdefault((region, extractor), FeatureTable())


def _radiomics(
    hu: NDArray[np.int16], layout: NDArray[np.uint8], box: NDArray[np.int16], pixel_mm: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which samples show a nodule that can be measured, and its features.

    Of a slice it is all nodules there. A volume may show several, far from each other: there it is
    the one in the box.
    """
    if hu.ndim == 3:
        nodule = layout == Label.NODULE
        shown = measurable_masks(nodule)
        return np.flatnonzero(shown), radiomic_features(hu[shown], nodule[shown], pixel_mm)
    rows, features = [], []
    reach = math.ceil(RING_MM / pixel_mm) + 2  # the ring, and what gradients need
    for row in np.flatnonzero(box[:, 0] >= 0):
        mask = np.zeros(hu.shape[1:], bool)
        inside = within(tuple(box[row].tolist()))
        mask[inside] = layout[row][inside] == Label.NODULE
        around = tuple(slice(max(0, part.start - reach), part.stop + reach) for part in inside)
        crop, mask = hu[row][around][None], mask[around][None]
        if measurable_masks(mask).all():
            rows.append(int(row))
            features.append(radiomic_features(crop, mask, pixel_mm))
    found = np.concatenate(features) if features else np.zeros((0, 0), np.float32)
    return np.array(rows, np.int64), found


def _adherence(
    row: int,
    hu: NDArray[np.int16],
    layout: NDArray[np.uint8],
    box: Box,
    pixel_mm: float,
    stray_boxes: Sequence[Box],
) -> list[float]:
    """One row of `ADHERENCE_COLUMNS`."""
    # Who asks by a prompt says nothing of anatomy.
    lung = np.isin(layout, NODULE_LUNG_LABELS) if layout.any() else None
    there = find_nodule(hu, lung, box, pixel_mm)
    rng = np.random.default_rng(seed_of("stray", row))
    # No nodule that was annotated elsewhere in the sample counts as chance.
    free_lung = np.isin(layout, LUNG_LABELS)
    stray = stray_box(free_lung, box, stray_boxes, rng)
    elsewhere = None if stray is None else find_nodule(hu, lung, stray, pixel_mm)
    return [
        there.found,
        there.contrast_hu,
        requested_diameter_mm(layout, box, pixel_mm),
        there.diameter_mm,
        there.offset_mm,
        np.nan if elsewhere is None else elsewhere.found,
        _lung_around(layout, box),
    ]


def _lung_around(layout: NDArray[np.uint8], box: Box) -> int:
    """The lung with most pixels in three times the box; 0: none."""
    around = tuple(
        slice(max(0, 2 * part.start - part.stop), 2 * part.stop - part.start)
        for part in within(box)
    )
    counts = np.bincount(layout[around].ravel(), minlength=Label.RIGHT_LUNG + 1)
    left, right = counts[Label.LEFT_LUNG], counts[Label.RIGHT_LUNG]
    if not left + right:
        return 0
    return int(Label.LEFT_LUNG if left >= right else Label.RIGHT_LUNG)


def _box(values: NDArray[np.int16]) -> Box | None:
    return None if values[0] < 0 else tuple(int(value) for value in values)
