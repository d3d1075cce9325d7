"""Running metrics over HTTP: samples are pushed, or a run is pointed at; values come back live."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.evaluation.findings import replace_file
from raysynth.evaluation.judge import MIN_SAMPLES
from raysynth.evaluation.measure import Place
from raysynth.evaluation.running import Reference, RunningMetrics
from raysynth.evaluation.sets import load_extractors
from raysynth.evaluation.stream import count_shard, is_reference, open_reference, reference_of
from raysynth.metrics.frechet import frechet_distance_of
from raysynth.metrics.kernel import gaussian_mmd2
from raysynth.metrics.samples import Features
from raysynth.seeding import fingerprint
from raysynth.serving.schemas import LiveValue
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.window import measurable

Role = Literal["real", "synthetic"]
Origin = Literal["store", "sent"]
"""Where the real samples come from."""

STATE_VERSION = 1

SERVICE = ""
"""Owner of the service's own stream, which no token has."""

JACKKNIFE_BLOCKS = 10
Z_95 = 1.96


class LiveMetrics:
    """Two growing sets of samples, real and synthetic, and how far they are from each other.

    What is acknowledged is on the disk.
    """

    def __init__(self, config: ExperimentConfig, folder: Path, reference: Origin):
        """Goes on from what is in the folder.

        Args:
            config: the recipe: extractors, and the store's real samples.
            folder: of this stream; it is made.
            reference: real samples are the store's test patients, or those that are sent.

        Raises:
            InputError: no sample set, or too few of its test patients' samples.
        """
        self.config, self.folder, self.reference = config, folder, reference
        self._dims = len(config.samples.shape)
        self._extractors = load_extractors(config.evaluation, self._dims)
        names = [extractor.name for extractor in self._extractors]
        self._mark = fingerprint([STATE_VERSION, names, reference, config.samples.model_dump()])
        folder.mkdir(parents=True, exist_ok=True)
        self.sets = {role: self._load(role) for role in ("real", "synthetic")}
        self._patients: list[int] = self._load_patients()
        self._values: dict[str, LiveValue] = {}
        self._valued: dict[Role, int] | None = None
        if reference == "store" and self.sets["real"].count == 0:
            self._count_reference(open_reference(config))

    def push(
        self,
        role: Role,
        first_row: int | None,
        hu: NDArray[np.int16],
        layout: NDArray[np.uint8] | None = None,
        box: NDArray[np.int16] | None = None,
        patient: NDArray[np.int64] | None = None,
    ) -> int:
        """Counts samples; the same rows again change nothing. Durable when this returns.

        Args:
            role: which set.
            first_row: number of the first one in its set; None: they follow what is there.
            hu: (n, y, x) or (n, z, y, x).
            layout: labels; None: the whole samples alone are compared.
            box: boxes of nodules, -1 for none.
            patient: of each real sample, so that floors keep patients apart; None: one each.

        Returns:
            How many were new.

        Raises:
            InputError: another shape, or real samples where the store's are the reference.
        """
        if role == "real" and self.reference == "store":
            raise InputError("role real: this stream compares with the store's test patients")
        shape = self.config.samples.shape
        if hu.shape[1:] != shape or not len(hu):
            raise InputError(f"hu of shape {hu.shape}: give (n, {', '.join(map(str, shape))})")
        for what, part, of_part in (
            ("layout", layout, hu.shape),
            ("box", box, (len(hu), 2 * self._dims)),
            ("patient", patient, (len(hu),)),
        ):
            if part is not None and part.shape != of_part:
                raise InputError(f"{what} of shape {part.shape}: give {of_part}")
        hu, layout, box = _as_stored(hu, layout, box)
        metrics = self.sets[role]
        first = metrics.count if first_row is None else first_row
        if first > metrics.count:
            raise InputError(f"first_row {first}: {metrics.count} samples are there; send them all")
        rows = np.arange(first, first + len(hu))
        new = metrics.update(rows, measurable(hu, "hu"), layout, box, self._extractors)
        if role == "real" and new:
            told = rows if patient is None else patient
            self._patients = [*self._patients[:first], *(int(one) for one in told)]
            replace_file(self.folder / "patients.json", json.dumps(self._patients).encode())
        if new:
            replace_file(self.folder / f"{role}.npz", metrics.save(self._mark))
        return new

    def count_run(self, name: str) -> int:
        """Counts a published run of the recipe's store as the synthetic set.

        Raises:
            InputError: no such run, or samples were counted already.
        """
        run = SampleSet(open_group(open_root(self.config.store_url), f"synthetic/{name}"))
        metrics = self.sets["synthetic"]
        for shard in range(run.num_shards):
            count_shard(metrics, run, shard, self._extractors)
        replace_file(self.folder / "synthetic.npz", metrics.save(self._mark))
        return metrics.count

    def values(self) -> dict[str, LiveValue]:
        """FID, KID and MMD by key `metric/space/region/extractor@version`; none of too few.

        Computed once for the samples that are there, however many ask.
        """
        if self._valued != self.counts():
            self._values, self._valued = self._compute(), self.counts()
        return self._values

    def _compute(self) -> dict[str, LiveValue]:
        real, synthetic = self.sets["real"], self.sets["synthetic"]
        if real.count < MIN_SAMPLES:
            return {}
        reference = self._reference(real)
        space = "slice" if self._dims == 2 else "volume"
        found: dict[str, LiveValue] = {}
        for key, value in synthetic.compute(reference, space=space).items():
            metric, _, region, extractor = key.split("/")
            place: Place = (region, extractor)
            own = synthetic.places[place].features
            other = reference.real.places[place].features
            n, n_reference = value.n, value.n_reference
            if metric == "kid":
                spread = None if value.std is None else Z_95 * value.std
                mmd = gaussian_mmd2(other, own)
                of_mmd = _spread(own, partial(gaussian_mmd2, other))
                found[key.replace("kid", "mmd2", 1)] = _live(mmd, of_mmd, len(own), len(other))
            else:
                spread = _spread(own, partial(frechet_distance_of, other))
            found[key] = _live(value.value, spread, n, n_reference, value.floor)
        return found

    def counts(self) -> dict[Role, int]:
        """Samples of each set."""
        return {"real": self.sets["real"].count, "synthetic": self.sets["synthetic"].count}

    def _reference(self, real: RunningMetrics) -> Reference:
        if self.reference == "store":
            return reference_of(self.config, open_reference(self.config), real)
        return Reference(real, np.array(self._patients, np.int64))

    def _count_reference(self, samples: SampleSet) -> None:
        wanted = is_reference(samples)
        for shard in range(samples.num_shards):
            count_shard(self.sets["real"], samples, shard, self._extractors, wanted)
        replace_file(self.folder / "real.npz", self.sets["real"].save(self._mark))

    def _load(self, role: str) -> RunningMetrics:
        path = self.folder / f"{role}.npz"
        if not path.exists():
            return RunningMetrics()
        return RunningMetrics.load(path.read_bytes(), self._mark)

    def _load_patients(self) -> list[int]:
        path = self.folder / "patients.json"
        return list(json.loads(path.read_text())) if path.exists() else []


