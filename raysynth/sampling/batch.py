"""Batch synthesis: a plan of samples, drawn by Ray Data actors into the store, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth import __version__
from raysynth.case import CONDITION_ATTRIBUTES, Label
from raysynth.condition import Condition
from raysynth.config import ExperimentConfig, HoleFilling, LayoutGuided, SamplingConfig
from raysynth.config.experiment import Control
from raysynth.config.sampling import DRAWING
from raysynth.data.units import Meanwhile, write_units
from raysynth.errors import InputError
from raysynth.models.bundle import bundle_digest, read_facts
from raysynth.sampling.adherence import Measurement
from raysynth.sampling.draw import BundleSampler, check_size, paste_known
from raysynth.sampling.hosts import plan_inpainting, tissue_means
from raysynth.sampling.layouts import Lender, plan_layouts
from raysynth.sampling.planner import (
    NO_SOURCE,
    PlannedSample,
    pair_conditions,
    plan_samples,
    shuffle_conditions,
)
from raysynth.seeding import fingerprint
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import PROMPT_BYTES, SPLITS, synthetic_run

NO_SCORES = (0,) * len(CONDITION_ATTRIBUTES)


@dataclass(frozen=True)
class SynthesisSummary:
    """What one synthesis did.

    Attributes:
        run: its group below `synthetic/`.
        samples: in the run, without its controls.
        drawn: by this call, controls included; fewer when it resumed.
        samples_per_s: rate of this call.
        seconds: wall time.
        snapshot: what main points to afterwards.
    """

    run: str
    samples: int
    drawn: int
    samples_per_s: float
    seconds: float
    snapshot: str


Show = Callable[[int, NDArray[np.int16], NDArray[np.uint8], NDArray[np.int16]], None]
"""Is shown first row, HU, layouts and boxes of a shard that was written."""


@dataclass(frozen=True)
class Watch:
    """Whoever looks at the recipe's own run while it is drawn.

    Attributes:
        show: called where samples are drawn, so it must return at once; picklable.
        meanwhile: in the driver.
    """

    show: Show
    meanwhile: Meanwhile


def synthesize(config: ExperimentConfig, watch: Watch | None = None) -> SynthesisSummary:
    """Draws the recipe's samples, and the controls, pairs and swept scales its evaluation wants.

    The same command resumes after any crash; a finished run is left as it is. Pairs and scales that
    are asked for later are drawn beside it.

    Args:
        config: the recipe.
        watch: looks on.

    Raises:
        InputError: no bundle, no sample set, one that does not fit the other, or a run of this
            name that was drawn from another plan.
    """
    started = time.monotonic()
    samples = sample_set_of(config)
    digest = fitting_digest(config, samples)
    drawn, snapshot = 0, main_snapshot(config.store_url)
    if runs := _missing(config, samples, digest):
        drawn, snapshot = _write(config, samples, digest, runs, watch)
    seconds = time.monotonic() - started
    return SynthesisSummary(
        run=config.name,
        samples=config.sampling.num_samples,
        drawn=drawn,
        samples_per_s=drawn / seconds,
        seconds=seconds,
        snapshot=snapshot,
    )


def plan_mark(config: ExperimentConfig) -> str:
    """Digest of all that decides what the recipe's own run holds; the run bears it as `plan`.

    Raises:
        InputError: no bundle, no sample set, or one that does not fit the other.
    """
    samples = sample_set_of(config)
    return _fingerprint(config, samples, fitting_digest(config, samples))


Plan = list[tuple[PlannedSample, PlannedSample]]
"""For every sample what it is drawn under, and what it is recorded as."""

Role = Literal["own", "pairs", "swept"] | Control


@dataclass(frozen=True)
class Run:
    """One group of samples that a synthesis leaves.

    Attributes:
        name: of the group below `synthetic/`.
        role: the recipe's own run, one of its controls, its pairs, or a scale of its sweep.
        guidance_scale: at which it is drawn.
        mark: digest of all that decides what is drawn.
        plan: its samples.
    """

    name: str
    role: Role
    guidance_scale: float
    mark: str
    plan: Plan


@dataclass(frozen=True)
class Unit:
    """One shard of one run: what an actor draws and writes in one go."""

    run: str
    role: Role
    guidance_scale: float
    first_row: int
    plan: Plan


def _missing(config: ExperimentConfig, samples: SampleSet, digest: str) -> list[Run]:
    """The runs that the store lacks: the recipe's own with its controls, pairs, swept scales."""
    mark = _fingerprint(config, samples, digest)
    own = not _is_there(config, config.name, mark)
    evaluation = config.evaluation
    beside: list[tuple[str, Role, float, str]] = [
        (config.swept_name(scale), "swept", scale, fingerprint([mark, "swept", scale]))
        for scale in evaluation.guidance_scales
    ]
    if evaluation.num_pairs:
        pairs_mark = fingerprint([mark, "pairs", evaluation.num_pairs])
        scale = config.sampling.guidance_scale
        beside.append((config.pairs_name, "pairs", scale, pairs_mark))
    missing = [one for one in beside if not _is_there(config, one[0], one[3])]
    if not own and not missing:
        return []
    asked = plan_run_samples(config, samples)
    count = evaluation.num_control_samples or len(asked)
    runs = _own_runs(config, asked, count, mark) if own else []
    for name, role, scale, of_run in missing:
        twice = pair_conditions(asked, 2 * evaluation.num_pairs if role == "pairs" else count)
        runs.append(Run(name, role, scale, of_run, list(zip(twice, twice, strict=True))))
    return runs


