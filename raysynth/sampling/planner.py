"""Decides what each synthetic sample is asked to show.

Two priors. `independent` is the published one (Marí Molas et al., system A): the nodule's place
follows the training boxes, its size their histogram, each score is uniform, and none of them knows
of the others or of the anatomy. `joint` draws whole LIDC nodules, so that size, scores and place
keep their correlations, and keeps them inside the lung.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raysynth.case import ATTRIBUTES, CONDITION_COLUMNS, LUNG_LABELS, Label
from raysynth.condition import Box, Condition
from raysynth.config import (
    ExperimentConfig,
    SliceSamples,
    StableDiffusionConfig,
    TextDiffusionConfig,
    TextGuided,
)
from raysynth.errors import InputError
from raysynth.formats.lidc import SLICE_PIXELS, LidcRecord
from raysynth.layout.propose import admissible_centres, place_nodule, without_nodules
from raysynth.models.bundle import load_tokenizer
from raysynth.models.text import clip_tokens, tokenize
from raysynth.prompt import NO_NODULE, PLACES, write_prompt
from raysynth.sampling.cohort import Scores, Stratum, plan_strata
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet

PLACE_SIGMA_MM = 40.0
"""How far from the place of the real nodule the drawn one may stray (a Gaussian)."""

NO_SOURCE = -1
"""Instead of a real sample, where none lends its layout."""

MAX_DRAWS = 200
"""Redraws before a plan gives up: reached only where no lung can hold any nodule."""


class Ball(NamedTuple):
    """A nodule to be put into a layout: its middle and radius in pixels."""

    centre: tuple[int, ...]
    radius: float


@dataclass(frozen=True)
class Lent:
    """How a layout comes from that of the sample that lends it.

    Attributes:
        keeps_nodules: whether the nodules there stay; else lung is in their place.
        ball: a nodule that is put in.
    """

    keeps_nodules: bool
    ball: Ball | None = None

    def layout(self, own: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The layout asked for, from the lender's own."""
        layout = own if self.keeps_nodules else without_nodules(own)
        return layout if self.ball is None else place_nodule(layout, *self.ball)


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a run.

    Attributes:
        sample_id: unique within the store; the seed follows from it.
        condition: layout, box and attributes asked for; the layout alone of one without nodule; of
            a text model a prompt, and in crops around nodules the box.
        source_sample: row of the real sample that lends its layout; -1: none.
        lent: how it does, where the condition is to be completed from the store; None: it is whole.
    """

    sample_id: str
    seed: int
    condition: Condition
    source_sample: int
    lent: Lent | None = None

    def redrawn(self, count: int) -> PlannedSample:
        """The same request for the `count`-th draw: other noise."""
        return replace(self, seed=seed_of("redraw", self.seed, count))

    def twin(self) -> PlannedSample:
        """The same request as another sample: what differs between the two is up to the noise."""
        seed = seed_of("twin", self.seed)
        return replace(self, sample_id=f"{self.sample_id}-twin", seed=seed)


Drawn = tuple[int, Condition, float]
"""Index of the layout lent, what to ask for, and the nodule's diameter in mm."""

DrawNodule = Callable[[np.random.Generator], tuple[LidcRecord, Scores]]

Prior = Callable[[np.random.Generator], Drawn | None]
"""Draws one condition; None where the drawn nodule does not fit the drawn layout."""


def plan_samples(config: ExperimentConfig, samples: SampleSet) -> list[PlannedSample]:
    """Plans `sampling.num_samples` samples; the same settings and set give the same requests.

    So recipes beside each other are asked for the same, each with its own noise.

    Args:
        config: the recipe; its `sampling.prior` chooses the prior.
        samples: the real sample set. Only its training split lends layouts.

    Raises:
        InputError: the set has no training slice that could hold a nodule.
    """
    if isinstance(config.model, TextGuided):
        return _plan_prompts(config)
    rows, anatomies = _lendable_layouts(samples)
    prior_of = _priors(config, samples, anatomies)
    plan = []
    for number in range(config.sampling.num_samples):
        turn = Turn.of(config, number)
        if is_nodule_free(turn.series, config.sampling.nodule_free):
            source = int(turn.rng.integers(len(anatomies)))
            condition = Condition(anatomies[source])
        else:
            source, condition, _ = _draw_until_it_fits(prior_of(turn), turn.rng)
        plan.append(PlannedSample(turn.sample_id, turn.seed, condition, int(rows[source])))
    return plan


