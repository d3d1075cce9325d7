"""Judges a synthetic run against the real test patients, by Ray tasks over shards."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.condition import Box
from raysynth.config import EvaluationConfig, ExperimentConfig, HoleFilling
from raysynth.config.sampling import DRAWING
from raysynth.errors import InputError
from raysynth.evaluation.adherence import (
    AttributeCoverage,
    CohortShare,
    FoundShare,
    MeanCount,
    SizeAgreement,
    attribute_coverage,
    cohort_shares,
    found_shares,
    mean_count,
    size_agreement,
)
from raysynth.evaluation.consistency import (
    Agreement,
    between_readers,
    of_readers,
    of_requests,
    train_judges,
)
from raysynth.evaluation.fills import FillQuality, fill_quality, next_to, read_holes, with_generated
from raysynth.evaluation.intervals import Arm
from raysynth.evaluation.judge import Arms, MetricResult, judge
from raysynth.evaluation.measure import HISTOGRAMS, Computed, Measures, Place
from raysynth.layout.morphology import Mask
from raysynth.metrics.features import Extractor, load_extractor
from raysynth.models.bundle import bundle_digest
from raysynth.progress import progress
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet, case_attrs, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.splits import is_indicative
from storage_schema.v1 import SPLITS

logger = logging.getLogger(__name__)

CONTROLS = ("untrained", "shuffled")
MAX_SAMPLES = 50_000
"""Samples measured of a set, whole shards at random: features of all regions stay in memory, 4 kB a
sample with `ct-conv` and 27 kB with Inception."""

NUM_STRAY_BOXES = 500

MAX_SHARE_GAP = 0.02
"""By which shares of slices without nodule may differ and still be called the same."""


@dataclass(frozen=True)
class EvaluationSummary:
    """What an evaluation found; also `work_dir`/evaluation/`name`.json.

    Attributes:
        name: of the synthetic run.
        metrics: by key `metric/space/region/extractor@version/N`.
        adherence: share of boxes with a nodule, by set (`synthetic`, `real`, the controls) and, at
            chance level, by set + `_stray`.
        sizes: measured against requested diameters, by set.
        unrequested: compact dense things in the lungs that nobody asked for, by set.
        draws: of a synthetic sample until it was accepted.
        coverage: requested scores against LIDC's, by attribute.
        cohort: what became of the shares of `sampling.cohort`, by factor and class.
        consistency: how a judge trained on real nodules agrees with the scores asked for, by set
            and attribute; `real`: with the readers of held-out nodules.
        reader_kappa: how far two readers of LIDC agree, by attribute.
        fills: of models that fill holes, how they lie in their slices, by set.
        samples: stored, by set; at most `MAX_SAMPLES` of each are measured.
        patients: real ones in all, and in the reference.
        indicative: so few patients that every figure is no more than a hint.
        notices: what a reader must know beside the figures.
        snapshot: of the store that was judged.
        seconds: wall time.
        path: the JSON file.
    """

    name: str
    metrics: dict[str, MetricResult]
    adherence: dict[str, FoundShare]
    sizes: dict[str, SizeAgreement]
    unrequested: dict[str, MeanCount]
    draws: MeanCount | None
    coverage: dict[str, AttributeCoverage]
    cohort: dict[str, dict[str, CohortShare]]
    consistency: dict[str, dict[str, Agreement]]
    reader_kappa: dict[str, float]
    fills: dict[str, FillQuality]
    samples: dict[str, int]
    patients: dict[str, int]
    indicative: bool
    notices: list[str]
    snapshot: str
    seconds: float
    path: str


def evaluate(config: ExperimentConfig) -> EvaluationSummary:
    """Judges the recipe's synthetic run, beside its controls where the store has them.

    Needs a Ray session (`raysynth.session.connect`).

    Raises:
        InputError: no synthetic run, or one of another bundle or settings; no sample set, none of
            its slices in the test split, grey values without a unit, or an extractor without its
            weights.
    """
    started = time.monotonic()
    for extractor in config.evaluation.extractors:
        load_extractor(extractor, config.evaluation.inception_weights)
    snapshot = main_snapshot(config.store_url)
    root = open_root(config.store_url, snapshot)
    sets = _open_sets(root, config)
    patients = _patients(root, sets)
    is_reference = sets["real"].index["split"] == SPLITS.index("test")
    fills, hole = {}, None
    if isinstance(config.model, HoleFilling):
        # The others are their neighbours: none may be on both sides.
        is_reference &= np.arange(len(is_reference)) % 2 == 0
        holes = read_holes(config, sets["real"], sets["synthetic"])
        hole, window_hu = holes.hole, config.model.window_hu
        fills = {
            name: fill_quality(samples, holes, patients["synthetic"], window_hu)
            for name, samples in sets.items()
            if name != "real"
        }
    measures = _measure(sets, config, hole)
    computed = {name: measured.compute() for name, measured in measures.items()}
    metrics = _judge(computed, sets, patients, is_reference, config)
    counts = {
        "real": len(np.unique(patients["real"])),
        "reference": len(np.unique(patients["real"][is_reference])),
    }
    tables = {name: measured.adherence.compute()[1] for name, measured in measures.items()}
    path = config.work_dir / "evaluation" / f"{config.name}.json"
    summary = EvaluationSummary(
        name=config.name,
        metrics=metrics,
        adherence={
            key: share
            for name, table in tables.items()
            for key, share in found_shares(table, name).items()
        },
        sizes={name: size_agreement(table) for name, table in tables.items()},
        unrequested={
            name: count
            for name, measured in measures.items()
            if (count := mean_count(measured.unrequested.compute()[1].ravel())) is not None
        },
        draws=mean_count(sets["synthetic"].index["draws"]),
        coverage=attribute_coverage(sets["synthetic"].index["attributes"]),
        cohort=_cohort(config, sets["synthetic"], measures["synthetic"]),
        consistency=_consistency(computed, sets, config.seed),
        reader_kappa=between_readers(),
        fills=fills,
        samples={name: samples.count for name, samples in sets.items()},
        patients=counts,
        indicative=is_indicative(counts["real"]),
        notices=_notices(root, sets, counts, metrics),
        snapshot=snapshot,
        seconds=time.monotonic() - started,
        path=str(path),
    )
    _write(summary, path)
    return summary


def _open_sets(root: zarr.Group, config: ExperimentConfig) -> dict[str, SampleSet]:
    """`real`, `synthetic` and the controls that the store has."""
    name = config.slices.name
    sets = {
        "real": SampleSet(open_group(root, f"samples/{name}")),
        "synthetic": SampleSet(open_group(root, f"synthetic/{config.name}")),
    }
    for control in CONTROLS:
        group = root.get(f"synthetic/{config.name}_{control}")
        if isinstance(group, zarr.Group) and config.evaluation.controls:
            sets[control] = SampleSet(group)
    real, synthetic = sets["real"], sets["synthetic"]
    _check_drawn_by(config, synthetic)
    if real.attrs["intensity"] != "hu":
        raise InputError(
            f"sample set {name} has intensity {real.attrs['intensity']!r}, and these metrics are "
            "of Hounsfield units; evaluate a set cut from HU volumes"
        )
    if real.shape != synthetic.shape or not np.isclose(real.pixel_mm, synthetic.pixel_mm):
        raise InputError(
            f"synthetic/{config.name} has slices of {synthetic.shape} pixels of "
            f"{synthetic.pixel_mm:g} mm, samples/{name} {real.shape} of {real.pixel_mm:g} mm: "
            "evaluate with the set that the model was trained on"
        )
    if not np.any(real.index["split"] == SPLITS.index("test")):
        raise InputError(
            f"no slice of samples/{name} is of a test patient, so there is nothing to judge by; "
            "ingest more patients or raise data.split.test"
        )
    return sets


def _check_drawn_by(config: ExperimentConfig, synthetic: SampleSet) -> None:
    """The run must come from the bundle and settings that its figures will be ascribed to."""
    here = config.bundle_path.exists()  # on another machine it may not be
    if here and synthetic.attrs["bundle"] != bundle_digest(config.bundle_path):
        raise InputError(
            f"synthetic/{config.name} was not drawn by the bundle that is at {config.bundle_path} "
            "now: draw another run (--set name=...), or put its bundle back"
        )
    wanted = config.sampling.model_dump(mode="json")
    for name, stored in synthetic.attrs["passport"].get("sampling", {}).items():
        if name in DRAWING and stored != wanted[name]:
            raise InputError(
                f"synthetic/{config.name} was drawn with sampling.{name} {stored}, the recipe says "
                f"{wanted[name]}: set it back, or draw another run"
            )


def _patients(root: zarr.Group, sets: dict[str, SampleSet]) -> dict[str, NDArray[np.int64]]:
    """The number of each sample's patient; of a synthetic one, of the patient who lent the layout.

    A sample on nobody's layout is its own patient, with a negative number.
    """
    numbers: dict[str, int] = {}
    patients = {}
    for name, samples in sets.items():
        of_case = [
            numbers.setdefault(case_attrs(root, case).patient_key, len(numbers))
            for case in samples.attrs["cases"]
        ]
        case = samples.index["case" if name == "real" else "source_case"]
        nobody = -1 - np.arange(len(case))
        patients[name] = np.where(case >= 0, np.array([*of_case, 0])[case], nobody)
    return patients


def _measure(
    sets: dict[str, SampleSet], config: ExperimentConfig, hole: Mask | None
) -> dict[str, Measures]:
    """Measures every set, one Ray task a shard; `hole` is of the run and its controls."""
    import ray

    task = ray.remote(num_cpus=1)(_measure_shard)
    work = {}
    for name, samples in sets.items():
        handle = ray.put(samples)
        strays = _stray_boxes(samples)
        for shard in _chosen_shards(samples):
            start, stop = samples.shard_rows(shard)
            filled = None if hole is None or name == "real" else hole[start:stop]
            future = task.remote(handle, shard, strays, config.evaluation, filled)
            work[future] = name, stop - start
    measures = {name: Measures() for name in sets}
    with progress("evaluate", sum(count for _, count in work.values())) as view:
        pending = list(work)
        while pending:
            (done,), pending = ray.wait(pending)
            name, count = work[done]
            measures[name].merge(ray.get(done))
            view.advance(count)
    return measures


def _measure_shard(
    samples: SampleSet,
    shard: int,
    strays: Sequence[Box],
    config: EvaluationConfig,
    hole: Mask | None,
) -> Measures:
    start, stop = samples.shard_rows(shard)
    measures = Measures()
    measures.update(
        start,
        samples.read("hu", start, stop),
        samples.read("layout", start, stop),
        samples.index["box"][start:stop],
        samples.pixel_mm,
        _extractors(config.extractors, config.inception_weights),
        strays,
        hole,
    )
    return measures


@lru_cache(maxsize=1)
def _extractors(names: tuple[str, ...], weights: Path | None) -> tuple[Extractor, ...]:
    """Loaded once a process: Ray's workers measure many shards."""
    return tuple(load_extractor(name, weights) for name in names)


