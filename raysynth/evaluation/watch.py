"""Metrics while samples are drawn, by a Ray actor beside the samplers; and of whole stores."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig
from raysynth.evaluation.findings import write_findings
from raysynth.evaluation.running import RunningMetrics
from raysynth.evaluation.sets import load_extractors, space_of
from raysynth.evaluation.stream import (
    INTERVAL_S,
    MetricStream,
    Values,
    count_shard,
    is_reference,
    open_reference,
    open_run,
    reference_of,
    stream_folder,
    told_values,
)
from raysynth.progress import Progress
from raysynth.sampling.batch import SynthesisSummary, Watch, plan_mark, synthesize
from raysynth.store.reader import SampleSet

logger = logging.getLogger(__name__)

NICENESS = 10
"""Of the actor: on a busy core it gets about a tenth of what a sampler gets, which is enough."""

MAX_IN_FLIGHT = 4
"""Shards of one sampler that the stream has not counted. More are read from the store later."""

PART = "part"
"""Marks states that never leave a Ray session."""


def synthesize_watched(config: ExperimentConfig) -> SynthesisSummary:
    """`synthesize`, with FID and KID in the progress view while samples are drawn.

    The last values are those of the whole run: `work_dir`/evaluation/`name`_stream.json.

    Raises:
        InputError: as `synthesize`, or as `MetricStream`.
    """
    mark = plan_mark(config)
    load_extractors(config.evaluation, len(config.samples.shape))
    open_reference(config)
    with metric_stream(config, mark) as (name, stream):
        watch = Watch(Sender(name), partial(figures_shown, stream))
        summary = synthesize(config, watch)
        values: Values = ray.get(stream.finish.remote())
        cpu_s = ray.get(stream.cpu_seconds.remote())
    found = {
        "name": config.name,
        "snapshot": summary.snapshot,
        "samples": summary.samples,
        "metrics": {key: asdict(value) for key, value in values.items()},
        "cpu_s": cpu_s,
    }
    path = stream_folder(config).with_suffix(".json")
    write_findings(path, found)
    logger.info("wrote %s", path)
    return summary


def stream_store(config: ExperimentConfig) -> Values:
    """The values of the recipe's published run, from parts that Ray Data's workers count.

    Needs a Ray session.

    Raises:
        InputError: as `MetricStream`, or no such run.
    """
    real, run = open_reference(config), open_run(config, plan_mark(config))
    reference = reference_of(config, real, _counted(config, real, is_reference(real)))
    values = _counted(config, run, None).compute(reference, space=space_of(real))
    return told_values(values, real.attrs["intensity"])


class Sender:
    """Hands shards to a stream from where they are drawn, and never waits for it or fails by it."""

    def __init__(self, name: str) -> None:
        """Knows the stream by its actor's name, so that it can be sent anywhere."""
        self._name = name
        self._in_flight: list[ray.ObjectRef[None]] = []

    def __call__(
        self,
        first_row: int,
        hu: NDArray[np.int16],
        layout: NDArray[np.uint8],
        box: NDArray[np.int16],
    ) -> None:
        """Sends a shard, or leaves it for the end if the stream is behind."""
        if self._in_flight:
            everything = len(self._in_flight)
            _, self._in_flight = ray.wait(self._in_flight, num_returns=everything, timeout=0)
        # Ray knows no actor of that name (ValueError) once it is gone for good.
        with suppress(ValueError, ray.exceptions.RayError):
            if len(self._in_flight) < MAX_IN_FLIGHT:
                stream = ray.get_actor(self._name)
                self._in_flight.append(stream.push.remote(first_row, hu, layout, box))


@contextmanager
def metric_stream(config: ExperimentConfig, mark: str) -> Iterator[tuple[str, Any]]:
    """The name and the handle of a stream's actor, which is there for the block.

    Killed, it starts again from its saved state; calls that it had not answered are repeated.
    """
    name = f"metric-stream-{mark}"
    actor = ray.remote(_Actor).options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=-1)
    stream: Any = actor.remote(config, mark)
    try:
        yield name, stream
    finally:
        ray.kill(stream)


class _Actor(MetricStream):
    """In a process of its own that gives way to samplers."""

    def __init__(self, config: ExperimentConfig, mark: str) -> None:
        os.nice(NICENESS)
        torch.set_num_threads(1)
        super().__init__(config, mark)


@contextmanager
def figures_shown(stream: Any, view: Progress) -> Iterator[None]:
    """Asks for the current figures every second and shows them."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(INTERVAL_S):
            asked = stream.current.remote()
            while not ended.is_set() and not ray.wait([asked], timeout=INTERVAL_S)[0]:
                pass
            if not ended.is_set():
                with suppress(ray.exceptions.RayError):  # what is wrong, `finish` will say
                    view.note(**_figures(ray.get(asked)))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()


def _figures(values: Values) -> dict[str, float]:
    """`fid` and `kid`, and of how many samples."""
    figures: dict[str, float] = {key.partition("/")[0]: one.value for key, one in values.items()}
    return figures | ({"judged": max(one.n for one in values.values())} if values else {})


def _counted(
    config: ExperimentConfig, samples: SampleSet, wanted: NDArray[np.bool_] | None
) -> RunningMetrics:
    """All of a set, or some rows of it, shard by shard on the cluster."""
    # One column read beforehand travels with the set; else every task would read it.
    samples.index["box"]
    shards = ray.data.range(samples.num_shards, override_num_blocks=samples.num_shards)
    count = partial(_count_part, samples=samples, config=config, wanted=wanted)
    metrics = RunningMetrics()
    for row in shards.map(count, num_cpus=1).iter_rows():
        metrics.merge(RunningMetrics.load(row["state"], PART))
    return metrics


def _count_part(
    row: dict[str, Any],
    samples: SampleSet,
    config: ExperimentConfig,
    wanted: NDArray[np.bool_] | None,
) -> dict[str, bytes]:
    metrics = RunningMetrics()
    extractors = load_extractors(config.evaluation, len(samples.shape))
    count_shard(metrics, samples, row["id"], extractors, wanted)
    return {"state": metrics.save(PART)}
