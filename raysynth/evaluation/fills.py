"""Samples that keep a patient's pixels: that nothing else changed, and what was made in the holes.

Holes were planned for models that fill them. Models guided by layouts make what the layout shows:
their holes, and whose pixels lie around, follow from what the store keeps of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig
from raysynth.config.evaluation import LpipsConfig
from raysynth.config.model import HoleFilling, LayoutGuided, OfImages, Window
from raysynth.errors import InputError
from raysynth.evaluation.intervals import LEVEL, MIN_PATIENTS, Interval
from raysynth.evaluation.measure import Computed
from raysynth.evaluation.regions import MASKED, made_whole
from raysynth.layout.holes import organ_hole, told_labels
from raysynth.layout.morphology import Mask
from raysynth.metrics.image import PairedError
from raysynth.metrics.perceptual import load_lpips
from raysynth.metrics.similarity import PairedSimilarity
from raysynth.sampling.hosts import plan_inpainting
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from raysynth.window import LUNG_WINDOW_HU

NUM_DRAWS = 1000
"""Bootstrap draws behind a seam's interval."""

PIXELS_AT_ONCE = 2**26
"""Slices are compared with their hosts in blocks of so many pixels."""

VOXELS_AT_ONCE = 2**22
"""Volumes likewise, two of 128 voxels a side: similarity needs a dozen copies of them."""

Rows = NDArray[np.int64]
Block = tuple[Rows, NDArray[np.int16], Mask, NDArray[np.int16]]
"""Some rows of a run: their numbers, HU, what of them was made, and their hosts' HU."""