def _chosen_shards(samples: SampleSet) -> list[int]:
    """All shards, or as many random ones as hold `MAX_SAMPLES`."""
    wanted = max(1, MAX_SAMPLES // samples.rows_per_shard)
    rng = np.random.default_rng(seed_of("shards", samples.num_shards))
    return sorted(int(shard) for shard in rng.permutation(samples.num_shards)[:wanted])


def _stray_boxes(samples: SampleSet) -> Sequence[Box]:
    """Different boxes of the set, in a random order."""
    boxes = np.unique(samples.index["box"], axis=0)
    boxes = boxes[boxes[:, 0] >= 0]
    order = np.random.default_rng(seed_of("stray boxes", len(boxes))).permutation(len(boxes))
    return [
        (int(y0), int(x0), int(y1), int(x1)) for y0, x0, y1, x1 in boxes[order[:NUM_STRAY_BOXES]]
    ]


def _judge(
    computed: dict[str, Computed],
    sets: dict[str, SampleSet],
    patients: dict[str, NDArray[np.int64]],
    is_reference: NDArray[np.bool_],
    config: ExperimentConfig,
) -> dict[str, MetricResult]:
    """All metrics, one Ray task a region and extractor."""
    import ray

    fills = isinstance(config.model, HoleFilling)
    if fills:
        computed = computed | {"real": with_generated(computed["real"])}
    elif (sets["synthetic"].index["box"] < 0).any():
        computed = {
            name: computed[name] | _by_nodule(computed[name], samples)
            for name, samples in sets.items()
        }

    def arm(name: str, place: Place) -> Arm | None:
        if place not in computed[name]:
            return None
        rows, features = computed[name][place]
        return Arm(features, patients[name][rows])

    task = ray.remote(num_cpus=1)(judge)
    futures = []
    for place, (rows, _) in computed["real"].items():
        real = arm("real", place)
        judged = {name: found for name in computed if (found := arm(name, place)) is not None}
        judged.pop("real")
        if real is None or "synthetic" not in judged:
            continue
        if fills:
            judged["neighbour"] = real.take(next_to(rows, sets["real"], is_reference))
        arms = Arms(real, real.take(is_reference[rows]), judged)
        draws, seed = config.evaluation.num_bootstrap, config.seed
        futures.append(task.remote(place, arms, draws, seed))
    results: dict[str, MetricResult] = {}
    for future in futures:
        results.update(**ray.get(future))
    return results


def _cohort(
    config: ExperimentConfig, synthetic: SampleSet, measured: Measures
) -> dict[str, dict[str, CohortShare]]:
    if config.sampling.cohort is None:
        return {}
    rows, table = measured.adherence.compute()
    texture = synthetic.index["attributes"][rows, CONDITION_ATTRIBUTES.index("texture")]
    return cohort_shares(config.sampling.cohort, texture, table)


def _consistency(
    computed: dict[str, Computed], sets: dict[str, SampleSet], seed: int
) -> dict[str, dict[str, Agreement]]:
    """Agreement of every set, read off the first extractor's features of nodule crops."""
    places = [
        (region, extractor)
        for region, extractor in computed["real"]
        if region.startswith("nodule") and extractor != HISTOGRAMS
    ]
    if not places:
        return {}
    rows, features = computed["real"][places[0]]
    ratings, split = (sets["real"].index[name][rows] for name in ("ratings", "split"))
    learns, held_out = (split == SPLITS.index(name) for name in ("train", "test"))
    judges = train_judges(features[learns], ratings[learns])
    found = {"real": of_readers(judges, features[held_out], ratings[held_out], seed)}
    for name in sets.keys() - {"real"}:
        if places[0] in computed[name]:
            rows, features = computed[name][places[0]]
            asked = sets[name].index["attributes"][rows]
            found[name] = of_requests(judges, features, asked, seed)
    return {name: agreements for name, agreements in sorted(found.items()) if agreements}


def _by_nodule(computed: Computed, samples: SampleSet) -> Computed:
    """Whole slices once more: those with a nodule (or asked for one), and the others."""
    boxed = samples.index["box"][:, 0] >= 0
    return {
        (f"all_{kind}", extractor): (rows[mask[rows]], features[mask[rows]])
        for (region, extractor), (rows, features) in computed.items()
        for kind, mask in (("nodule", boxed), ("free", ~boxed))
        if region == "all" and mask.any()
    }


def _notices(
    root: zarr.Group,
    sets: dict[str, SampleSet],
    patients: dict[str, int],
    metrics: dict[str, MetricResult],
) -> list[str]:
    real, synthetic = sets["real"], sets["synthetic"]
    notices = []
    kinds = {case_attrs(root, case).source.get("kind") for case in real.attrs["cases"]}
    if kinds == {"phantom"}:
        notices.append("all patients are phantoms: these figures are a smoke test, not evidence")
    elif "phantom" in kinds:
        notices.append("some patients are phantoms, the others real: use a store for each")
    if is_indicative(patients["real"]):
        notices.append(f"indicative only: {patients['real']} patients")
    if patients["real"] < 2:
        notices.append("one patient: there is no patient-disjoint floor")
    few = {
        key.split("/")[2]: result.reference_patients
        for key, result in metrics.items()
        if result.resampled == "samples"
    }
    if few:
        counts = ", ".join(f"{place} {count}" for place, count in sorted(few.items()))
        notices.append(
            f"few patients in the reference ({counts}): intervals draw samples instead of patients "
            "there and are too narrow"
        )
    empty, asked_empty = (
        float(np.mean(samples.index["box"][:, 0] < 0)) for samples in (real, synthetic)
    )
    if abs(empty - asked_empty) > MAX_SHARE_GAP:
        notices.append(
            f"{empty:.0%} of the slices of patients show no nodule, of the synthetic ones "
            f"{asked_empty:.0%} were asked for without: distances of whole slices and lungs stay "
            "above their floor for that"
        )
    if (synthetic.index["draws"] > 1).any():
        most = synthetic.attrs["passport"]["sampling"]["max_draws"]
        notices.append(
            f"slices without the nodule asked for were drawn again, up to {most} times: shares "
            "found, and distances, are those of a selection (controls were drawn once)"
        )
    if any(result.n <= result.dim for key, result in metrics.items() if key.startswith("fid/")):
        notices.append("FID has no more samples than dimensions somewhere: prefer KID there")
    places = {key.split("/")[2] for key in metrics}
    if not any(place.startswith("nodule") for place in places):
        notices.append("too few nodules to judge them apart")
    return notices


def _write(summary: EvaluationSummary, path: Path) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(summary), indent=1, allow_nan=False))
    os.replace(temporary, path)
    logger.info("wrote %s", path)
