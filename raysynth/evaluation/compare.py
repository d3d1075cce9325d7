"""Several recipes of one sample set, judged under one protocol: one table, with pictures."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.evaluation.report import display_window, found_share, synthetic_tiles
from raysynth.models.bundle import load_bundle, read_facts
from raysynth.progress import stage_seconds
from raysynth.report.html import ComparisonPage, write_comparison
from raysynth.sampling.batch import plan_run_samples
from raysynth.sampling.draw import SliceSampler
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

METRIC = "fid"
"""What the table shows of every region; the JSON files of the recipes have all."""

PAGE, FIGURES = "compare.html", "compare.json"


@dataclass(frozen=True)
class Contender:
    """One recipe's row.

    Attributes:
        name: of the recipe.
        family: of its model.
        parameters: of the networks that draw, an autoencoder's included.
        training_seconds: wall time of its training, without its autoencoder's.
        seconds_per_image: of a full batch, drawn on one process as the recipe says.
        memory_mib: peak of that process, or of its GPU.
        metrics: by key; see `raysynth.evaluation.judge.MetricResult`.
        adherence: shares of boxes with a nodule, by set.
    """

    name: str
    family: str
    parameters: int
    training_seconds: float
    seconds_per_image: float
    memory_mib: float
    metrics: dict[str, Any]
    adherence: dict[str, Any]


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
    contenders = [_contender(config) for config in configs]
    verdicts = [verdict(one, other) for one, other in combinations(contenders, 2)]
    folder = configs[0].work_dir / "evaluation"
    page, path = folder / PAGE, folder / FIGURES
    root = open_root(configs[0].store_url)
    pictures = {
        one.name: synthetic_tiles(SampleSet(open_group(root, f"synthetic/{one.name}")))
        for one in contenders
    }
    write_comparison(
        ComparisonPage(
            title="Recipes beside each other",
            table=table(contenders),
            verdicts=verdicts,
            galleries=pictures,
            window_hu=display_window(read_facts(configs[0].bundle_path)),
        ),
        page,
    )
    comparison = Comparison(contenders, verdicts, str(page), str(path))
    path.write_text(json.dumps(asdict(comparison), indent=1), encoding="utf-8")
    return comparison


def table(contenders: Sequence[Contender]) -> list[list[str]]:
    """Heading and rows; the last row has the floors."""
    keys = _shared_keys(contenders)
    heading = ["recipe", "family", "parameters", "training", "an image", "memory"]
    heading += [f"{METRIC.upper()} {key.split('/')[2]}" for key in keys]
    heading += ["nodule where asked", "under another's request"]
    rows = [
        [
            one.name,
            one.family,
            f"{one.parameters / 1e6:.2f} M",
            f"{one.training_seconds:.0f} s",
            f"{one.seconds_per_image:.3g} s",
            f"{one.memory_mib:.0f} MiB",
            *(_cell(one.metrics[key]["value"], one.metrics[key]["interval"]) for key in keys),
            found_share(one.adherence, "synthetic"),
            found_share(one.adherence, "shuffled"),
        ]
        for one in contenders
    ]
    first = contenders[0]
    floors = [first.metrics[key] for key in keys]
    floor_row = ["floor: other patients", *[""] * 5]
    floor_row += [
        "-" if floor["floor"] is None else _cell(floor["floor"], floor["floor_interval"])
        for floor in floors
    ]
    return [heading, *rows, [*floor_row, found_share(first.adherence, "real"), ""]]


def verdict(one: Contender, other: Contender) -> str:
    """Who is closer to the patients, region by region, where the intervals are disjoint."""
    closer: dict[str, list[str]] = {one.name: [], other.name: [], "": []}
    for key in _shared_keys([one, other]):
        region = key.split("/")[2]
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
    keys = [{key for key in one.metrics if key.startswith(f"{METRIC}/")} for one in contenders]
    return sorted(set.intersection(*keys))


def _cell(value: float, interval: Sequence[float] | None) -> str:
    if interval is None:
        return f"{value:.3g} (no interval)"
    low, high = interval
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def _contender(config: ExperimentConfig) -> Contender:
    import ray

    path = config.work_dir / "evaluation" / f"{config.name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    # A process of its own: its peak of memory is not that of the recipe before.
    task = ray.remote(
        num_cpus=config.sampling.threads_per_actor,
        num_gpus=int(config.sampling.use_gpu),
        max_calls=1,
    )(_draw_a_batch)
    seconds, memory_mib = ray.get(task.remote(config))
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
    )


def _draw_a_batch(config: ExperimentConfig) -> tuple[float, float]:
    """Seconds an image of a full batch after a first one, and the process's peak in MiB."""
    import torch

    size = config.sampling.batch_size
    few = config.sampling.model_copy(update={"num_samples": size})
    samples = SampleSet(open_group(open_root(config.store_url), f"samples/{config.slices.name}"))
    planned = plan_run_samples(config.model_copy(update={"sampling": few}), samples)
    sampler = SliceSampler(config.bundle_path, few, config.seed)
    sampler.draw(planned)
    started = time.monotonic()
    sampler.draw(planned)
    seconds = (time.monotonic() - started) / size
    if config.sampling.use_gpu:
        return seconds, torch.cuda.max_memory_allocated() / 2**20
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