def _priors(
    config: ExperimentConfig, samples: SampleSet, anatomies: list[NDArray[np.uint8]]
) -> Callable[[Turn], Prior]:
    """The recipe's prior for each sample."""
    if config.sampling.prior == "independent":
        boxes = _training_boxes(samples)
        prior = independent_prior(boxes, anatomies, samples.shape[-1], samples.pixel_mm)
        return lambda turn: prior
    strata = plan_strata(config.sampling.cohort, config.slices.min_nodule_mm)
    return lambda turn: joint_prior(
        config, anatomies, partial(turn.draw_nodule, strata.of(turn.series))
    )


@dataclass(frozen=True)
class Turn:
    """What decides one sample of a plan.

    Attributes:
        sample_id: its name.
        series: number of its counterfactual series; without any, of the sample.
        seed: of the series' noise.
        rng: draws the series' request.
        changed: column and value of the score that is this sample's own.
    """

    sample_id: str
    series: int
    seed: int
    rng: np.random.Generator
    changed: tuple[int, int] | None

    def draw_nodule(self, stratum: Stratum, rng: np.random.Generator) -> tuple[LidcRecord, Scores]:
        """A nodule of a stratum, with this sample's own score."""
        record, scores = stratum.draw(rng)
        if self.changed is None:
            return record, scores
        column, value = self.changed
        return record, (*scores[:column], value, *scores[column + 1 :])

    @classmethod
    def of(cls, config: ExperimentConfig, number: int) -> Turn:
        """What decides sample `number` of a recipe's plan."""
        series, changed = number, None
        for name, values in config.sampling.counterfactual.items():
            series, place = divmod(number, len(values))
            changed = ATTRIBUTES.index(name), values[place]
        first = f"{config.name}-{series:08d}"
        return cls(
            f"{config.name}-{number:08d}",
            series,
            seed_of("sample", config.seed, first),
            np.random.default_rng(seed_of("plan", config.seed, series)),
            changed,
        )


def _plan_prompts(config: ExperimentConfig) -> list[PlannedSample]:
    """Plans for a model that is told nothing but words."""
    prompts = config.sampling.prompts
    strata = plan_strata(config.sampling.cohort, config.slices.min_nodule_mm)
    plan = []
    for number in range(config.sampling.num_samples):
        turn = Turn.of(config, number)
        if prompts:
            condition = Condition(text=prompts[number % len(prompts)])
        elif is_nodule_free(turn.series, config.sampling.nodule_free):
            condition = Condition(text=NO_NODULE)
        else:
            record, scores = turn.draw_nodule(strata.of(turn.series), turn.rng)
            condition = _described(record, scores, config.slices, turn.rng)
        plan.append(PlannedSample(turn.sample_id, turn.seed, condition, NO_SOURCE))
    _check_prompts(config, {*prompts, *(one.condition.text or "" for one in plan)})
    return plan


def _check_prompts(config: ExperimentConfig, prompts: Collection[str]) -> None:
    """Refuses prompts that the model cannot read, before it is loaded."""
    if isinstance(config.model, StableDiffusionConfig):
        clip_tokens(load_tokenizer(config.bundle_path), sorted(prompts))
    if isinstance(config.model, TextDiffusionConfig):
        for prompt in sorted(prompts):
            tokenize(prompt, config.model.max_tokens)


def _described(
    record: LidcRecord, scores: Scores, samples: SliceSamples, rng: np.random.Generator
) -> Condition:
    """The prompt of a nodule as one of its readers saw it; in crops around nodules its box, too."""
    middle = (SLICE_PIXELS - 1) / 2
    place = PLACES[Label.LEFT_LUNG if record.centre_zyx[2] > middle else Label.RIGHT_LUNG]
    box = None
    if samples.centre == "nodule":
        share = section(rng) if samples.nodule_slices == "all" else 1.0
        side = max(2, round(record.diameter_mm * share / samples.pixel_mm))
        box = box_around(((samples.size - 1) / 2,) * 2, side, samples.size)
    attributes = tuple(int(scores[column]) for column in CONDITION_COLUMNS)
    text = write_prompt(scores, record.diameter_mm, place)
    return Condition(box=box, attributes=attributes, text=text)


