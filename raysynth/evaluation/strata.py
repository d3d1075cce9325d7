"""Where a model is worst: distances and adherence of nodules by size, score, place and slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.config import ExperimentConfig
from raysynth.evaluation.adherence import FoundShare, found_shares
from raysynth.evaluation.consistency import mean_scores, rounded
from raysynth.evaluation.intervals import Arm
from raysynth.evaluation.judge import Arms, MetricResult, judge
from raysynth.evaluation.measure import ADHERENCE_COLUMNS, Computed, Measures, Place
from raysynth.evaluation.regions import shows_nodules
from raysynth.evaluation.sets import space_of
from raysynth.sampling.cohort import DIAMETERS, diameter_class
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet, VolumeAttrs, case_attrs

DISTANCE = "kid"
"""Unbiased, so that strata of different sizes can be put in one order."""

MAX_STRATUM = 512
"""Nodules of a stratum that are compared at most: there are many strata."""

LUNGS = ("left lung", "right lung")
ZONES = ("lower", "middle", "upper")
"""Thirds of the lungs' height. Lobes are annotated in no source that raysynth reads."""

THICKNESSES = ("to 1.25", "1.25 to 2.5", "above 2.5")
THICKNESS_EDGES_MM = (1.25, 2.5)

UNKNOWN = -1

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Stratum:
    """Nodules of one kind.

    Attributes:
        factor: `diameter_mm`, one of the five scores, `lung`, `zone` or `slice_thickness_mm`.
        name: of the class.
        synthetic: nodules that were asked for of this kind.
        reference: real ones of it that they are compared with.
        key: of the distance; None: fewer than `judge.MIN_SAMPLES` on a side.
        distance: KID of nodule crops.
        found: share of the synthetic ones that were found where they were asked for.
    """

    factor: str
    name: str
    synthetic: int
    reference: int
    key: str | None
    distance: MetricResult | None
    found: FoundShare


@dataclass(frozen=True)
class _Nodules:
    """Nodules of one set: features, patients, and their class by factor, row by row alike."""

    arm: Arm
    adherence: NDArray[np.float32]
    classes: Mapping[str, Classes]


def strata(
    root: zarr.Group,
    computed: Mapping[str, Computed],
    measures: Mapping[str, Measures],
    sets: Mapping[str, SampleSet],
    patients: Mapping[str, NDArray[np.int64]],
    is_reference: NDArray[np.bool_],
    config: ExperimentConfig,
) -> list[Stratum]:
    """Every stratum of nodules, the worst first; those without a distance come last.

    Args:
        root: of the store.
        computed: features as they may be told, of `real` and `synthetic`.
        measures: what was measured of both.
        sets: both.
        patients: number of each sample's patient.
        is_reference: real samples that others are judged by.
        config: the recipe.
    """
    import ray

    place = _place(computed)
    if place is None:
        return []
    real, synthetic = (
        _nodules(root, place, computed[name], measures[name], sets, name, patients[name])
        for name in ("real", "synthetic")
    )
    rows, space = computed["real"][place][0], space_of(sets["real"])
    task = ray.remote(num_cpus=1)(_stratum)
    futures = [
        task.remote(
            (space, place), (factor, name, number), real, synthetic, is_reference[rows], config
        )
        for factor, names in _factors().items()
        for number, name in enumerate(names)
        if (synthetic.classes[factor] == number).any()
    ]
    found: list[Stratum] = ray.get(futures)
    return sorted(found, key=lambda one: np.inf if one.distance is None else -one.distance.value)


def _factors() -> dict[str, Sequence[str]]:
    scores = {name: tuple("12345") for name in CONDITION_ATTRIBUTES}
    return {
        "diameter_mm": DIAMETERS,
        **scores,
        "lung": LUNGS,
        "zone": ZONES,
        "slice_thickness_mm": THICKNESSES,
    }


def _place(computed: Mapping[str, Computed]) -> Place | None:
    """Nodule crops by the last extractor, if either side has any."""
    places = [
        place
        for place, (rows, _) in computed["real"].items()
        if shows_nodules(place[0])
        and len(rows)
        and place in computed["synthetic"]
        and len(computed["synthetic"][place][0])
    ]
    return places[-1] if places else None


