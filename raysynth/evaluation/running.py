"""Metrics of samples that are still being made: each counted once, in any order, merged exactly.

A set is a `RunningMetrics`, real or synthetic, in one process or in many; `compute` compares two of
them. Nothing here knows Ray, a store or a server.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError
from raysynth.evaluation.intervals import patient_splits
from raysynth.evaluation.judge import MAX_KERNEL_SAMPLES, MIN_SAMPLES
from raysynth.evaluation.measure import Place
from raysynth.evaluation.regions import cut_regions
from raysynth.metrics.features import Extractor
from raysynth.metrics.frechet import frechet_distance, frechet_distance_of
from raysynth.metrics.running import Rows, RunningFeatures, RunningKernel
from raysynth.metrics.samples import Features
from raysynth.seeding import seed_of

MAX_KEPT = MAX_KERNEL_SAMPLES
"""Samples of a place whose features are kept: 1.3 MB with `ct-conv`, 34 MB with Inception."""

NUM_FLOOR_SPLITS = 8


@dataclass(frozen=True)
class RunningValue:
    """What can be said of a metric by now.

    Attributes:
        value: of the samples so far.
        n: samples that it was computed from.
        n_reference: real samples on the other side.
        floor: the same between halves of the real ones, by patients; None: there is one patient.
        floor_n: samples of the smaller half. FID falls with n, so a floor of few is high.
        std: KID's standard error over synthetic samples.
    """

    value: float
    n: int
    n_reference: int
    floor: float | None
    floor_n: int | None
    std: float | None = None


class RunningMetrics:
    """All that is known of a set of samples, by place: moments, and at most `max_kept` features.

    Attributes:
        max_kept: samples whose features are kept.
        places: region and extractor -> its features.
    """

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self.max_kept = max_kept
        self.places: dict[Place, RunningFeatures] = {}
        self._counted: NDArray[np.bool_] = np.zeros(0, np.bool_)

    @property
    def count(self) -> int:
        """Samples counted."""
        return int(np.count_nonzero(self._counted))

    def has(self, rows: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which samples were counted (n,)."""
        inside = rows < len(self._counted)
        return inside & self._counted[np.where(inside, rows, 0)] if inside.any() else inside

    def update(
        self,
        rows: NDArray[np.integer],
        hu: NDArray[np.int16],
        layout: NDArray[np.uint8],
        box: NDArray[np.int16],
        extractors: Sequence[Extractor],
    ) -> int:
        """Counts samples; those that were counted before are ignored.

        Args:
            rows: numbers of the samples in their set, 0 or more (n,).
            hu: slices (n, y, x) or volumes (n, z, y, x).
            layout: their labels.
            box: their boxes (n, 4) or (n, 6), -1 for none.
            extractors: of features.

        Returns:
            How many were new.

        Raises:
            InputError: features that are no numbers; then none of the samples is counted.
        """
        assert rows.min(initial=0) >= 0, "numbers of samples are 0 or more"
        _, first = np.unique(rows, return_index=True)
        first = first[~self.has(rows[first])]
        if not len(first):
            return 0
        new: Rows = rows[first].astype(np.int64)
        found: dict[Place, tuple[Rows, Features]] = {}
        for region, part in cut_regions(hu[first], layout[first], box[first]).items():
            for extractor in extractors if len(part.rows) else ():
                features = extractor(part.hu)
                _refuse_nan(new[part.rows], features, extractor.name)
                found[region, extractor.name] = new[part.rows], features
        self._count(new)
        for place, (shown, features) in found.items():
            self._at(place, features.shape[1]).update(shown, features)
        return len(new)

    def merge(self, other: RunningMetrics) -> None:
        """Adds what another worker counted, unless it is here already.

        Raises:
            InputError: some of it is here and some is not, which cannot be told apart.
        """
        rows = np.flatnonzero(other._counted)
        known = self.has(rows)
        if known.all():
            return
        if known.any():
            raise InputError(
                f"{np.count_nonzero(known)} of {len(rows)} samples to merge are counted already: "
                "give parts that share all their samples or none"
            )
        self._count(rows)
        for place, features in other.places.items():
            self._at(place, len(features.moments.mean)).merge(features)

    def compute(
        self,
        reference: Reference,
        places: Sequence[Place] | None = None,
        kernels: dict[Place, RunningKernel] | None = None,
        space: str = "slice",
    ) -> dict[str, RunningValue]:
        """FID and KID by key `metric/space/region/extractor@version`; none for too few samples.

        Args:
            reference: real samples to compare with.
            places: which; None: all.
            kernels: of earlier calls with this reference, for speed; filled here. None: everything
                is computed anew, and depends on the samples alone and not on their history.
            space: `slice` or `volume`, what samples are.
        """
        kernels = {} if kernels is None else kernels
        found: dict[str, RunningValue] = {}
        for place in sorted(self.places) if places is None else places:
            real, other = reference.real.places.get(place), self.places.get(place)
            if real is None or other is None:
                continue
            if min(real.moments.count, other.moments.count) < MIN_SAMPLES:
                continue
            if place not in kernels:
                kernels[place] = RunningKernel(real.features)
            kernels[place].follow(other.rows, other.features)
            kid, std = kernels[place].distance()
            floor = reference.floor(place)
            n, n_real = other.moments.count, real.moments.count
            kept, kept_real = len(other.rows), len(real.rows)
            name = "/".join((space, *place))
            found[f"fid/{name}"] = RunningValue(_fid(real, other), n, n_real, floor.fid, floor.n)
            found[f"kid/{name}"] = RunningValue(kid, kept, kept_real, floor.kid, floor.n, std)
        return found

    def save(self, mark: str) -> bytes:
        """The whole state as an npz file of plain arrays.

        Args:
            mark: of what was counted, for `load`.
        """
        about: dict[str, Any] = {
            "mark": mark,
            "length": len(self._counted),
            "max_kept": self.max_kept,
            "places": [],
        }
        arrays: dict[str, NDArray[Any]] = {"counted": np.packbits(self._counted)}
        for number, (place, kept) in enumerate(sorted(self.places.items())):
            about["places"].append([*place, kept.moments.count])
            arrays |= {
                f"mean_{number}": kept.moments.mean,
                f"scatter_{number}": kept.moments.scatter,
                f"rows_{number}": kept.rows,
                f"features_{number}": kept.features,
            }
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes, mark: str) -> RunningMetrics:
        """What `save` made. The file's own checksums are checked, and nothing is unpickled.

        Raises:
            InputError: it is damaged, or of another mark.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return cls._of(file, mark)
        except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"a state of running metrics is damaged ({error}): delete it"
            ) from error

    @classmethod
    def _of(cls, file: Mapping[str, NDArray[Any]], mark: str) -> RunningMetrics:
        about = json.loads(file["about"].tobytes())
        if about["mark"] != mark:
            raise InputError(f"a state of running metrics is of {about['mark']}, not of {mark}")
        metrics = cls(about["max_kept"])
        counted = np.unpackbits(file["counted"], count=about["length"])
        metrics._counted = counted.astype(np.bool_)
        for number, (region, extractor, count) in enumerate(about["places"]):
            features = file[f"features_{number}"]
            kept = RunningFeatures(features.shape[1], metrics.max_kept)
            kept.rows, kept.features = file[f"rows_{number}"], features
            kept.moments.count = count
            kept.moments.mean = file[f"mean_{number}"]
            kept.moments.scatter = file[f"scatter_{number}"]
            metrics.places[region, extractor] = kept
        return metrics

    def _at(self, place: Place, dim: int) -> RunningFeatures:
        return self.places.setdefault(place, RunningFeatures(dim, self.max_kept))

    def _count(self, rows: Rows) -> None:
        longer = int(rows.max()) + 1 - len(self._counted)
        if longer > 0:
            self._counted = np.concatenate([self._counted, np.zeros(longer, np.bool_)])
        self._counted[rows] = True


@dataclass(frozen=True)
class Floor:
    """How far real samples of some patients are from those of others.

    Attributes:
        fid: mean over some splits into halves; None: there is one patient, or too few samples.
        kid: likewise.
        n: samples of the smaller half, on average.
    """

    fid: float | None = None
    kid: float | None = None
    n: int | None = None


class Reference:
    """Real samples that others are compared with.

    Attributes:
        real: what is known of them.
    """

    def __init__(self, real: RunningMetrics, patients: NDArray[np.int64]) -> None:
        """Takes them as they are; they must not change any more.

        Args:
            real: what is known of them.
            patients: number of the patient of every row of their set.
        """
        self.real = real
        self._patients = patients
        self._floors: dict[Place, Floor] = {}

    def floor(self, place: Place) -> Floor:
        """The distance of real samples to others, computed once."""
        if place not in self._floors:
            kept = self.real.places[place]
            self._floors[place] = _floor(kept.features, self._patients[kept.rows], place)
        return self._floors[place]


def _floor(features: Features, patients: NDArray[np.int64], place: Place) -> Floor:
    half = len(np.unique(patients)) // 2
    splits = patient_splits(patients, half, NUM_FLOOR_SPLITS, seed_of("floor", *place))
    found = []
    for split in splits:
        one, other = features[split], features[~split]
        n = min(len(one), len(other))
        if n >= MIN_SAMPLES:
            kernel = RunningKernel(one)
            kernel.follow(np.arange(len(other)), other)
            found.append((frechet_distance_of(one, other), kernel.distance()[0], n))
    if not found:
        return Floor()
    fid, kid, n = np.mean(found, axis=0)
    return Floor(float(fid), float(kid), round(n))


def _fid(real: RunningFeatures, other: RunningFeatures) -> float:
    """From features as long as there are all, which is exact below `dim` samples too."""
    if real.are_all_kept and other.are_all_kept:
        return frechet_distance_of(real.features, other.features)
    return frechet_distance(real.moments, other.moments)


def _refuse_nan(rows: Rows, features: Features, name: str) -> None:
    broken = rows[~np.isfinite(features).all(axis=1)]
    if len(broken):
        raise InputError(
            f"{name} gives features of sample {broken[0]} that are no numbers: look at its HU, and "
            "at the extractor's weights"
        )