def _as_stored(
    hu: NDArray[Any], layout: NDArray[Any] | None, box: NDArray[Any] | None
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.int16]]:
    """Arrays as the store would hold them; background and no box where nothing is said."""
    limits = np.iinfo(np.int16)
    if not np.isfinite(hu).all() or hu.min() < limits.min or hu.max() > limits.max:
        raise InputError(f"hu: give numbers from {limits.min} to {limits.max}")
    shown = np.zeros(hu.shape, np.uint8) if layout is None else layout.astype(np.uint8)
    none = np.full((len(hu), 2 * (hu.ndim - 1)), -1, np.int16)
    boxes = none if box is None else box.astype(np.int16)
    return np.rint(hu).astype(np.int16), shown, boxes


def _live(
    value: float, spread: float | None, n: int, n_reference: int, floor: float | None = None
) -> LiveValue:
    low, high = (None, None) if spread is None else (value - spread, value + spread)
    return LiveValue(value=value, low=low, high=high, n=n, n_reference=n_reference, floor=floor)


def _spread(features: Features, of: Callable[[Features], float]) -> float | None:
    """Half the 95 % interval of a value, by leaving out a tenth of the samples at a time."""
    if len(features) < 2 * MIN_SAMPLES:
        return None
    block = np.arange(len(features)) % JACKKNIFE_BLOCKS
    left_out = np.array([of(features[block != one]) for one in range(JACKKNIFE_BLOCKS)])
    share = (JACKKNIFE_BLOCKS - 1) / JACKKNIFE_BLOCKS
    return Z_95 * float(np.sqrt(share * ((left_out - left_out.mean()) ** 2).sum()))


