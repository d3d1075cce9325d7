"""Judges a synthetic run against the real test patients, by Ray tasks over shards."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.config import ExperimentConfig, HoleFilling
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
from raysynth.evaluation.distances import judge_places
from raysynth.evaluation.diversity import Likeness, diversity
from raysynth.evaluation.fills import (
    FillQuality,
    Holes,
    LayoutHoles,
    fill_quality,
    holes_of,
    seen_window,
)
from raysynth.evaluation.findings import write_findings
from raysynth.evaluation.judge import PASTED, MetricResult
from raysynth.evaluation.measure import Computed, Measures, Place, told
from raysynth.evaluation.notices import notices_of
from raysynth.evaluation.references import measure_pasted
from raysynth.evaluation.regions import shows_nodules
from raysynth.evaluation.sensitivity import Sensitivity, sensitivity, standing
from raysynth.evaluation.sets import (
    are_phantoms,
    load_extractors,
    made_of,
    measure_sets,
    open_sets,
    patients_of,
)
from raysynth.evaluation.strata import Stratum, strata
from raysynth.evaluation.sweep import Sweep, open_scales, sweep
from raysynth.metrics.perceptual import load_lpips
from raysynth.store.reader import SampleSet
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.splits import is_indicative
from storage_schema.v1 import SPLITS

TEST = SPLITS.index("test")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSummary:
    """What an evaluation found; also `work_dir`/evaluation/`name`.json.

    Attributes:
        name: of the synthetic run.
        metrics: by key `metric/space/region/extractor@version/N`.
        standing: what each is worth, by the same keys.
        sensitivity: how metrics answer to patients made worse, by their keys without N.
        strata: of nodules, the worst first.
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
        fills: of models that fill holes or are guided by layouts, how what they made compares with
            the hosts that lent the rest, or the layout, by set.
        diversity: how alike two samples of one request are, beside real nodules that are alike, by
            metric key and set; empty without `evaluation.num_pairs`.
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
    standing: dict[str, str]
    sensitivity: dict[str, Sensitivity]
    strata: list[Stratum]
    adherence: dict[str, FoundShare]
    sizes: dict[str, SizeAgreement]
    unrequested: dict[str, MeanCount]
    draws: MeanCount | None
    coverage: dict[str, AttributeCoverage]
    cohort: dict[str, dict[str, CohortShare]]
    consistency: dict[str, dict[str, Agreement]]
    reader_kappa: dict[str, float]
    fills: dict[str, FillQuality]
    diversity: Likeness
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
            its samples in the test split, another intensity, or an extractor (or LPIPS) that lacks
            its weights or takes slices where samples are volumes (or the reverse).
    """
    started = time.monotonic()
    load_extractors(config.evaluation, len(config.samples.shape))
    if config.evaluation.lpips is not None:
        load_lpips(config.evaluation.lpips)  # a missing file is named before anything is measured
    snapshot = main_snapshot(config.store_url)
    root = open_root(config.store_url, snapshot)
    sets, scales = open_sets(root, config), open_scales(config, root)
    patients = patients_of(root, sets)
    is_reference = sets["real"].index["split"] == TEST
    if isinstance(config.model, HoleFilling):
        # The others are their neighbours: none may be on both sides.
        is_reference &= np.arange(len(is_reference)) % 2 == 0
    holes = holes_of(config, sets["real"], sets["synthetic"])
    fills = _fills(config, holes, sets, patients["synthetic"])
    measures = measure_sets(sets, config, holes)
    intensity = sets["real"].attrs["intensity"]
    computed = {name: measured.compute() for name, measured in measures.items()}
    parts = made_of(holes)
    if not isinstance(holes, Holes) and config.evaluation.controls:
        wanted = config.evaluation.num_control_samples or sets["synthetic"].count
        pasted, hosts = measure_pasted(
            sets["real"], patients["real"], wanted, config.evaluation, parts
        )
        computed[PASTED], patients[PASTED] = pasted.compute(), hosts
    shown = {name: told(found, intensity) for name, found in computed.items()}
    metrics = judge_places(shown, sets, patients, is_reference, config)
    counts = {
        "real": len(np.unique(patients["real"])),
        "reference": len(np.unique(patients["real"][is_reference])),
    }
    held_out = sets["real"].index["split"] == TEST
    answers = sensitivity(sets["real"], patients["real"], held_out, config.evaluation, parts)
    phantoms = are_phantoms(root, sets["real"])
    judges = _score_judges(computed["real"], sets["real"])
    real = sets["real"], measures["real"]
    varied = diversity(config, root, *real)
    swept = sweep(config, root, scales, *real, is_reference, judges, holes) if scales else None
    tables = {name: measured.adherence.compute()[1] for name, measured in measures.items()}
    path = config.work_dir / "evaluation" / f"{config.name}.json"
    summary = EvaluationSummary(
        name=config.name,
        metrics=metrics,
        standing={key: standing(key, answers, phantoms) for key in metrics},
        sensitivity=answers,
        strata=strata(root, shown, measures, sets, patients, is_reference, config),
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
        diversity=varied,
        sweep=swept,
        samples={name: samples.count for name, samples in sets.items()},
        patients=counts,
        indicative=is_indicative(counts["real"]),
        notices=notices_of(root, sets, counts, metrics),
        snapshot=snapshot,
        seconds=time.monotonic() - started,
        path=str(path),
    )
    write_findings(path, asdict(summary))
    logger.info("wrote %s", path)
    return summary


def _fills(
    config: ExperimentConfig,
    holes: Holes | LayoutHoles | None,
    sets: dict[str, SampleSet],
    patients: NDArray[np.int64],
) -> dict[str, FillQuality]:
    """How a run and its controls lie in their hosts, one Ray task a set."""
    import ray

    if holes is None:
        return {}
    task, handle = ray.remote(num_cpus=1)(fill_quality), ray.put(holes)
    window_hu = seen_window(config)
    futures = {
        name: task.remote(samples, handle, patients, window_hu, config.evaluation.lpips)
        for name, samples in sets.items()
        if name != "real"
    }
    return {name: ray.get(future) for name, future in futures.items()}


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
    places = [(region, extractor) for region, extractor in computed if shows_nodules(region)]
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
