"""A stream of metrics: takes samples as they are made, says how they do, and survives its process.

The store is the truth and a push is a short cut: samples that were pushed and lost, with a process
that died or because too many were on their way, are read from the published run at the end. So
nobody waits for a push, nothing is acknowledged, and what was saved may be old; every sample counts
once all the same, as its row does.

`MetricStream` is plain Python. An actor holds it, or a Serve replica could.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Intensity
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.evaluation.findings import replace_file
from raysynth.evaluation.judge import MIN_SAMPLES
from raysynth.evaluation.measure import Place
from raysynth.evaluation.running import Reference, RunningMetrics, RunningValue
from raysynth.evaluation.sets import PIXELS_AT_ONCE, load_extractors, patients_of, space_of
from raysynth.metrics.features import Extractor
from raysynth.metrics.running import RunningKernel
from raysynth.seeding import fingerprint
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.window import measurable
from storage_schema.v1 import SPLITS

logger = logging.getLogger(__name__)

Values = dict[str, RunningValue]

STATE_VERSION = 1
"""Of the files: others of the same run are not read."""

INTERVAL_S = 1.0
"""Values and saved states are no more frequent."""

VALUES_SHARE, SAVING_SHARE = 0.01, 0.002
"""Of one core's time: what takes long is done less often."""


class MetricStream:
    """Values of a synthetic run that is being drawn, against the real test patients."""

    def __init__(self, config: ExperimentConfig, mark: str) -> None:
        """Goes on from the saved state of the same run, if there is one.

        Args:
            config: the recipe.
            mark: `plan_mark` of its run.

        Raises:
            InputError: no sample set, too few of its slices in the test split, or an extractor
                without its weights.
        """
        self._config, self._mark = config, mark
        self._folder = stream_folder(config)
        self._samples = open_reference(config)
        self._extractors = load_extractors(config.evaluation, len(self._samples.shape))
        self._reference = self._load_reference()
        self._state_mark = fingerprint([mark, self._reference_mark])
        self._metrics = _load(self._folder / "state.npz", self._state_mark) or RunningMetrics()
        self._watched: list[Place] = [("all", self._extractors[0].name)]
        self._kernels: dict[Place, RunningKernel] = {}
        self._values: Values = {}
        self._valued = 0
        self._valuing, self._saving = _Pace(VALUES_SHARE), _Pace(SAVING_SHARE)
        # What is computed once shall not delay the next value.
        for place in self._watched:
            self._reference.floor(place)
            self._kernels[place] = RunningKernel(self._reference.real.places[place].features)
        self._value()
        self._cpu_s = {"start": time.process_time()}

    def push(
        self,
        first_row: int,
        hu: NDArray[np.int16],
        layout: NDArray[np.uint8],
        box: NDArray[np.int16],
    ) -> None:
        """Counts consecutive samples of the run, as they are stored; known ones are ignored.

        Args:
            first_row: number of the first one in the run.
            hu: slices (n, y, x) or volumes (n, z, y, x).
            layout: their labels.
            box: their boxes (n, 4) or (n, 6), -1 for none.
        """
        rows = np.arange(first_row, first_row + len(hu))
        shown = measurable(hu, self._intensity)
        if self._metrics.update(rows, shown, layout, box, self._extractors) and self._saving.is_due:
            self.save()

    def current(self) -> Values:
        """FID and KID of whole samples by the first extractor; a second old at most, if that pays.

        None for too few samples.
        """
        if self._valued != self._metrics.count and self._valuing.is_due:
            with self._valuing.working():
                self._value()
        return self._values

    def save(self) -> None:
        """Replaces the saved state in one step."""
        with self._saving.working():
            replace_file(self._folder / "state.npz", self._metrics.save(self._state_mark))

    def finish(self) -> Values:
        """Reads what the published run holds and was not counted; then every value, computed anew.

        They depend on the run alone, not on what was pushed, lost or repeated.

        Raises:
            InputError: there is no such run, or another one; features that are no numbers.
        """
        self._cpu_s["along"] = time.process_time() - self._cpu_s["start"]
        run = open_run(self._config, self._mark)
        for shard in range(run.num_shards):
            count_shard(self._metrics, run, shard, self._extractors)
        self.save()
        values = self._metrics.compute(self._reference, space=space_of(self._samples))
        return told_values(values, self._intensity)

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time of this process until it could count, until it had to finish, and then.

        A stream that was killed and started again tells of its last process.
        """
        before = sum(self._cpu_s.values())
        return self._cpu_s | {"end": time.process_time() - before}

    def _value(self) -> None:
        self._valued = self._metrics.count
        space = space_of(self._samples)
        values = self._metrics.compute(self._reference, self._watched, self._kernels, space)
        self._values = told_values(values, self._intensity)

    @property
    def _intensity(self) -> Intensity:
        intensity: Intensity = self._samples.attrs["intensity"]
        return intensity

    @property
    def _reference_mark(self) -> str:
        names = [extractor.name for extractor in self._extractors]
        return fingerprint([STATE_VERSION, self._samples.attrs["fingerprint"], names])

    def _load_reference(self) -> Reference:
        path, mark = self._folder / "reference.npz", self._reference_mark
        metrics = _load(path, mark)
        if metrics is None:
            metrics, wanted = RunningMetrics(), is_reference(self._samples)
            for shard in range(self._samples.num_shards):
                count_shard(metrics, self._samples, shard, self._extractors, wanted)
            replace_file(path, metrics.save(mark))
        return reference_of(self._config, self._samples, metrics)


def stream_folder(config: ExperimentConfig) -> Path:
    """Where the stream of a recipe's run keeps its state."""
    return config.work_dir / "evaluation" / f"{config.name}_stream"


