"""Holes that were filled: that nothing else changed, and whether their borders can be seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig
from raysynth.config.model import Window
from raysynth.errors import InputError
from raysynth.evaluation.intervals import LEVEL, MIN_PATIENTS, Interval
from raysynth.evaluation.measure import Computed
from raysynth.evaluation.regions import GENERATED, MASKED
from raysynth.layout.morphology import Mask
from raysynth.metrics.image import PairedError
from raysynth.metrics.similarity import PairedSimilarity
from raysynth.sampling.hosts import plan_inpainting
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet

NUM_DRAWS = 1000
"""Bootstrap draws behind a seam's interval."""

PIXELS_AT_ONCE = 2**26
"""Slices are compared with their hosts in blocks of so many pixels."""


@dataclass(frozen=True)
class Holes:
    """What a run was to fill, in its order.

    Attributes:
        hole: true where pixels were to be made (n, y, x).
        known_hu: the hosts' slices (n, y, x).
    """

    hole: NDArray[np.bool_]
    known_hu: NDArray[np.int16]


@dataclass(frozen=True)
class FillQuality:
    """How a set's holes lie in their slices.

    Attributes:
        n: slices.
        changed: pixels outside the holes that are not the host's, of all slices.
        known: pixels outside the holes, of all slices.
        seam: mean step in HU between neighbouring pixels on either side of the holes' borders, as a
            share of the host's at the same places. 1: the border cannot be told by its step; more:
            it shows; less: it is blurred.
        seam_interval: 95 %, bootstrap of patients (of slices where they are few).
        mse_hu2: of the pixels in the holes against the host's own. The host's tissue is one of many
            that would fit: the mean of all has the least error, and is the worst picture.
        ssim: of the whole slices, most of which are copied.
    """

    n: int
    changed: int
    known: int
    seam: float | None
    seam_interval: Interval | None
    mse_hu2: float
    ssim: float


def read_holes(config: ExperimentConfig, real: SampleSet, synthetic: SampleSet) -> Holes:
    """The holes of a run, planned once more: the store keeps their share of the slice alone.

    Raises:
        InputError: the plan is not the run's.
    """
    plan = plan_inpainting(config, real)
    asked = [one.condition for one in plan]
    hosts = np.array([one.source_sample for one in plan])
    if not np.array_equal(hosts, synthetic.index["source_sample"]):
        raise InputError(
            f"synthetic/{config.name} fills other slices than its recipe plans now: evaluate with "
            "the release and the sample set that it was drawn with, or draw another run"
        )
    return Holes(
        np.stack([~one.known_mask for one in asked if one.known_mask is not None]),
        np.stack([one.known_hu for one in asked if one.known_hu is not None]),
    )


def fill_quality(
    samples: SampleSet, holes: Holes, patients: NDArray[np.int64], window_hu: Window
) -> FillQuality:
    """Compares a set with the hosts of its holes.

    Args:
        samples: a run or a control of it, which may have fewer slices.
        holes: of the run.
        patients: number of each host's patient.
        window_hu: what the model sees: steps are measured in it, as it can fill with no more.
    """
    changed = 0
    steps = np.zeros((samples.count, 2))
    errors, similarity = PairedError(window_hu), PairedSimilarity(window_hu)
    block = max(1, PIXELS_AT_ONCE // int(np.prod(samples.shape)))
    for start in range(0, samples.count, block):
        rows = slice(start, min(start + block, samples.count))
        hu = samples.read("hu", rows.start, rows.stop)
        hole, known_hu = holes.hole[rows], holes.known_hu[rows]
        changed += int(np.count_nonzero((hu != known_hu) & ~hole))
        errors.update(known_hu, hu, hole)
        similarity.update(known_hu, hu)
        for column, image in enumerate((hu, known_hu)):
            steps[rows, column] = border_steps(np.clip(image, *window_hu), hole)
    seam, interval = _ratio(steps, patients)
    known = int(np.count_nonzero(~holes.hole[: samples.count]))
    mse_hu2, ssim = errors.compute().mse_hu2, similarity.compute().ssim
    return FillQuality(samples.count, changed, known, seam, interval, mse_hu2, ssim)


def border_steps(image: NDArray[np.number], hole: Mask) -> NDArray[np.float64]:
    """Sum of absolute differences of neighbours on either side of holes' borders, (n,).

    Args:
        image: slices (n, y, x).
        hole: of each slice.
    """
    values = image.astype(np.float64)
    total = np.zeros(len(values))
    for axis in (1, 2):
        across = np.diff(hole, axis=axis)
        total += (np.abs(np.diff(values, axis=axis)) * across).sum(axis=(1, 2))
    return total


def with_generated(computed: Computed) -> Computed:
    """What was measured of real slices, as filled ones are judged by it: organs are whole there."""
    return computed | {
        (GENERATED + region, extractor): found
        for (region, extractor), found in computed.items()
        if region in MASKED
    }


def _ratio(
    steps: NDArray[np.float64], patients: NDArray[np.int64]
) -> tuple[float | None, Interval | None]:
    """The first column's sum by the second's, and how far it moves with the patients drawn."""
    if not steps[:, 1].sum():
        return None, None
    units, of_row = np.unique(patients[: len(steps)], return_inverse=True)
    if len(units) < MIN_PATIENTS:
        units = of_row = np.arange(len(steps))
    sums = np.zeros((len(units), 2))
    np.add.at(sums, of_row, steps)
    rng = np.random.default_rng(seed_of("seam", len(units)))
    drawn = sums[rng.integers(len(units), size=(NUM_DRAWS, len(units)))].sum(axis=1)
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(steps[:, 0].sum() / steps[:, 1].sum()), (float(low), float(high))