def _nodules(
    root: zarr.Group,
    place: Place,
    computed: Computed,
    measures: Measures,
    sets: Mapping[str, SampleSet],
    name: str,
    patients: NDArray[np.int64],
) -> _Nodules:
    rows, features = computed[place]
    boxed, table = measures.adherence.compute()
    adherence = table[np.searchsorted(boxed, rows)]
    column = dict(zip(ADHERENCE_COLUMNS, adherence.T, strict=True))
    samples = sets[name]
    if name == "real":
        means = mean_scores(samples.index["ratings"][rows])
        scores = {
            attribute: np.where(np.isfinite(of_readers), rounded(of_readers), 0).astype(int)
            for attribute, of_readers in means.items()
        }
        source = rows
    else:
        asked = samples.index["attributes"][rows].astype(int)
        scores = dict(zip(CONDITION_ATTRIBUTES, asked.T, strict=True))
        source = samples.index["source_sample"][rows]
    classes = {attribute: values - 1 for attribute, values in scores.items()}
    classes["diameter_mm"] = np.array([diameter_class(mm) for mm in column["requested_mm"]], int)
    classes["lung"] = column["lung"].astype(int) - 1
    boxed, boxes = measures.boxes.compute()
    box = boxes[np.searchsorted(boxed, rows)]
    lent = source >= 0
    places, thicknesses = _of_places(root, sets["real"], source[lent], box[lent])
    for factor, found in (("zone", places), ("slice_thickness_mm", thicknesses)):
        classes[factor] = np.full(len(rows), UNKNOWN)
        classes[factor][lent] = found
    return _Nodules(Arm(features, patients[rows]), adherence, classes)


def _of_places(
    root: zarr.Group, real: SampleSet, rows: NDArray[np.int64], box: NDArray[np.float32]
) -> tuple[Classes, Classes]:
    """Zone and class of thickness of nodules by the real samples they lie in, and their boxes."""
    cases = [case_attrs(root, case) for case in real.attrs["cases"]]
    of_case = real.index["case"][rows]
    zones = np.full(len(rows), UNKNOWN)
    for number, case in enumerate(cases):
        of_this = of_case == number
        z_mm = _height_mm(real, rows[of_this], box[of_this], case)
        zones[of_this] = _zones(z_mm, case)
    mm = np.array([case.spacing_mm[0] for case in cases])
    return zones, np.searchsorted(THICKNESS_EDGES_MM, mm - 1e-3)[of_case]


def _height_mm(
    real: SampleSet, rows: NDArray[np.int64], box: NDArray[np.float32], case: VolumeAttrs
) -> NDArray[np.float32]:
    """Along the case's first axis, from its first plane; of a volume, the middle of the box."""
    if space_of(real) == "slice":
        of_slice: NDArray[np.float32] = real.index["z_mm"][rows]
        return of_slice
    # A volume's own first axis runs towards the head, the case's perhaps away from it.
    upwards = 1 if case.direction[0, 0] >= 0 else -1
    from_middle_mm = ((box[:, 0] + box[:, 3] - real.shape[0]) / 2) * real.pixel_mm
    height: NDArray[np.float32] = real.index["middle_mm"][rows, 0] + upwards * from_middle_mm
    return height


def _zones(z_mm: NDArray[np.float32], case: VolumeAttrs) -> Classes:
    """Thirds of the lungs' height; unknown where the lungs are one plane, or none."""
    if case.lung_zyx is None or case.lung_zyx[0][1] - case.lung_zyx[0][0] < len(ZONES):
        return np.full(len(z_mm), UNKNOWN)
    start, stop = (plane * case.spacing_mm[0] for plane in case.lung_zyx[0])
    third = np.floor((z_mm - start) / (stop - start) * len(ZONES))
    zones: Classes = np.clip(third, 0, len(ZONES) - 1).astype(np.int64)
    return zones


def _stratum(
    where: tuple[str, Place],
    kind: tuple[str, str, int],
    real: _Nodules,
    synthetic: _Nodules,
    is_reference: NDArray[np.bool_],
    config: ExperimentConfig,
) -> Stratum:
    (space, (region, extractor)), (factor, name, number) = where, kind
    of_real, of_synthetic = (side.classes[factor] == number for side in (real, synthetic))
    rng = np.random.default_rng(seed_of("stratum", factor, name))
    reference = real.arm.take(of_real & is_reference).draw(MAX_STRATUM, rng)
    judged = synthetic.arm.take(of_synthetic).draw(MAX_STRATUM, rng)
    results = judge(
        (f"{region}[{factor}={name}]", extractor),
        Arms(real.arm.take(of_real), reference, {"synthetic": judged}),
        config.evaluation.num_bootstrap,
        config.seed,
        (DISTANCE,),
        space,
    )
    key, distance = next(iter(results.items()), (None, None))
    return Stratum(
        factor=factor,
        name=name,
        synthetic=int(np.count_nonzero(of_synthetic)),
        reference=len(reference),
        key=key,
        distance=distance,
        found=found_shares(synthetic.adherence[of_synthetic], name)[name],
    )
