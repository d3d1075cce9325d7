"""Decides what each synthetic sample is asked to show.

Two priors. `independent` is the published one (Marí Molas et al., system A): the nodule's place
follows the training boxes, its size their histogram, each score is uniform, and none of them knows
of the others or of the anatomy. `joint` draws whole LIDC nodules, so that size, scores and place
keep their correlations, and keeps them inside the lung.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raysynth.case import CONDITION_COLUMNS, LUNG_LABELS, Label
from raysynth.condition import Box, Condition
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.formats.lidc import SLICE_PIXELS, LidcRecord, nodule_records
from raysynth.layout.propose import admissible_centres, place_nodule
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet

PLACE_SIGMA_MM = 40.0
"""How far from the place of the real nodule the drawn one may stray (a Gaussian)."""

MAX_DRAWS = 200
"""Redraws before a plan gives up: reached only where no lung can hold any nodule."""


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a run.

    Attributes:
        sample_id: unique within the store; the seed follows from it.
        condition: layout, box and attributes asked for; the layout alone of one without nodule.
        source_sample: row of the real sample that lends its layout.
    """

    sample_id: str
    seed: int
    condition: Condition
    source_sample: int


Drawn = tuple[int, Condition, float]
"""Index of the layout lent, what to ask for, and the nodule's diameter in mm."""

Prior = Callable[[np.random.Generator], Drawn | None]
"""Draws one condition; None where the drawn nodule does not fit the drawn layout."""


def plan_samples(config: ExperimentConfig, samples: SampleSet) -> list[PlannedSample]:
    """Plans `sampling.num_samples` samples; the same recipe and set give the same plan.

    Args:
        config: the recipe; its `sampling.prior` chooses the prior.
        samples: the real sample set. Only its training split lends layouts.

    Raises:
        InputError: the set has no training slice that could hold a nodule.
    """
    rows, anatomies = _lendable_layouts(samples)
    if config.sampling.prior == "joint":
        prior = joint_prior(config, anatomies)
    else:
        prior = independent_prior(
            _training_boxes(samples), anatomies, samples.shape[-1], samples.pixel_mm
        )
    plan = []
    for number in range(config.sampling.num_samples):
        sample_id = f"{config.name}-{number:08d}"
        rng = np.random.default_rng(seed_of("plan", config.seed, sample_id))
        if _is_nodule_free(number, config.sampling.nodule_free):
            source = int(rng.integers(len(anatomies)))
            condition = Condition(anatomies[source])
        else:
            source, condition, _ = _draw_until_it_fits(prior, rng)
        seed = seed_of("sample", config.seed, sample_id)
        plan.append(PlannedSample(sample_id, seed, condition, int(rows[source])))
    return plan


def _is_nodule_free(number: int, share: float) -> bool:
    """Spreads the share evenly over all numbers: of the first n, n * share, rounded down."""
    return int((number + 1) * share) > int(number * share)


def shuffle_conditions(plan: list[PlannedSample]) -> list[PlannedSample]:
    """The same samples, each drawn under the condition of another: the control of guidance."""
    # A cyclic shift of a random order leaves nobody with its own condition.
    order = np.random.default_rng(seed_of("shuffle", len(plan))).permutation(len(plan))
    others = dict(zip(order, np.roll(order, 1), strict=True))
    return [
        replace(planned, condition=plan[others[number]].condition)
        for number, planned in enumerate(plan)
    ]