def _own_runs(
    config: ExperimentConfig, asked: list[PlannedSample], count: int, mark: str
) -> list[Run]:
    scale = config.sampling.guidance_scale
    runs = [Run(config.name, "own", scale, mark, list(zip(asked, asked, strict=True)))]
    if not config.evaluation.controls:
        return runs
    few = asked[:count]
    same = list(zip(few, few, strict=True))
    controls: dict[Control, Plan] = {"untrained": same}
    if len(few) > 1:
        controls["shuffled"] = list(zip(shuffle_conditions(few), few, strict=True))
    if config.copies:
        controls["constant"] = same
    for control, plan in controls.items():
        runs.append(Run(config.control_name(control), control, scale, mark, plan))
    return runs


def plan_run_samples(config: ExperimentConfig, samples: SampleSet) -> list[PlannedSample]:
    """What the recipe's run is asked for, by the planner that its model needs."""
    if isinstance(config.model, HoleFilling):
        return plan_inpainting(config, samples)
    if isinstance(config.model, LayoutGuided):
        return plan_layouts(config, samples)
    return plan_samples(config, samples)


def _write(
    config: ExperimentConfig,
    samples: SampleSet,
    digest: str,
    runs: list[Run],
    watch: Watch | None,
) -> tuple[int, str]:
    """Draws what is missing of some runs and publishes them: samples drawn, and the snapshot."""
    names = " and ".join(f"synthetic/{run.name}" for run in runs)
    units = dict(_units(runs, samples.rows_per_shard))
    mark = fingerprint([[run.name, run.mark] for run in runs])
    with StoreRun(config.store_url, verb="synthesize", fingerprint=mark) as writing:
        if writing.is_new:
            attributes = run_attributes(config, samples, digest)
            writing.declare(
                lambda root: declare_runs(root, runs, samples, attributes), f"{names} planned"
            )
        show = watch.show if watch else None
        means = None
        if any(run.role == "constant" for run in runs):
            means = tissue_means(samples, read_facts(config.bundle_path).window_hu)
        drawn = sum(len(unit.plan) for key, unit in units.items() if key not in writing.completed)
        write_units(
            writing,
            units,
            _Drawer(
                config.bundle_path,
                config.sampling,
                config.seed,
                samples.shape[-1],
                means,
                Lender.of(config),
                show,
            ),
            stage="synthesize",
            noun="shards",
            num_actors=config.sampling.num_actors,
            num_cpus=config.sampling.threads_per_actor,
            num_gpus=int(config.sampling.use_gpu),
            meanwhile=watch.meanwhile if watch else nullcontext,
        )
        planned = sum(len(run.plan) for run in runs)
        return drawn, writing.publish(f"{planned} samples in {names}")


def _units(runs: list[Run], rows_per_shard: int) -> Iterator[tuple[str, Unit]]:
    for run in runs:
        for first in range(0, len(run.plan), rows_per_shard):
            plan = run.plan[first : first + rows_per_shard]
            yield (
                f"{run.name}/rows-{first}",
                Unit(run.name, run.role, run.guidance_scale, first, plan),
            )


