"""Judges a synthetic run against the real test patients, by Ray tasks over shards."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.config import ExperimentConfig, HoleFilling
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
    ScoreJudge,
    between_readers,
    of_readers,
    of_requests,
    train_judges,
)
from raysynth.evaluation.fills import (
    FillQuality,
    fill_quality,
    next_to,
    read_holes,
    with_generated,
)
from raysynth.evaluation.intervals import Arm
from raysynth.evaluation.judge import Arms, MetricResult, judge
from raysynth.evaluation.measure import HISTOGRAMS, Computed, Measures, Place, told
from raysynth.evaluation.notices import notices_of
from raysynth.evaluation.sets import measure_sets, open_sets, patients_of
from raysynth.evaluation.sweep import Sweep, open_scales, sweep
from raysynth.metrics.features import load_extractor
from raysynth.store.reader import SampleSet
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.splits import is_indicative
from storage_schema.v1 import SPLITS

logger = logging.getLogger(__name__)


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
        sweep: over `evaluation.guidance_scales`; None without any.
        samples: stored, by set; at most `sets.MAX_SAMPLES` of each are measured.
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
    sweep: Sweep | None
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
            its slices in the test split, another intensity, or an extractor without its weights.
    """
    started = time.monotonic()
    for name in config.evaluation.extractors:
        extractor = load_extractor(name, config.evaluation.extractor_weights)
        if extractor.spatial_dims != 2:
            raise InputError(
                f"evaluation.extractors: {name} takes volumes, and samples are slices: leave it out"
            )
    snapshot = main_snapshot(config.store_url)
    root = open_root(config.store_url, snapshot)
    sets, scales = open_sets(root, config), open_scales(config, root)
    patients = patients_of(root, sets)
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
    measures = measure_sets(sets, config, hole)
    intensity = sets["real"].attrs["intensity"]
    computed = {name: measured.compute() for name, measured in measures.items()}
    shown = {name: told(found, intensity) for name, found in computed.items()}
    metrics = _judge(shown, sets, patients, is_reference, config)
    counts = {
        "real": len(np.unique(patients["real"])),
        "reference": len(np.unique(patients["real"][is_reference])),
    }
    judges = _score_judges(computed["real"], sets["real"])
    real = sets["real"], measures["real"]
    swept = sweep(config, root, scales, *real, is_reference, judges) if scales else None
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
        consistency=_consistency(judges, computed, sets, config.seed),
        reader_kappa=between_readers(),
        fills=fills,
        sweep=swept,
        samples={name: samples.count for name, samples in sets.items()},
        patients=counts,
        indicative=is_indicative(counts["real"]),
        notices=notices_of(root, sets, counts, metrics),
        snapshot=snapshot,
        seconds=time.monotonic() - started,
        path=str(path),
    )
    _write(summary, path)
    return summary


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


def _score_judges(
    computed: Computed, real: SampleSet
) -> tuple[Place, dict[str, ScoreJudge]] | None:
    """Judges of scores, trained on nodules of training patients, and where they look.

    They read the first extractor's features of nodule crops.
    """
    places = [
        (region, extractor)
        for region, extractor in computed
        if region.startswith("nodule") and extractor != HISTOGRAMS
    ]
    if not places:
        return None
    rows, features = computed[places[0]]
    learns = real.index["split"][rows] == SPLITS.index("train")
    return places[0], train_judges(features[learns], real.index["ratings"][rows][learns])


def _consistency(
    judges: tuple[Place, dict[str, ScoreJudge]] | None,
    computed: dict[str, Computed],
    sets: dict[str, SampleSet],
    seed: int,
) -> dict[str, dict[str, Agreement]]:
    """Agreement of every set's scores with what the judges see."""
    if judges is None:
        return {}
    place, of_scores = judges
    rows, features = computed["real"][place]
    ratings, split = (sets["real"].index[name][rows] for name in ("ratings", "split"))
    held_out = split == SPLITS.index("test")
    found = {"real": of_readers(of_scores, features[held_out], ratings[held_out], seed)}
    for name in sets.keys() - {"real"}:
        if place in computed[name]:
            rows, features = computed[name][place]
            asked = sets[name].index["attributes"][rows]
            found[name] = of_requests(of_scores, features, asked, seed)
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


def _write(summary: EvaluationSummary, path: Path) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(summary), indent=1, allow_nan=False))
    os.replace(temporary, path)
    logger.info("wrote %s", path)