def without_nodules(layout: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A layout whose nodule pixels carry the label of the nearest lung."""
    nodule = layout == Label.NODULE
    if not nodule.any():
        return layout
    from scipy.ndimage import distance_transform_edt

    lung = np.isin(layout, LUNG_LABELS)
    if not lung.any():
        return np.where(nodule, np.uint8(Label.BODY), layout)
    nearest = distance_transform_edt(~lung, return_distances=False, return_indices=True)
    return np.where(nodule, layout[tuple(nearest)], layout)


def joint_prior(config: ExperimentConfig, anatomies: list[NDArray[np.uint8]]) -> Prior:
    """Ours: a whole nodule of the database, one reader's scores, at a like place in a lung.

    Args:
        config: for the size of pixels, the smallest nodule, and whether samples show nodules in
            their largest plane or in any.
        anatomies: layouts to lend; a nodule is drawn into them, wholly inside the lung.
    """
    pixel_mm = config.slices.pixel_mm
    smallest_mm = config.slices.min_nodule_mm
    records = [record for record in nodule_records() if record.diameter_mm >= smallest_mm]
    if not records:
        raise InputError(
            f"no LIDC nodule measures {smallest_mm:g} mm: lower data.samples.min_nodule_mm"
        )
    all_planes = config.slices.nodule_slices == "all"

    def draw(rng: np.random.Generator) -> Drawn | None:
        record = records[rng.integers(len(records))]
        reader = record.ratings[rng.integers(len(record.ratings))]
        source = int(rng.integers(len(anatomies)))
        diameter_mm = record.diameter_mm * (_section(rng) if all_planes else 1.0)
        radius = diameter_mm / 2 / pixel_mm
        admissible = admissible_centres(anatomies[source], radius)
        if not admissible.any():
            return None
        centre = _place_near(record, admissible, pixel_mm, rng)
        layout = place_nodule(anatomies[source], centre, radius)
        attributes = tuple(int(reader[column]) for column in CONDITION_COLUMNS)
        box = _square_around(centre, max(2, round(2 * radius)), layout.shape[0])
        return source, Condition(layout, box, attributes), diameter_mm

    return draw


def independent_prior(
    boxes: NDArray[np.int16], anatomies: list[NDArray[np.uint8]], size: int, pixel_mm: float
) -> Prior:
    """The published prior: presence map, size histogram, uniform scores, each on its own.

    Args:
        boxes: around the training nodules, (n, 4) pixels.
        anatomies: layouts to lend, as they are: nothing keeps the nodule inside the lung.
        size: pixels along a sample's side.
        pixel_mm: side of a pixel.
    """
    presence = np.zeros((size, size))
    for y0, x0, y1, x1 in boxes:
        presence[y0:y1, x0:x1] += 1
    presence /= presence.sum()
    sides = boxes[:, 2] - boxes[:, 0]

    def draw(rng: np.random.Generator) -> Drawn:
        source = int(rng.integers(len(anatomies)))
        centre = np.unravel_index(rng.choice(presence.size, p=presence.ravel()), presence.shape)
        side = int(rng.choice(sides))
        box = _square_around((int(centre[0]), int(centre[1])), side, size)
        attributes = tuple(int(score) for score in rng.integers(1, 6, len(CONDITION_COLUMNS)))
        condition = Condition(anatomies[source], box, attributes)
        return source, condition, side * pixel_mm

    return draw


def _lendable_layouts(
    samples: SampleSet,
) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]]]:
    """Rows and nodule-free layouts of the training slices that show lung."""
    rows, anatomies = [], []
    for shard in range(samples.num_shards):
        start, stop = samples.shard_rows(shard)
        training = np.flatnonzero(samples.index["split"][start:stop] == 0)
        if not len(training):
            continue
        layouts = samples.read("layout", start, stop)
        for offset in training:
            layout = without_nodules(layouts[offset])
            if np.isin(layout, LUNG_LABELS).any():
                rows.append(start + int(offset))
                anatomies.append(layout)
    if not rows:
        raise InputError(
            f"sample set {samples.group.name}: no training slice shows lung, so none can lend its "
            "layout; ingest more cases"
        )
    return np.array(rows), anatomies


def _training_boxes(samples: SampleSet) -> NDArray[np.int16]:
    boxes: NDArray[np.int16] = samples.index["box"][samples.index["split"] == 0]
    boxes = boxes[boxes[:, 0] >= 0]
    if not len(boxes):
        raise InputError(
            f"sample set {samples.group.name}: no training slice has a nodule, so where and how "
            "large they are is unknown; use sampling.prior=joint"
        )
    return boxes


def _draw_until_it_fits(prior: Prior, rng: np.random.Generator) -> Drawn:
    for _ in range(MAX_DRAWS):
        drawn = prior(rng)
        if drawn is not None:
            return drawn
    raise InputError(
        f"no nodule fitted any lung in {MAX_DRAWS} draws; lower data.samples.min_nodule_mm"
    )


def _section(rng: np.random.Generator) -> float:
    """Diameter of a ball's section by a plane at a random height, as a share of the ball's."""
    return float(np.sqrt(1 - rng.uniform() ** 2))


def _place_near(
    record: LidcRecord,
    admissible: NDArray[np.bool_],
    pixel_mm: float,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """An admissible pixel, likelier the nearer to where the record's nodule was in its slice."""
    slice_middle = (SLICE_PIXELS - 1) / 2
    offset_mm = (np.array(record.centre_zyx[1:]) - slice_middle) * record.spacing_mm[1:]
    wanted = (np.array(admissible.shape) - 1) / 2 + offset_mm / pixel_mm
    pixels = np.argwhere(admissible)
    distance_mm = np.linalg.norm(pixels - wanted, axis=1) * pixel_mm
    # Shifting by the smallest keeps the weights from all underflowing to zero.
    exponent = -0.5 * (distance_mm / PLACE_SIGMA_MM) ** 2
    weight = np.exp(exponent - exponent.max())
    y, x = pixels[rng.choice(len(pixels), p=weight / weight.sum())]
    return int(y), int(x)


def _square_around(centre: tuple[int, int], side: int, size: int) -> Box:
    """A square box of `side` pixels around a centre, moved (not cut) to stay inside the image."""
    side = min(side, size)
    y0, x0 = (min(max(0, round(c - (side - 1) / 2)), size - side) for c in centre)
    return y0, x0, y0 + side, x0 + side