class MetricsKeeper:
    """A Ray Serve replica that holds the streams of all owners.

    Ray Serve calls it from many threads; a stream has one caller at a time.
    """

    def __init__(self, config: ExperimentConfig, folder: Path) -> None:
        """Opens nothing before it is asked for."""
        self.config, self.folder = config, folder
        self._streams: dict[tuple[str, str], LiveMetrics] = {}
        self._locks: dict[tuple[str, str], threading.Lock] = {}

    def create(self, owner: str, name: str, reference: Origin) -> dict[str, Any]:
        """Opens a stream; one that is there already must have the same reference."""
        with self._alone(owner, name):
            about = self._place(owner, name) / "about.json"
            if about.exists() and json.loads(about.read_text())["reference"] != reference:
                raise InputError(f"name {name}: there is such a stream with another reference")
            self._streams[owner, name] = LiveMetrics(self.config, about.parent, reference)
            replace_file(about, json.dumps({"name": name, "reference": reference}).encode())
        return self.read(owner, name)

    def names(self, owner: str) -> list[dict[str, str]]:
        """Name and reference of an owner's streams, sorted."""
        found = [(file, json.loads(file.read_text())) for file in self.folder.glob("*/about.json")]
        own = [one for file, one in found if file.parent == self._place(owner, one["name"])]
        return sorted(own, key=lambda one: one["name"])

    def push(self, owner: str, name: str, role: Role, first_row: int | None, **arrays: Any) -> int:
        """See `LiveMetrics.push`."""
        with self._alone(owner, name):
            return self._stream(owner, name).push(role, first_row, **arrays)

    def count_run(self, owner: str, name: str, run: str) -> int:
        """See `LiveMetrics.count_run`."""
        with self._alone(owner, name):
            return self._stream(owner, name).count_run(run)

    def read(self, owner: str, name: str) -> dict[str, Any]:
        """Values and counts."""
        with self._alone(owner, name):
            stream = self._stream(owner, name)
            return {
                "name": name,
                "reference": stream.reference,
                "counts": stream.counts(),
                "metrics": {key: value.model_dump() for key, value in stream.values().items()},
            }

    def _alone(self, owner: str, name: str) -> threading.Lock:
        return self._locks.setdefault((owner, name), threading.Lock())

    def _stream(self, owner: str, name: str) -> LiveMetrics:
        if (owner, name) not in self._streams:
            about = self._place(owner, name) / "about.json"
            if owner == SERVICE:  # nobody makes it
                reference: Origin = "store"
            elif about.exists():
                reference = json.loads(about.read_text())["reference"]
            else:
                raise InputError(f"name {name}: there is no such stream of yours; make it first")
            self._streams[owner, name] = LiveMetrics(self.config, about.parent, reference)
        return self._streams[owner, name]

    def _place(self, owner: str, name: str) -> Path:
        """A folder whose name nobody chooses."""
        return self.folder / fingerprint([owner, name])