@dataclass(frozen=True)
class _Drawer:
    """Draws, measures and writes a shard. Each actor has a copy, and loads the bundle once.

    Attributes:
        size: pixels along a sample's side.
        tissue_means: HU of every label, for the control of models that fill holes.
        lender: completes requests from the store; None: they are whole.
        show: looks at what was written of the recipe's own run.
    """

    bundle_path: Path
    sampling: SamplingConfig
    seed: int
    size: int
    tissue_means: NDArray[np.int16] | None
    lender: Lender | None
    show: Show | None

    @cached_property
    def sampler(self) -> BundleSampler:
        return BundleSampler(self.bundle_path, self.sampling, self.seed, self.size)

    def __call__(self, root: zarr.Group, unit: Unit) -> None:
        drawn, asked = self._completed(root, unit.plan)
        if unit.role == "own":
            hu, measured, draws = self.sampler.draw_until_found(drawn)
        else:
            # They show what the network does by itself: nothing of them is sorted out.
            hu = self._draw_once(unit, drawn)
            # Exchanged requests lend a hole its filling; around it each slice stays its own.
            for image, one in zip(hu, asked, strict=True):
                paste_known(image, one.condition)
            measured, draws = self.sampler.measure(hu, asked), np.ones(len(asked), np.uint8)
        batch_shapes = [self.sampler.batch_shape(unit.guidance_scale)] * len(asked)
        arrays = drawn_arrays(self.sampler, hu, asked, measured, draws, batch_shapes)
        write_rows(open_group(root, f"synthetic/{unit.run}"), unit.first_row, arrays)
        if self.show is not None and unit.role == "own":
            self.show(unit.first_row, hu, arrays["layout"], _boxes(asked, hu.ndim - 1))

    def _completed(
        self, root: zarr.Group, plan: Plan
    ) -> tuple[list[PlannedSample], list[PlannedSample]]:
        """What samples are drawn under and recorded as, with their layouts."""
        if self.lender is None:
            return [drawn for drawn, _ in plan], [asked for _, asked in plan]
        asked = [self.lender(root, one) for _, one in plan]
        drawn = [
            whole if one is recorded else self.lender(root, one)
            for (one, recorded), whole in zip(plan, asked, strict=True)
        ]
        return drawn, asked

    def _draw_once(self, unit: Unit, drawn: Sequence[PlannedSample]) -> NDArray[np.int16]:
        if unit.role != "constant":
            untrained, scale = unit.role == "untrained", unit.guidance_scale
            return self.sampler.draw(drawn, untrained=untrained, guidance_scale=scale)
        assert self.tissue_means is not None
        shape = (self.size,) * self.sampler.facts.spatial_dims
        return np.stack([self.tissue_means[_layout(one.condition, shape)] for one in drawn])


def drawn_arrays(
    sampler: BundleSampler,
    hu: NDArray[np.int16],
    asked: Sequence[PlannedSample],
    measured: Sequence[Measurement],
    draws: NDArray[np.uint8],
    batch_shapes: Sequence[int],
) -> dict[str, NDArray[Any]]:
    """All that a run's group keeps of some of its samples, once they are drawn.

    Args:
        sampler: measures them.
        hu: the samples (n, *spatial).
        asked: what they are recorded as.
        measured: what was found in them.
        draws: how often each was drawn.
        batch_shapes: of the network calls of each.
    """
    found = np.array([one.found for one in measured], np.uint8)
    is_free = np.array([one.condition.box is None for one in asked])
    diameter_mm = np.array([one.diameter_mm for one in measured], np.float32)
    contrast_hu = np.array([one.contrast_hu for one in measured], np.float32)
    layout = np.stack([_layout(one.condition, hu[0].shape) for one in asked])
    return {
        "hu": hu,
        "layout": layout,
        "measured": np.stack([_measured(one, hu[0].shape) for one in measured]),
        "index/batch_shape": np.array(batch_shapes, np.int16),
        "index/found": found,
        "index/draws": draws,
        "index/unrequested": sampler.count_unrequested(hu, layout, asked),
        "index/accepted": np.where(is_free, np.uint8(1), found),
        "index/measured_diameter_mm": np.where(found, diameter_mm, np.float32(np.nan)),
        "index/measured_contrast_hu": np.where(found, contrast_hu, np.float32(np.nan)),
        "index/copied_fraction": np.array([_copied(one.condition) for one in asked], np.float32),
    }


def sample_set_of(config: ExperimentConfig) -> SampleSet:
    """The sample set that lends a recipe's samples their grid.

    Raises:
        InputError: there is no such store or set.
    """
    name = config.samples.name
    root = open_root(config.store_url)
    return SampleSet(open_group(root, f"samples/{name}"))


def fitting_digest(config: ExperimentConfig, samples: SampleSet) -> str:
    """The digest of the recipe's bundle, which must draw what the sample set holds."""
    facts = read_facts(config.bundle_path)
    if not facts.draws:
        raise InputError(
            f"bundle {config.bundle_path} is a {facts.model.family}, which draws nothing by itself:"
            " use the recipe of a diffusion model or a GAN"
        )
    check_size(facts, samples.shape[-1])
    for what, of_bundle, of_set in (
        ("samples of kind", facts.samples.kind, config.samples.kind),
        ("pixels of mm", round(facts.samples.pixel_mm, 6), round(samples.pixel_mm, 6)),
        ("intensity", facts.intensity, samples.attrs["intensity"]),
    ):
        if of_bundle != of_set:
            raise InputError(
                f"bundle {config.bundle_path} draws {what} {of_bundle}, but sample set "
                f"{config.samples.name} has {of_set}: use the set that it was trained on"
            )
    return bundle_digest(config.bundle_path)