def is_nodule_free(number: int, share: float) -> bool:
    """Spreads the share evenly over all numbers: of the first n, n * share, rounded down."""
    return int((number + 1) * share) > int(number * share)


def shuffle_conditions(plan: list[PlannedSample]) -> list[PlannedSample]:
    """The same samples, each drawn under the condition of another: the control of guidance."""
    # A cyclic shift of a random order leaves nobody with its own condition.
    order = np.random.default_rng(seed_of("shuffle", len(plan))).permutation(len(plan))
    others = dict(zip(order, np.roll(order, 1), strict=True))
    return [
        replace(plan[others[number]], sample_id=planned.sample_id, seed=planned.seed)
        for number, planned in enumerate(plan)
    ]


def pair_conditions(plan: list[PlannedSample], count: int) -> list[PlannedSample]:
    """The first requests of a plan, each followed by its twin: `count` samples, or one less."""
    return [one for asked in plan[: count // 2] for one in (asked, asked.twin())]


def joint_prior(
    config: ExperimentConfig, anatomies: list[NDArray[np.uint8]], draw_nodule: DrawNodule
) -> Prior:
    """Ours: a whole nodule of the database, one reader's scores, at a like place in a lung.

    Args:
        config: for the size of pixels, and whether samples show nodules in their largest plane or
            in any.
        anatomies: layouts to lend; a nodule is drawn into them, wholly inside the lung or, where
            they are crops around nodules, in their middle.
        draw_nodule: which.
    """
    pixel_mm = config.slices.pixel_mm
    all_planes = config.slices.nodule_slices == "all"
    crops = config.slices.centre == "nodule"
    middle = np.zeros(config.slices.shape, bool)
    middle[(config.slices.size // 2,) * 2] = True

    def draw(rng: np.random.Generator) -> Drawn | None:
        record, scores = draw_nodule(rng)
        source = int(rng.integers(len(anatomies)))
        diameter_mm = record.diameter_mm * (section(rng) if all_planes else 1.0)
        radius = diameter_mm / 2 / pixel_mm
        # A crop's own nodule was in its middle, and is so again, however near the pleura.
        admissible = admissible_centres(anatomies[source], radius, juxtapleural=crops)
        if crops:
            admissible &= middle
        if not admissible.any():
            return None
        centre = place_near(record, admissible, pixel_mm, rng)
        layout = place_nodule(anatomies[source], centre, radius)
        attributes = tuple(int(scores[column]) for column in CONDITION_COLUMNS)
        box = box_around(centre, max(2, round(2 * radius)), layout.shape[0])
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
        box = box_around((int(centre[0]), int(centre[1])), side, size)
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


def section(rng: np.random.Generator) -> float:
    """Diameter of a ball's section by a plane at a random height, as a share of the ball's."""
    return float(np.sqrt(1 - rng.uniform() ** 2))


def place_near(
    record: LidcRecord,
    admissible: NDArray[np.bool_],
    pixel_mm: float,
    rng: np.random.Generator,
) -> tuple[int, ...]:
    """An admissible pixel, likelier the nearer to where the record's nodule was in its slice.

    In volumes every plane is as likely: how high in the lungs the nodule was is not on record.
    """
    slice_middle = (SLICE_PIXELS - 1) / 2
    offset_mm = (np.array(record.centre_zyx[1:]) - slice_middle) * record.spacing_mm[1:]
    wanted = (np.array(admissible.shape[-2:]) - 1) / 2 + offset_mm / pixel_mm
    pixels = np.argwhere(admissible)
    distance_mm = np.linalg.norm(pixels[:, -2:] - wanted, axis=1) * pixel_mm
    # Shifting by the smallest keeps the weights from all underflowing to zero.
    exponent = -0.5 * (distance_mm / PLACE_SIGMA_MM) ** 2
    weight = np.exp(exponent - exponent.max())
    chosen = pixels[rng.choice(len(pixels), p=weight / weight.sum())]
    return tuple(chosen.tolist())


def box_around(centre: Sequence[float], side: int, size: int) -> Box:
    """A box of `side` pixels a side around a centre, moved (not cut) to stay inside the image."""
    side = min(side, size)
    first = tuple(min(max(0, round(c - (side - 1) / 2)), size - side) for c in centre)
    return *first, *(corner + side for corner in first)
