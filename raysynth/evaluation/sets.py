"""The sets of samples that are judged: opened, checked, and measured by Ray tasks over shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.condition import Box
from raysynth.config import EvaluationConfig, ExperimentConfig
from raysynth.config.experiment import CONTROLS
from raysynth.config.sampling import DRAWING
from raysynth.errors import InputError
from raysynth.evaluation.measure import Measures
from raysynth.layout.morphology import Mask
from raysynth.metrics.domain import check_intensity
from raysynth.metrics.features import Extractor, load_extractor
from raysynth.models.bundle import bundle_digest
from raysynth.progress import progress
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet, case_attrs, open_group
from raysynth.window import measurable
from storage_schema.v1 import SPLITS

MAX_SAMPLES = 50_000
"""Samples measured of a set, whole shards at random: features of all regions stay in memory, 4 kB a
sample with `ct-conv` and 27 kB with Inception."""

NUM_STRAY_BOXES = 500


def open_sets(root: zarr.Group, config: ExperimentConfig) -> dict[str, SampleSet]:
    """`real`, `synthetic` and the controls that the store has."""
    name = config.samples.name
    sets = {
        "real": SampleSet(open_group(root, f"samples/{name}")),
        "synthetic": SampleSet(open_group(root, f"synthetic/{config.name}")),
    }
    for control in CONTROLS:
        group = root.get(f"synthetic/{config.control_name(control)}")
        if isinstance(group, zarr.Group) and config.evaluation.controls:
            sets[control] = SampleSet(group)
    real, synthetic = sets["real"], sets["synthetic"]
    check_drawn_by(config, synthetic, config.name)
    if real.attrs["intensity"] != synthetic.attrs["intensity"]:
        raise InputError(
            f"synthetic/{config.name} has intensity {synthetic.attrs['intensity']!r}, samples/"
            f"{name} {real.attrs['intensity']!r}: evaluate with the set that the model was trained "
            "on"
        )
    check_intensity(config.evaluation.extractors, real.attrs["intensity"])
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


def check_drawn_by(config: ExperimentConfig, synthetic: SampleSet, name: str) -> None:
    """A run must come from the bundle and settings that its figures will be ascribed to.

    Raises:
        InputError: it comes from others.
    """
    here = config.bundle_path.exists()  # on another machine it may not be
    if here and synthetic.attrs["bundle"] != bundle_digest(config.bundle_path):
        raise InputError(
            f"synthetic/{name} was not drawn by the bundle that is at {config.bundle_path} "
            "now: draw another run (--set name=...), or put its bundle back"
        )
    wanted = config.sampling.model_dump(mode="json")
    for name, stored in synthetic.attrs["passport"].get("sampling", {}).items():
        if name in DRAWING and stored != wanted[name]:
            raise InputError(
                f"synthetic/{name} was drawn with sampling.{name} {stored}, the recipe says "
                f"{wanted[name]}: set it back, or draw another run"
            )


def patients_of(root: zarr.Group, sets: Mapping[str, SampleSet]) -> dict[str, NDArray[np.int64]]:
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


def are_phantoms(root: zarr.Group, real: SampleSet) -> bool:
    """Whether all patients of a sample set are phantoms."""
    return {case_attrs(root, case).source.get("kind") for case in real.attrs["cases"]} == {
        "phantom"
    }


def measure_sets(
    sets: Mapping[str, SampleSet], config: ExperimentConfig, hole: Mask | None = None
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
        measurable(samples.read("hu", start, stop), samples.attrs["intensity"]),
        samples.read("layout", start, stop),
        samples.index["box"][start:stop],
        samples.pixel_mm,
        load_extractors(config),
        strays,
        hole,
    )
    return measures


def load_extractors(config: EvaluationConfig) -> tuple[Extractor, ...]:
    """The recipe's extractors, loaded once a process: Ray's workers measure many shards."""
    return _extractors(config.extractors, tuple(config.extractor_weights.items()))


@lru_cache(maxsize=1)
def _extractors(
    names: tuple[str, ...], weights: tuple[tuple[str, Path], ...]
) -> tuple[Extractor, ...]:
    return tuple(load_extractor(name, dict(weights)) for name in names)


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