def open_reference(config: ExperimentConfig) -> SampleSet:
    """The real samples that the run is compared with.

    Raises:
        InputError: no sample set, or too few of its slices in the test split.
    """
    samples = SampleSet(open_group(open_root(config.store_url), f"samples/{config.samples.name}"))
    count = np.count_nonzero(is_reference(samples))
    if count < MIN_SAMPLES:
        raise InputError(
            f"samples/{config.samples.name} has {count} {space_of(samples)}s of test patients, and "
            f"evaluation.stream compares with at least {MIN_SAMPLES}: ingest more patients, raise "
            "data.split.test, or leave it out"
        )
    return samples


def is_reference(samples: SampleSet) -> NDArray[np.bool_]:
    """Which real samples others are compared with: those of test patients."""
    wanted: NDArray[np.bool_] = samples.index["split"] == SPLITS.index("test")
    return wanted


def reference_of(
    config: ExperimentConfig, samples: SampleSet, metrics: RunningMetrics
) -> Reference:
    """What was counted of the real samples, with the patients that their floors keep apart."""
    root = open_root(config.store_url)
    return Reference(metrics, patients_of(root, {"real": samples})["real"])


def open_run(config: ExperimentConfig, mark: str) -> SampleSet:
    """The published run.

    Raises:
        InputError: there is none, or it was drawn from another plan.
    """
    run = SampleSet(open_group(open_root(config.store_url), f"synthetic/{config.name}"))
    if run.attrs["plan"] != mark:
        raise InputError(
            f"synthetic/{config.name} was drawn by another bundle or plan: give this run another "
            "name (--set name=...)"
        )
    return run


def count_shard(
    metrics: RunningMetrics,
    samples: SampleSet,
    shard: int,
    extractors: Sequence[Extractor],
    wanted: NDArray[np.bool_] | None = None,
) -> None:
    """Counts the samples of a stored shard that are not counted yet.

    Args:
        metrics: counts them.
        samples: a sample set or a synthetic run.
        shard: number of the shard; it is not read if all of it is known.
        extractors: of features.
        wanted: which rows of the set; None: all.
    """
    start, stop = samples.shard_rows(shard)
    rows = np.arange(start, stop)
    new = ~metrics.has(rows) if wanted is None else wanted[start:stop] & ~metrics.has(rows)
    if not new.any():
        return
    hu, layout = (samples.read(name, start, stop)[new] for name in ("hu", "layout"))
    rows, box = rows[new], samples.index["box"][rows[new]]
    block = max(1, PIXELS_AT_ONCE // int(np.prod(samples.shape)))
    for first in range(0, len(rows), block):
        some = slice(first, first + block)
        shown = measurable(hu[some], samples.attrs["intensity"])
        metrics.update(rows[some], shown, layout[some], box[some], extractors)


def told_values(values: Values, intensity: Intensity) -> Values:
    """Values of grey values without a unit go under another key, as in `measure.told`."""
    if intensity == "hu":
        return values
    return {key.replace("@", "-relative@"): value for key, value in values.items()}


def _load(path: Path, mark: str) -> RunningMetrics | None:
    """A saved state, if there is one of this mark: all of it can be had from the store again."""
    try:
        return RunningMetrics.load(path.read_bytes(), mark)
    except FileNotFoundError:
        return None
    except InputError as error:
        logger.warning("%s: %s; it is made again", path, error)
        return None


class _Pace:
    """Something that is worth doing every second, but no more than a share of the time."""

    def __init__(self, share: float) -> None:
        self._share, self._not_before = share, 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._not_before

    @contextmanager
    def working(self) -> Iterator[None]:
        # Processor time: a process that gives way waits long for little.
        started = time.process_time()
        yield
        pause_s = (time.process_time() - started) / self._share
        self._not_before = time.monotonic() + max(INTERVAL_S, pause_s)