@dataclass(frozen=True)
class Holes:
    """What a run was to fill, in its order.

    Attributes:
        hole: true where pixels were to be made (n, y, x).
        known_hu: the hosts' slices (n, y, x).
    """

    hole: NDArray[np.bool_]
    known_hu: NDArray[np.int16]

    keeps = True
    """All other pixels are the host's."""

    def of(self, layout: NDArray[np.uint8], start: int) -> Mask | None:
        """What was made in consecutive rows of the run, with these layouts."""
        return self.hole[start : start + len(layout)]

    def blocks(self, samples: SampleSet) -> Iterator[Block]:
        """Every sample of the run, or of a control of it, beside its host."""
        block = max(1, PIXELS_AT_ONCE // int(np.prod(samples.shape)))
        for start in range(0, samples.count, block):
            stop = min(start + block, samples.count)
            hu = samples.read("hu", start, stop)
            rows = np.arange(start, stop)
            yield rows, hu, self.hole[start:stop], self.known_hu[start:stop]


@dataclass(frozen=True)
class LayoutHoles:
    """What a run guided by layouts was to make. Nothing is read before it is asked for.

    Attributes:
        made_of: labels of the layouts that the model is told.
        keeps: all pixels are the host's but those where its layout or the one asked for has these
            labels: a nodule that gave way was made anew as lung. Else all were made, and what lies
            outside is compared with the host for comparison's sake.
        hosts: the real sample set.
    """

    made_of: Sequence[int]
    keeps: bool
    hosts: SampleSet

    def of(self, layout: NDArray[np.uint8], start: int) -> Mask | None:
        """What was made in rows with these layouts, for what the layouts themselves show."""
        if self.keeps:
            return organ_hole(layout, self.made_of)
        return np.ones(layout.shape, bool)

    def blocks(self, samples: SampleSet) -> Iterator[Block]:
        """Every sample of the run, or of a control of it, beside its host.

        Hosts are read shard by shard, so that two shards of volumes are in memory at most.
        """
        hosts = samples.index["source_sample"]
        block = max(1, VOXELS_AT_ONCE // int(np.prod(samples.shape)))
        for shard in range(samples.num_shards):
            start, stop = samples.shard_rows(shard)
            hu, layout = (samples.read(name, start, stop) for name in ("hu", "layout"))
            shards = hosts[start:stop] // self.hosts.rows_per_shard
            for of_host in np.unique(shards):
                first, last = self.hosts.shard_rows(int(of_host))
                known_hu, own = (self.hosts.read(name, first, last) for name in ("hu", "layout"))
                rows = start + np.flatnonzero(shards == of_host)
                for some in np.split(rows, range(block, len(rows), block)):
                    lent = hosts[some] - first
                    layouts = layout[some - start], own[lent]
                    asked, given = (organ_hole(one, self.made_of) for one in layouts)
                    yield some, hu[some - start], asked | given, known_hu[lent]


@dataclass(frozen=True)
class HostError:
    """Mean squared difference of a sample's pixels from its host's at the same places.

    Attributes:
        mse: with the model's window mapped to [-1, 1].
        mse_hu2: the same in squared HU.
    """

    mse: float
    mse_hu2: float


@dataclass(frozen=True)
class FillQuality:
    """How a set's holes lie in their samples.

    Attributes:
        n: samples.
        changed: pixels outside the holes that are not the host's, of all samples; None: no pixel
            had to be.
        known: pixels outside the holes, of all samples; None likewise.
        seam: mean step in HU between neighbouring pixels on either side of the holes' borders, as a
            share of the host's at the same places. 1: the border cannot be told by its step; more:
            it shows; less: it is blurred.
        seam_interval: 95 %, bootstrap of patients (of samples where they are few).
        errors: against the host's own pixels, `inside` the holes (of models guided by layouts,
            inside the labels they are told, of host or request), `outside` and of the `whole`. The
            host's tissue is one of many that would fit: the mean of all has the least error, and is
            the worst picture.
        ssim: of the whole samples, most of which are copied.
        lpips: likewise, by the backbone's name and version; empty without one.
        copied_fraction: mean share of a sample's pixels that are the host's by construction.
    """

    n: int
    changed: int | None
    known: int | None
    seam: float | None
    seam_interval: Interval | None
    errors: dict[str, HostError]
    ssim: float
    lpips: dict[str, float]
    copied_fraction: float


def holes_of(
    config: ExperimentConfig, real: SampleSet, synthetic: SampleSet
) -> Holes | LayoutHoles | None:
    """What of a run was made, if any model of its kind keeps a host's pixels.

    Raises:
        InputError: the holes that its recipe plans are not the run's, or a sample has no host.
    """
    model = config.model
    if isinstance(model, HoleFilling):
        return read_holes(config, real, synthetic)
    if not isinstance(model, LayoutGuided):
        return None
    if (synthetic.index["source_sample"] < 0).any():
        raise InputError(
            f"synthetic/{config.name} has samples on nobody's layout, which {model.family} does "
            "not draw: draw another run"
        )
    return LayoutHoles(tuple(told_labels(model.layout_labels)), config.copies, real)


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


def seen_window(config: ExperimentConfig) -> Window:
    """The HU that a model can draw; of models of latents, those that measures look at."""
    model = config.model
    return model.window_hu if isinstance(model, OfImages) else LUNG_WINDOW_HU


def fill_quality(
    samples: SampleSet,
    holes: Holes | LayoutHoles,
    patients: NDArray[np.int64],
    window_hu: Window,
    lpips: LpipsConfig | None,
) -> FillQuality:
    """Compares a set with the hosts of its holes.

    Args:
        samples: a run or a control of it, which may have fewer samples.
        holes: of the run.
        patients: number of each host's patient.
        window_hu: what the model sees: steps and errors are measured in it, as it can fill with no
            more.
        lpips: files of a backbone; None: there are none.
    """
    perceived = None if lpips is None else load_lpips(lpips, window_hu)
    distance = 0.0
    changed = known = 0
    steps = np.zeros((samples.count, 2))
    errors = {name: PairedError(window_hu) for name in ("inside", "outside", "whole")}
    similarity = PairedSimilarity(window_hu)
    for rows, hu, hole, known_hu in holes.blocks(samples):
        known += int(np.count_nonzero(~hole))
        changed += int(np.count_nonzero((hu != known_hu) & ~hole))
        for error, shown in zip(errors.values(), (hole, ~hole, None), strict=True):
            error.update(known_hu, hu, shown)
        similarity.update(known_hu, hu)
        if perceived is not None:
            distance += float(perceived(known_hu, hu).sum())
        for column, image in enumerate((hu, known_hu)):
            steps[rows, column] = border_steps(np.clip(image, *window_hu), hole)
    seam, interval = _ratio(steps, patients) if holes.keeps else (None, None)
    copied = known / (samples.count * int(np.prod(samples.shape)))
    return FillQuality(
        n=samples.count,
        changed=changed if holes.keeps else None,
        known=known if holes.keeps else None,
        seam=seam,
        seam_interval=interval,
        errors={name: _host_error(error) for name, error in errors.items() if error.count},
        ssim=similarity.compute().ssim,
        lpips={} if perceived is None else {perceived.name: distance / samples.count},
        copied_fraction=copied if holes.keeps else 0.0,
    )


def border_steps(image: NDArray[np.number], hole: Mask) -> NDArray[np.float64]:
    """Sum of absolute differences of neighbours on either side of holes' borders, (n,).

    Args:
        image: slices (n, y, x) or volumes (n, z, y, x).
        hole: of each.
    """
    values = image.astype(np.float64)
    total = np.zeros(len(values))
    places = tuple(range(1, values.ndim))
    for axis in places:
        across = np.diff(hole, axis=axis)
        total += (np.abs(np.diff(values, axis=axis)) * across).sum(axis=places)
    return total


def with_generated(computed: Computed) -> Computed:
    """What was measured of real samples, as those with holes are judged by it: organs are whole."""
    return computed | {
        (made_whole(region), extractor): found
        for (region, extractor), found in computed.items()
        if region in MASKED
    }


def _host_error(error: PairedError) -> HostError:
    found = error.compute()
    return HostError(4 * found.mse01, found.mse_hu2)


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
