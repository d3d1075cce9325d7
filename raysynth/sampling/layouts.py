"""Decides what a model guided by layouts is asked for, and fetches it where a sample is drawn.

Volumes are large: a plan holds no layout and no known voxels, but says how they come from a real
sample. Hosts are samples of test patients, which the model has not seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.case import CONDITION_COLUMNS
from raysynth.condition import Condition
from raysynth.config import ExperimentConfig, LayoutGuided, SliceSamples
from raysynth.errors import InputError
from raysynth.layout.holes import layout_hole
from raysynth.layout.propose import lung_depth, without_nodules
from raysynth.sampling.cohort import plan_strata
from raysynth.sampling.planner import (
    MAX_DRAWS,
    NO_SOURCE,
    Ball,
    Lent,
    PlannedSample,
    Turn,
    box_around,
    is_nodule_free,
    place_near,
    section,
)
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet, open_group
from storage_schema.v1 import SPLITS


def plan_layouts(config: ExperimentConfig, samples: SampleSet) -> list[PlannedSample]:
    """Plans `sampling.num_samples` samples on the layouts of test patients, each host in its turn.

    The same settings and set give the same requests, so recipes beside each other are asked for
    the same, each with its own noise.

    Raises:
        InputError: the set has no test sample to lend its layout, or no nodule fits into any.
    """
    model = config.model
    assert isinstance(model, LayoutGuided)
    is_host = samples.index["split"] == SPLITS.index("test")
    if model.layout_labels == ("nodule",) and config.sampling.nodules == "own":
        is_host &= samples.index["has_nodule"] > 0
    hosts = np.flatnonzero(is_host)
    if not len(hosts):
        raise InputError(
            f"sample set {config.samples.name}: no sample of a test patient can lend its layout; "
            "ingest more cases, or raise data.split.test"
        )
    hosts = np.random.default_rng(seed_of("hosts", config.seed)).permutation(hosts)
    turns = [Turn.of(config, number) for number in range(config.sampling.num_samples)]
    host_of = [int(hosts[turn.series % len(hosts)]) for turn in turns]
    if config.sampling.nodules == "own":
        return [_own(turn, host, samples) for turn, host in zip(turns, host_of, strict=True)]
    of_host: dict[int, list[Turn]] = defaultdict(list)
    for turn, host in zip(turns, host_of, strict=True):
        of_host[host].append(turn)
    plan = {
        one.sample_id: one
        for host, its in of_host.items()
        for one in _with_new_nodules(config, samples, host, its)
    }
    return [plan[turn.sample_id] for turn in turns]


def _own(turn: Turn, host: int, samples: SampleSet) -> PlannedSample:
    """The host as it is, with one reader's scores of its nodule."""
    box = tuple(int(edge) for edge in samples.index["box"][host])
    ratings = samples.index["ratings"][host]
    readers = ratings[ratings.any(axis=1)]
    scores = None
    if len(readers):
        chosen = readers[turn.rng.integers(len(readers))]
        scores = tuple(int(chosen[column]) for column in CONDITION_COLUMNS)
    condition = Condition(box=None if box[0] < 0 else box, attributes=scores)
    return PlannedSample(turn.sample_id, turn.seed, condition, host, Lent(keeps_nodules=True))


def _with_new_nodules(
    config: ExperimentConfig, samples: SampleSet, host: int, turns: Sequence[Turn]
) -> list[PlannedSample]:
    """Samples on one host, whose own nodules give way to one of the database in each."""
    given = config.samples
    strata = plan_strata(config.sampling.cohort, given.min_nodule_mm)
    anatomy = without_nodules(samples.read("layout", host, host + 1)[0])
    depth = lung_depth(anatomy)
    if given.centre == "nodule":
        # The new nodule comes to where the crop's own was, however near the pleura.
        depth = np.where(_nearest_lung(depth, samples.index["box"][host]), np.inf, 0.0)
    in_planes = isinstance(given, SliceSamples) and given.nodule_slices == "all"
    plan = []
    for turn in turns:
        if is_nodule_free(turn.series, config.sampling.nodule_free):
            lent, condition = Lent(keeps_nodules=False), Condition()
            plan.append(PlannedSample(turn.sample_id, turn.seed, condition, host, lent))
            continue
        for _ in range(MAX_DRAWS):
            record, scores = turn.draw_nodule(strata.of(turn.series), turn.rng)
            share = section(turn.rng) if in_planes else 1.0
            radius = record.diameter_mm * share / 2 / given.pixel_mm
            admissible = depth > radius
            if admissible.any():
                break
        else:
            raise InputError(
                f"no nodule fitted the lungs of sample {host} of {given.name} in {MAX_DRAWS} "
                "draws; lower data.samples.min_nodule_mm, or take larger samples"
            )
        centre = place_near(record, admissible, given.pixel_mm, turn.rng)
        box = box_around(centre, max(2, round(2 * radius)), given.size)
        attributes = tuple(int(scores[column]) for column in CONDITION_COLUMNS)
        lent = Lent(keeps_nodules=False, ball=Ball(centre, radius))
        condition = Condition(box=box, attributes=attributes)
        plan.append(PlannedSample(turn.sample_id, turn.seed, condition, host, lent))
    return plan


def _nearest_lung(depth: NDArray[np.float64], box: NDArray[np.int16]) -> NDArray[np.bool_]:
    """The pixel of lung nearest to the middle of a box, or of the crop if there is no box."""
    corners = box.reshape(2, -1) if box[0] >= 0 else np.array([np.zeros(depth.ndim), depth.shape])
    pixels = np.argwhere(depth > 0)
    nearest = np.zeros(depth.shape, bool)
    if len(pixels):
        distance = np.linalg.norm(pixels - (corners.mean(axis=0) - 0.5), axis=1)
        nearest[tuple(pixels[distance.argmin()])] = True
    return nearest


@dataclass(frozen=True)
class Lender:
    """Gives planned samples the layouts, and the known voxels, of their hosts.

    Attributes:
        samples: path of the sample set.
        organs: that the model is told of.
        copies: whether what lies outside these is kept.
    """

    samples: str
    organs: tuple[str, ...]
    copies: bool

    @classmethod
    def of(cls, config: ExperimentConfig) -> Lender | None:
        """That of a recipe; None: its requests are whole, as no layout guides its model."""
        if not isinstance(config.model, LayoutGuided):
            return None
        path = f"samples/{config.samples.name}"
        return cls(path, config.model.layout_labels, config.copies)

    def __call__(self, root: zarr.Group, planned: PlannedSample) -> PlannedSample:
        """The sample with a whole condition.

        Raises:
            InputError: its layout shows nothing that the model is told of.
        """
        if planned.lent is None or planned.source_sample == NO_SOURCE:
            return planned
        samples, host = SampleSet(open_group(root, self.samples)), planned.source_sample
        own = samples.read("layout", host, host + 1)[0]
        layout = planned.lent.layout(own)
        hole = layout_hole(layout, self.organs)
        if not hole.any():
            raise InputError(
                f"sample {host} of {self.samples} shows no {' or '.join(self.organs)}: this model "
                "is told of nothing else; cut samples around lungs or nodules"
            )
        condition = replace(planned.condition, layout=layout)
        if self.copies:
            # A nodule that gives way must not stay in what is known.
            known_mask = ~(hole | layout_hole(own, self.organs))
            known_hu: NDArray[np.int16] = samples.read("hu", host, host + 1)[0]
            condition = replace(condition, known_hu=known_hu, known_mask=known_mask)
        return replace(planned, condition=condition)
