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
from raysynth.evaluation.fills import Holes, LayoutHoles
from raysynth.evaluation.measure import Measures
from raysynth.evaluation.regions import nodule_boxes
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

PIXELS_AT_ONCE = 2**22
"""Samples of a shard are measured in blocks of so many pixels: two volumes of 128 voxels a side."""


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
            f"synthetic/{config.name} has {space_of(synthetic)}s of {synthetic.shape} pixels of "
            f"{synthetic.pixel_mm:g} mm, samples/{name} {real.shape} of {real.pixel_mm:g} mm: "
            "evaluate with the set that the model was trained on"
        )
    if not np.any(real.index["split"] == SPLITS.index("test")):
        raise InputError(
            f"no sample of samples/{name} is of a test patient, so there is nothing to judge by; "
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


def space_of(samples: SampleSet) -> str:
    """What a sample of a set is, as metric keys call it: a `slice` or a `volume`."""
    return "slice" if len(samples.shape) == 2 else "volume"


def boxes_of(samples: SampleSet) -> NDArray[np.int16]:
    """The box of every sample that nodules are looked at in, (n, 4) or (n, 6); -1: none.

    It is the one of the index. Of whole volumes none is aimed at a nodule: there it is the cube
    around the largest one of the layout.
    """
    box: NDArray[np.int16] = samples.index["box"]
    if len(samples.shape) == 2 or (box >= 0).any():
        return box
    shards = (samples.shard_rows(shard) for shard in range(samples.num_shards))
    return np.concatenate([nodule_boxes(samples.read("layout", *rows)) for rows in shards])


def made_of(holes: Holes | LayoutHoles | None) -> tuple[int, ...]:
    """Labels that are judged apart as `generated`: of models that make them and nothing else."""
    return tuple(holes.made_of) if isinstance(holes, LayoutHoles) and holes.keeps else ()


def measure_sets(
    sets: Mapping[str, SampleSet],
    config: ExperimentConfig,
    holes: Holes | LayoutHoles | None = None,
) -> dict[str, Measures]:
    """Measures every set, one Ray task a shard; `holes` are of the run and its controls."""
    import ray

    task = ray.remote(num_cpus=1)(_measure_shard)
    work = {}
    parts = made_of(holes)
    for name, samples in sets.items():
        handle = ray.put(samples)
        boxes = boxes_of(samples)
        strays = _stray_boxes(boxes)
        for shard in _chosen_shards(samples):
            start, stop = samples.shard_rows(shard)
            filled = None if name == "real" else _holes_in(holes, start, stop)
            look = boxes[start:stop], strays, filled, parts
            future = task.remote(handle, shard, config.evaluation, *look)
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


def _holes_in(
    holes: Holes | LayoutHoles | None, start: int, stop: int
) -> Holes | LayoutHoles | None:
    """What a worker needs to know of the holes of some rows, which are the first ones to it."""
    if not isinstance(holes, Holes):
        return holes
    return Holes(holes.hole[start:stop], holes.known_hu[:0])


def _measure_shard(
    samples: SampleSet,
    shard: int,
    config: EvaluationConfig,
    boxes: NDArray[np.int16],
    strays: Sequence[Box],
    holes: Holes | LayoutHoles | None,
    parts: Sequence[int],
) -> Measures:
    first, last = samples.shard_rows(shard)
    hu, layout = (samples.read(name, first, last) for name in ("hu", "layout"))
    extractors = load_extractors(config, len(samples.shape))
    block = max(1, PIXELS_AT_ONCE // int(np.prod(samples.shape)))
    measures = Measures()
    for start in range(0, len(hu), block):
        some = slice(start, start + block)
        measures.update(
            first + start,
            measurable(hu[some], samples.attrs["intensity"]),
            layout[some],
            boxes[some],
            samples.pixel_mm,
            extractors,
            strays,
            None if holes is None else holes.of(layout[some], start),
            parts,
        )
    return measures


def load_extractors(config: EvaluationConfig, spatial_dims: int) -> tuple[Extractor, ...]:
    """The recipe's extractors, loaded once a process: Ray's workers measure many shards.

    Args:
        config: names them.
        spatial_dims: 2 or 3, of the samples.

    Raises:
        InputError: one takes slices and samples are volumes, or the reverse, or it lacks weights.
    """
    loaded = _extractors(config.extractors, tuple(config.extractor_weights.items()), spatial_dims)
    nouns = {2: "slices", 3: "volumes"}
    for name, extractor in zip(config.extractors, loaded, strict=True):
        if extractor.spatial_dims != spatial_dims:
            raise InputError(
                f"evaluation.extractors: {name} takes {nouns[extractor.spatial_dims]}, and samples "
                f"are {nouns[spatial_dims]}: leave it out"
            )
    return loaded


@lru_cache(maxsize=1)
def _extractors(
    names: tuple[str, ...], weights: tuple[tuple[str, Path], ...], spatial_dims: int
) -> tuple[Extractor, ...]:
    return tuple(load_extractor(name, dict(weights), spatial_dims) for name in names)


def _chosen_shards(samples: SampleSet) -> list[int]:
    """All shards, or as many random ones as hold `MAX_SAMPLES`."""
    wanted = max(1, MAX_SAMPLES // samples.rows_per_shard)
    rng = np.random.default_rng(seed_of("shards", samples.num_shards))
    return sorted(int(shard) for shard in rng.permutation(samples.num_shards)[:wanted])


def _stray_boxes(boxes: NDArray[np.int16]) -> Sequence[Box]:
    """Different boxes of a set, in a random order."""
    boxes = np.unique(boxes, axis=0)
    boxes = boxes[boxes[:, 0] >= 0]
    order = np.random.default_rng(seed_of("stray boxes", len(boxes))).permutation(len(boxes))
    return [tuple(box) for box in boxes[order[:NUM_STRAY_BOXES]].tolist()]