def _fingerprint(config: ExperimentConfig, samples: SampleSet, digest: str) -> str:
    """Of all that decides what is drawn; the number of actors does not."""
    return fingerprint(
        {
            "bundle": digest,
            "samples": [samples.attrs["fingerprint"], config.samples.model_dump()],
            "run": config.name,
            "seed": config.seed,
            "sampling": config.sampling.model_dump(include=set(DRAWING)),
            "controls": config.evaluation.model_dump(include={"controls", "num_control_samples"}),
        }
    )


def _is_there(config: ExperimentConfig, name: str, mark: str) -> bool:
    """Whether a run is published already, drawn from the same plan."""
    group = open_root(config.store_url).get(f"synthetic/{name}")
    if group is None:
        return False
    if group.attrs["plan"] != mark:
        raise InputError(
            f"synthetic/{name} was drawn by another bundle or plan: give this run another "
            "name (--set name=...) or use a new store"
        )
    return True


def run_attributes(config: ExperimentConfig, samples: SampleSet, digest: str) -> dict[str, Any]:
    """What all runs of a synthesis say of themselves."""
    passport = {
        "synthetic": True,
        "purpose": "research only",
        "software": f"raysynth {__version__}",
        "bundle": digest,
        "recipe": config.name,
        "seed": config.seed,
        "sampling": config.sampling.model_dump(mode="json"),
    }
    return {
        "kind": config.samples.kind,
        "pixel_mm": samples.pixel_mm,
        "intensity": samples.attrs["intensity"],
        "cases": samples.attrs["cases"],
        "parent_snapshot": main_snapshot(config.store_url),
        "bundle": digest,
        "source_set": config.samples.name,
        "passport": passport,
    }


def declare_runs(
    root: zarr.Group, runs: list[Run], samples: SampleSet, attributes: dict[str, Any]
) -> None:
    """Makes the runs' groups with everything that is known before drawing."""
    for run in runs:
        asked = [recorded for _, recorded in run.plan]
        passport = attributes["passport"] | {
            "control": None if run.role == "own" else run.role,
            "sampling": attributes["passport"]["sampling"] | {"guidance_scale": run.guidance_scale},
        }
        own = attributes | {"plan": run.mark, "passport": passport}
        spec = synthetic_run(len(run.plan), samples.shape)
        group = create_sample_set(root, f"synthetic/{run.name}", spec, own)
        sources = np.array([one.source_sample for one in asked])
        is_lent = sources != NO_SOURCE
        set_index(
            group,
            {
                "box": _boxes(asked, len(samples.shape)),
                "attributes": np.array([one.condition.attributes or NO_SCORES for one in asked]),
                "has_nodule": np.array([one.condition.box is not None for one in asked]),
                "split": np.where(is_lent, samples.index["split"][sources], SPLITS.index("train")),
                "prompt": [_utf8(one.condition.text or "") for one in asked],
                "seed": np.array([one.seed for one in asked], np.uint64),
                "source_sample": sources,
                "source_case": np.where(is_lent, samples.index["case"][sources], NO_SOURCE),
            },
        )


def _boxes(asked: Sequence[PlannedSample], spatial_dims: int) -> NDArray[np.int16]:
    """Boxes (n, 2 * spatial_dims), -1 for none."""
    none = (-1,) * (2 * spatial_dims)
    return np.array([one.condition.box or none for one in asked], np.int16)


def _layout(condition: Condition, shape: tuple[int, ...]) -> NDArray[Any]:
    """Background where the request says nothing of anatomy."""
    return np.zeros(shape, np.uint8) if condition.layout is None else condition.layout


def _measured(found: Measurement, shape: tuple[int, ...]) -> NDArray[Any]:
    """What was found, as a layout."""
    if not found.found or found.mask is None:
        return np.zeros(shape, np.uint8)
    return np.where(found.mask, np.uint8(Label.NODULE), np.uint8(0))


def _utf8(text: str) -> NDArray[np.uint8]:
    """A row of `index/prompt`."""
    encoded = text.encode()
    if len(encoded) > PROMPT_BYTES:
        raise InputError(
            f"prompt of {len(encoded)} bytes: a store keeps {PROMPT_BYTES}; leave some clauses out"
        )
    return np.frombuffer(encoded.ljust(PROMPT_BYTES, b"\0"), np.uint8)


def _copied(condition: Condition) -> float:
    return 0.0 if condition.known_mask is None else float(condition.known_mask.mean())
