"""Several recipes of one sample set, judged under one protocol: one table, with pictures."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import zarr

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.evaluation.regions import is_generated
from raysynth.evaluation.report import (
    display_window,
    fill_texts,
    found_share,
    real_tiles,
    synthetic_tiles,
)
from raysynth.evaluation.scorecard import Line, card_table, figure_text
from raysynth.models.bundle import load_bundle, read_facts
from raysynth.progress import stage_seconds
from raysynth.report.html import ComparisonPage, write_comparison
from raysynth.report.pictures import DISPLAY_WINDOW_HU
from raysynth.sampling.batch import plan_run_samples
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.layouts import Lender
from raysynth.sampling.planner import PlannedSample
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

METRIC = "fid"
"""What the table shows of every region; the JSON files of the recipes have all."""

REFERENCES = {
    "floor": "floor: other patients",
    "neighbour": "floor: neighbouring slices",
    "constant": "no network: tissue means",
}
"""Columns beside the recipes; the last two are of models that fill holes."""

PAGE, FIGURES = "compare.html", "compare.json"


@dataclass(frozen=True)
class Contender:
    """One recipe's row.

    Attributes:
        name: of the recipe.
        family: of its model.
        parameters: of the networks that draw, an autoencoder's included.
        training_seconds: wall time of its training, without its autoencoder's; 0: not known here.
        seconds_per_image: of a full batch, drawn on one process as the recipe says.
        memory_mib: peak of that process, or of its GPU.
        metrics: by key; see `raysynth.evaluation.judge.MetricResult`.
        adherence: shares of boxes with a nodule, by set.
        fills: of models that fill holes, how they lie in their slices, by set.
        scorecard: of its evaluation.
        notices: what a reader must know beside the figures.
    """

    name: str
    family: str
    parameters: int
    training_seconds: float
    seconds_per_image: float
    memory_mib: float
    metrics: dict[str, Any]
    adherence: dict[str, Any]
    fills: dict[str, Any]
    scorecard: list[Line]
    notices: list[str]


@dataclass(frozen=True)
class Comparison:
    """All rows, and where they are written."""

    contenders: list[Contender]
    verdicts: list[str]
    page: str
    path: str


def check_comparable(configs: Sequence[ExperimentConfig]) -> None:
    """Recipes compare on one sample set of one store.

    Raises:
        InputError: fewer than two, two of one name, or of different sets.
    """
    if len(configs) < 2:
        raise InputError(f"compare got {len(configs)} recipe: give two or more")
    first = configs[0]
    for other in configs[1:]:
        for what, one, two in (
            ("store", first.store_url, other.store_url),
            ("data.samples", first.data.samples, other.data.samples),
            ("data.source", first.data.source, other.data.source),
        ):
            if one != two:
                raise InputError(
                    f"{first.name} and {other.name} have different {what}: recipes are compared "
                    "on one sample set of one store"
                )
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise InputError(f"compare got {', '.join(names)}: give each recipe once")


def compare(configs: Sequence[ExperimentConfig]) -> Comparison:
    """Puts recipes beside each other that have been evaluated, and writes page and figures.

    Needs a Ray session (`raysynth.session.connect`).

    Raises:
        InputError: see `check_comparable`.
    """
    check_comparable(configs)
    first = configs[0]
    root = open_root(first.store_url)
    real = SampleSet(open_group(root, f"samples/{first.samples.name}"))
    contenders = [_contender(config, root, real) for config in configs]
    verdicts = [verdict(one, other) for one, other in combinations(contenders, 2)]
    folder = first.work_dir / "evaluation"
    page, path = folder / PAGE, folder / FIGURES
    windows = {display_window(read_facts(config.bundle_path)) for config in configs}
    write_comparison(
        ComparisonPage(
            title="Recipes beside each other",
            notices=list(dict.fromkeys(said for one in contenders for said in one.notices)),
            table=table(contenders),
            distances=distances(contenders),
            verdicts=verdicts,
            scorecards={one.name: card_table(one.scorecard) for one in contenders},
            real=real_tiles(real),
            galleries={
                one.name: synthetic_tiles(SampleSet(open_group(root, f"synthetic/{one.name}")))
                for one in contenders
            },
            window_hu=windows.pop() if len(windows) == 1 else DISPLAY_WINDOW_HU,
        ),
        page,
    )
    comparison = Comparison(contenders, verdicts, str(page), str(path))
    path.write_text(json.dumps(asdict(comparison), indent=1), encoding="utf-8")
    return comparison


def table(contenders: Sequence[Contender]) -> list[list[str]]:
    """What each recipe costs and whether it does as it is asked: heading and a row for each."""
    fills = all(one.fills for one in contenders)
    heading = ["recipe", "family", "parameters", "training", "an image", "memory"]
    heading += (
        ["pixels changed outside the hole", "step across its border", "filled for another slice"]
        if fills
        else ["nodule where asked", "under another's request"]
    )
    rows = [
        [
            one.name,
            one.family,
            f"{one.parameters / 1e6:.2f} M",
            f"{one.training_seconds:.0f} s" if one.training_seconds else "-",
            f"{one.seconds_per_image:.3g} s",
            f"{one.memory_mib:.0f} MiB",
            *(
                fill_texts(one.fills)
                if fills
                else [found_share(one.adherence, name) for name in ("synthetic", "shuffled")]
            ),
        ]
        for one in contenders
    ]
    return [heading, *rows]


def distances(contenders: Sequence[Contender]) -> list[list[str]]:
    """Heading, and a row for each region: every recipe beside what real slices reach."""
    keys = _shared_keys(contenders)
    metrics = contenders[0].metrics
    references = {
        name: text
        for name, text in REFERENCES.items()
        if name == "floor" or any(name in metrics[key]["columns"] for key in keys)
    }
    heading = [f"{METRIC.upper()} of", "N", *(one.name for one in contenders)]
    heading += references.values()
    rows = [
        [
            _region(key),
            f"{metrics[key]['n']}",
            *(figure_text(one.metrics[key]) for one in contenders),
            *(figure_text(metrics[key]["columns"].get(reference)) for reference in references),
        ]
        for key in keys
    ]
    return [heading, *rows]


def verdict(one: Contender, other: Contender) -> str:
    """Who is closer to the patients, region by region, where the intervals are disjoint."""
    closer: dict[str, list[str]] = {one.name: [], other.name: [], "": []}
    for key in _shared_keys([one, other]):
        region = _region(key)
        (low, high), (other_low, other_high) = (c.metrics[key]["interval"] for c in (one, other))
        if high < other_low:
            closer[one.name].append(region)
        elif other_high < low:
            closer[other.name].append(region)
        else:
            closer[""].append(region)
    said = [
        f"{name} is closer in {', '.join(regions)}"
        for name, regions in closer.items()
        if name and regions
    ]
    if closer[""]:
        said.append(f"no difference is certain in {', '.join(closer[''])}")
    return f"{one.name} and {other.name}: {'; '.join(said)} ({METRIC.upper()})."


def _shared_keys(contenders: Sequence[Contender]) -> list[str]:
    """One key for each region and extractor: with neighbours if it can be, then of the largest N.

    Parts that were generated stand first: the rest of a filled slice is copied, and flatters.
    """
    keys = [{key for key in one.metrics if key.startswith(f"{METRIC}/")} for one in contenders]
    metrics = contenders[0].metrics
    best: dict[str, str] = {}
    for key in sorted(
        set.intersection(*keys),
        key=lambda key: ("neighbour" in metrics[key]["columns"], int(key.split("/")[-1])),
    ):
        best[key.rpartition("/")[0]] = key
    return sorted(best.values(), key=lambda key: (not is_generated(key.split("/")[2]), key))


def _region(key: str) -> str:
    return key.split("/")[2].replace("_", " ")


def _contender(config: ExperimentConfig, root: zarr.Group, samples: SampleSet) -> Contender:
    import ray

    path = config.work_dir / "evaluation" / f"{config.name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    size = config.sampling.batch_size
    few = config.sampling.model_copy(update={"num_samples": size})
    planned = plan_run_samples(config.model_copy(update={"sampling": few}), samples)
    if (lender := Lender.of(config)) is not None:
        planned = [lender(root, one) for one in planned]
    # A process of its own, which has planned nothing: its peak of memory is that of drawing.
    task = ray.remote(
        num_cpus=config.sampling.threads_per_actor,
        num_gpus=int(config.sampling.use_gpu),
        max_calls=1,
    )(_draw_a_batch)
    seconds, memory_mib = ray.get(task.remote(config, planned, samples.shape[-1]))
    bundle = load_bundle(config.bundle_path)
    networks = (bundle.autoencoder, bundle.denoiser, bundle.generator)
    return Contender(
        name=config.name,
        family=config.model.family,
        parameters=sum(p.numel() for n in networks if n is not None for p in n.parameters()),
        training_seconds=stage_seconds(config.work_dir).get(f"train {config.name}", 0.0),
        seconds_per_image=seconds,
        memory_mib=memory_mib,
        metrics=found["metrics"],
        adherence=found["adherence"],
        fills=found["fills"],
        scorecard=[Line(**line) for line in found["scorecard"]],
        notices=found["notices"],
    )


def _draw_a_batch(
    config: ExperimentConfig, planned: Sequence[PlannedSample], size: int
) -> tuple[float, float]:
    """Seconds an image of a full batch after a first one, and the process's peak in MiB."""
    import torch

    sampler = BundleSampler(config.bundle_path, config.sampling, config.seed, size)
    sampler.draw(planned)
    started = time.monotonic()
    sampler.draw(planned)
    seconds = (time.monotonic() - started) / len(planned)
    if config.sampling.use_gpu:
        return seconds, torch.cuda.max_memory_allocated() / 2**20
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
