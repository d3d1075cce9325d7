"""What a recipe will take on a cluster: memory, time, bytes, money; and what holds it up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysynth.config import ExperimentConfig, OfLatents, load_recipe
from raysynth.config.hardware import Hardware
from raysynth.config.model import AutoencoderConfig
from raysynth.errors import InputError
from raysynth.models.bundle import FACTS, read_facts
from raysynth.planning.formulas import best_interval_s, exchange, goodput, slowest_of
from raysynth.planning.simulation import simulate_drawing, simulate_training
from raysynth.sampling.footprint import DrawingFootprint, drawing_footprint
from raysynth.training.fitting import ALLOWANCE, Need, need_of, what_fits
from raysynth.training.footprint import latent_shape
from storage_schema.v1 import synthetic_run

GIB = 2**30
STALL_SHARE = 0.02
"""Of the seconds that writing a checkpoint takes, that training stands still: measured (B11)."""

HU_RATIO, LABEL_RATIO = 1.6, 10.0
"""By which stored HU and labels are smaller than in memory: measured on phantoms at 2 mm (1.55 to
1.68, and 7 to 11). Latents in half precision hardly shrink."""

INLINE_BYTES = 512
"""Chunks of a store up to this size lie in its manifests: they take no request of their own."""

SEED = 0
"""Of simulated events."""


@dataclass(frozen=True)
class Figure:
    """One figure of a plan.

    Attributes:
        name: what it is.
        value: the figure.
        unit: `s`, `B`, `B/s` or `$`; empty of counts and shares.
        basis: what it follows from, assumptions included.
    """

    name: str
    value: float
    unit: str
    basis: str

    @property
    def text(self) -> str:
        """The value in a unit that people read easily."""
        sizes = {
            "s": (("days", 172_800), ("h", 7200), ("min", 120), ("s", 0.1), ("ms", 1e-3)),
            "B": (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)),
            "B/s": (("GB/s", 1e8), ("MB/s", 1e6)),
        }.get(self.unit, ((self.unit, 1),))
        factors = {"days": 86_400, "h": 3600, "min": 60, "s": 1, "GB/s": 1e9}
        unit, size = next((one for one in sizes if self.value >= one[1]), sizes[-1])
        return f"{self.value / factors.get(unit, size):,.4g} {unit}".strip()


@dataclass(frozen=True)
class Part:
    """Training, or drawing.

    Attributes:
        figures: in the order in which they are read.
        shares: of all workers' time, by what it goes into; together 1.
    """

    figures: tuple[Figure, ...]
    shares: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """What most of the time goes into."""
        return max(self.shares, key=lambda name: self.shares[name])

    def __getitem__(self, name: str) -> float:
        return next(one.value for one in self.figures if one.name == name)

    def lines(self) -> Iterator[str]:
        """For people: a line for each figure, and for each share of the time."""
        for one in self.figures:
            yield f"  {one.name:16} {one.text:>12}  {one.basis}"
        for what, share in self.shares.items():
            yield f"  {'':16} {share:>12.1%}  {what}"


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster.

    Attributes:
        recipe: its name.
        hardware: the cluster's name.
        parts: `training` and `drawing`, as far as the recipe does them.
        advice: what to change, and why.
        fits: whether training and drawing find the memory and the workers that they want.
    """

    recipe: str
    hardware: str
    parts: dict[str, Part]
    advice: tuple[str, ...]
    fits: bool


def plan(
    config: ExperimentConfig, hardware: Hardware, autoencoder: AutoencoderConfig | None = None
) -> Plan:
    """Plans a recipe on a cluster.

    Args:
        config: the recipe.
        hardware: the cluster.
        autoencoder: of a model of latents, see `find_autoencoder`.
    """
    memory = hardware.memory_gib * GIB
    parts, advice, fits = {}, [], True
    training, sampling = config.training, config.sampling
    for name, wanted in {
        "training.num_workers": training.num_workers,
        "sampling.num_actors": sampling.num_actors,
    }.items():
        if wanted > hardware.num_gpus:
            fits = False
            advice.append(f"{name} {wanted}: {hardware.name} has {hardware.num_gpus}; take fewer")
        elif wanted < hardware.num_gpus:
            advice.append(f"{name} {wanted} leaves {hardware.num_gpus - wanted} idle")
    if config.bundle is None and training.max_seen_samples:
        need = need_of(config, autoencoder, memory)
        parts["training"] = plan_training(config, hardware, need, autoencoder)
        if need.total > memory:
            fits = False
            changes = what_fits(config, autoencoder, memory)
            told = " ".join(f"--set {one}" for one in changes or ())
            advice.append(
                f"a training step needs {need.total / GIB:.1f} GiB of {hardware.memory_gib:.4g}: "
                + (told or "take GPUs with more memory, or more of them and training.engine auto")
            )
    footprint = drawing_footprint(config, autoencoder)
    if footprint is not None:
        parts["drawing"] = plan_drawing(config, hardware, footprint)
        needed = ALLOWANCE * footprint.peak_bytes
        if needed > memory:
            fits = False
            advice.append(
                f"drawing needs {needed / GIB:.1f} GiB of {hardware.memory_gib:g}: lower "
                f"sampling.batch_size {sampling.batch_size}, or draw smaller samples"
            )
    return Plan(config.name, hardware.name, parts, tuple(advice), fits)


def plan_training(
    config: ExperimentConfig,
    hardware: Hardware,
    need: Need,
    autoencoder: AutoencoderConfig | None,
) -> Part:
    """Memory, time, bytes and money of a training run."""
    training, footprint = config.training, need.footprint
    workers, batch = training.num_workers, training.global_batch_size
    num_steps = math.ceil(training.max_seen_samples / batch)
    peak = _peak(hardware, training.precision)
    rate = peak * hardware.training_utilisation
    compute = training.local_batch_size * footprint.flops / rate
    told = exchange(
        footprint.num_trained,
        workers,
        need.engine,
        hardware,
        compute_s=compute,
        num_micro_batches=training.gradient_accumulation_steps,
    )
    read_bytes = _stored_bytes(config, autoencoder)
    read_s = batch * read_bytes / (hardware.store_gb_s * 1e9)
    base = max(compute + told.exposed_s, read_s)
    slowest = slowest_of(workers, hardware.straggler_sigma)
    ends = "simulated"
    if training.max_seconds is not None and num_steps * base * slowest > training.max_seconds:
        num_steps = max(1, int(training.max_seconds / (base * slowest)))
        ends = f"until training.max_seconds {training.max_seconds:g}, simulated"
    saved_bytes = 4 * (footprint.num_parameters + 3 * footprint.num_trained)
    write_s = saved_bytes / workers / (hardware.checkpoint_gb_s * 1e9)
    stall = STALL_SHARE * write_s
    per_checkpoint = max(1, training.checkpoint_every // batch)
    between = 3600 * hardware.gpu_hours_between_failures / workers
    outcome = simulate_training(
        num_steps,
        base,
        num_workers=workers,
        sigma=hardware.straggler_sigma,
        steps_between_checkpoints=per_checkpoint,
        stall_s=stall,
        between_failures_s=between,
        restart_s=hardware.restart_s,
        seed=SEED,
    )
    interval = per_checkpoint * base * slowest
    gpu_hours = outcome.seconds / 3600 * workers
    whole = outcome.seconds
    shares = {
        "computing": num_steps * compute / whole,
        "exchanging gradients": num_steps * told.exposed_s / whole,
        "reading samples": num_steps * (base - compute - told.exposed_s) / whole,
        "waiting for the slowest worker": outcome.waiting_s / whole,
        "saving checkpoints": outcome.saving_s / whole,
        "failures": outcome.lost_s / whole,
    }
    state, micro_batch = need.state, training.forward_batch_size
    figures = [
        Figure(
            "memory",
            need.total,
            "B",
            f"{need.total / GIB:.3g} of {hardware.memory_gib:.4g} GiB: weights "
            f"{_gib(state.weights)}, gradients {_gib(state.gradients)}, moments "
            f"{_gib(state.moments)}, average "
            f"{_gib(state.average)}, buckets "
            f"{_gib(max(state.buckets, state.stepping))}, activations "
            f"{_gib(need.activations)} at micro batches of {micro_batch}, and 10 % for gaps",
        ),
        Figure("workers", workers, "", f"{need.engine}: {need.engine.reason}"),
        Figure(
            "step",
            base * slowest,
            "s",
            f"computing {compute:.3g} ({footprint.flops / 1e12:.3g} TFLOP a sample, "
            f"{training.local_batch_size} a worker, {hardware.training_utilisation:.0%} of "
            f"{peak / 1e12:.4g} TFLOP/s), exchange not hidden {told.exposed_s:.2g} of "
            f"{told.seconds:.2g}, reading {read_s:.2g} meanwhile; the slowest of {workers} takes "
            f"{slowest:.2f} of the median (sigma {hardware.straggler_sigma:.2g})",
        ),
        Figure(
            "network share",
            shares["exchanging gradients"],
            "",
            f"of the time; {told.gigabytes:.3g} GB a step and GPU, float32, over "
            f"{hardware.gpu_link_gb_s:.3g} GB/s in a node and {hardware.network_gb_s:.3g} between",
        ),
        Figure(
            "reading",
            batch * read_bytes / (base * slowest),
            "B/s",
            f"{read_bytes / 1e6:.3g} MB a sample (HU compress {HU_RATIO:g} times, labels "
            f"{LABEL_RATIO:g}), from a store of "
            f"{hardware.store_gb_s:.3g} GB/s, nothing cached",
        ),
        Figure("samples a second", batch / (whole / num_steps), "", f"{batch} a step"),
        Figure(
            "time",
            whole,
            "s",
            f"{num_steps:,} steps {ends} (seed {SEED}): {outcome.failures} failures "
            f"(one in {hardware.gpu_hours_between_failures:,.0f} GPU hours, "
            f"{hardware.restart_s:g} s until work goes on)",
        ),
        Figure(
            "goodput",
            goodput(stall, interval, between, hardware.restart_s),
            "",
            f"1 - (d/t + t/2M + R/M): d {stall:.2g} s, t {interval:.3g} s, M {between / 3600:.3g} "
            f"h; t = sqrt(2 d M) would be {best_interval_s(stall, between):.3g} s",
        ),
        Figure(
            "checkpoints",
            training.keep_checkpoints * saved_bytes,
            "B",
            f"{training.keep_checkpoints} of {saved_bytes / 1e9:.3g} GB; one takes "
            f"{write_s:.2g} s behind the steps at {hardware.checkpoint_gb_s:.3g} GB/s a worker",
        ),
        *_cost(hardware, gpu_hours, 0, 0),
    ]
    return Part(tuple(figures), shares)


def plan_drawing(config: ExperimentConfig, hardware: Hardware, footprint: DrawingFootprint) -> Part:
    """Memory, time, bytes and money of a synthesis, without controls."""
    sampling, shape = config.sampling, config.samples.shape
    peak = _peak(hardware, "fp32")
    denoising = footprint.num_calls * footprint.call_flops
    denoising /= peak * hardware.sampling_utilisation
    decoding = footprint.decoding_flops / (peak * hardware.decoding_utilisation)
    handling = hardware.handling_s_per_megavoxel * math.prod(shape) / 1e6
    sample_s = denoising + decoding + handling
    spec = synthetic_run(sampling.num_samples, shape)
    rows = spec.arrays[0].shard[0]
    units = math.ceil(sampling.num_samples / rows)
    ratios = {"int16": HU_RATIO, "uint8": LABEL_RATIO}
    shard_bytes = [
        math.prod(one.shard) * np.dtype(one.dtype).itemsize / ratios.get(one.dtype, 1.0)
        for one in spec.arrays
    ]
    puts = sum(size > INLINE_BYTES for size in shard_bytes)
    unit_bytes = sum(shard_bytes)
    store_s = max(puts / hardware.store_puts_per_s, unit_bytes / (hardware.store_gb_s * 1e9))
    outcome = simulate_drawing(
        units,
        sampling.num_samples / units * sample_s,
        num_actors=sampling.num_actors,
        actors_per_node=hardware.gpus_per_node,
        sigma=hardware.straggler_sigma,
        store_s=store_s,
        node_failures_per_s=_node_failures_per_s(hardware),
        restart_s=hardware.restart_s,
        seed=SEED,
    )
    lost = max(0.0, 1 - outcome.busy - outcome.writing)
    shares = {
        "denoising": outcome.busy * denoising / sample_s,
        "decoding": outcome.busy * decoding / sample_s,
        "measuring and compressing": outcome.busy * handling / sample_s,
        "waiting for the store": outcome.writing,
        "lost nodes, and actors that have nothing left to do": lost,
    }
    gpu_hours = outcome.seconds / 3600 * sampling.num_actors
    sample_bytes = unit_bytes / rows
    num_bytes = round(sampling.num_samples * sample_bytes)
    figures = [
        Figure(
            "memory",
            ALLOWANCE * footprint.peak_bytes,
            "B",
            f"{ALLOWANCE * footprint.peak_bytes / GIB:.3g} of {hardware.memory_gib:.4g} GiB: "
            f"float32, {sampling.batch_size} slots, and 10 % for gaps",
        ),
        Figure("actors", sampling.num_actors, "", "processes that draw"),
        Figure(
            "a sample",
            sample_s,
            "s",
            f"{footprint.num_calls} calls of {footprint.call_flops / 1e12:.3g} TFLOP take "
            f"{denoising:.3g} ({hardware.sampling_utilisation:.0%} of {peak / 1e12:.4g} TFLOP/s), "
            f"decoding {decoding:.3g}, measuring and compressing {handling:.2g}",
        ),
        Figure(
            "samples a second",
            sampling.num_samples / outcome.seconds,
            "",
            f"of all actors; {1 - outcome.writing:.1%} of writing overlaps",
        ),
        Figure(
            "time",
            outcome.seconds,
            "s",
            f"{sampling.num_samples:,} samples in {units:,} units simulated (seed {SEED}): "
            f"{outcome.redone} drawn again ({hardware.nodes_lost_per_hour:.0%} of nodes lost an "
            f"hour), the last {outcome.tail_s:.3g} s with idle actors",
        ),
        Figure(
            "output",
            num_bytes,
            "B",
            f"{sample_bytes / 1e6:.3g} MB a sample (HU compress {HU_RATIO:g} times, labels "
            f"{LABEL_RATIO:g}), "
            f"{num_bytes / outcome.seconds / 1e9:.3g} GB/s of {hardware.store_gb_s:.3g}",
        ),
        Figure(
            "requests",
            units * puts,
            "",
            f"{puts} for each shard of {rows} samples; the store takes "
            f"{hardware.store_puts_per_s:,.0f} a second",
        ),
        *_cost(hardware, gpu_hours, units * puts, num_bytes),
    ]
    return Part(tuple(figures), shares)


def find_autoencoder(config: ExperimentConfig, folder: Path) -> AutoencoderConfig | None:
    """The configuration of the autoencoder that a model of latents works in.

    Args:
        config: the recipe.
        folder: where its file is.

    Returns:
        From the bundle; else from the recipe that makes it, beside this one. None for models of
        images.

    Raises:
        InputError: there is neither.
    """
    if not isinstance(config.model, OfLatents):
        return None
    path = config.autoencoder_path
    if (path / FACTS).exists():
        found = read_facts(path).autoencoder_config
    else:
        recipe = folder / f"{path.name}.yaml"
        if not recipe.exists():
            raise InputError(
                f"neither the bundle {path} nor a recipe {recipe} of the autoencoder is there: "
                "train it first, or put its recipe beside this one"
            )
        model = load_recipe(recipe).model
        found = model if isinstance(model, AutoencoderConfig) else None
    if found is None:
        raise InputError(f"{path} is no autoencoder: give model.autoencoder one")
    return found


def _peak(hardware: Hardware, precision: str) -> float:
    """FLOP/s."""
    half = precision == "bf16"
    return 1e12 * (hardware.peak_bf16_tflops if half else hardware.peak_fp32_tflops)


def _stored_bytes(config: ExperimentConfig, autoencoder: AutoencoderConfig | None) -> float:
    """Of a training sample: image or latent, and layout."""
    voxels = math.prod(config.samples.shape)
    layout = voxels / LABEL_RATIO
    if autoencoder is None:
        return 2 * voxels / HU_RATIO + layout
    return 2 * math.prod(latent_shape(config, autoencoder) or ()) + layout


def _node_failures_per_s(hardware: Hardware) -> float:
    """Of one node: broken GPUs, and nodes that are taken back."""
    broken = hardware.gpus_per_node / hardware.gpu_hours_between_failures
    taken = -math.log1p(-hardware.nodes_lost_per_hour)
    return (broken + taken) / 3600


def _cost(hardware: Hardware, gpu_hours: float, puts: int, num_bytes: int) -> list[Figure]:
    """Nothing for a cluster that costs nothing by the hour."""
    if not hardware.dollars_per_gpu_hour:
        return []
    computing = gpu_hours * hardware.dollars_per_gpu_hour
    writing = puts / 1000 * hardware.dollars_per_1000_puts
    keeping = num_bytes / 1e12 * hardware.dollars_per_tb_month
    basis = f"{gpu_hours:,.0f} GPU hours at ${hardware.dollars_per_gpu_hour:g}"
    if puts:
        basis += f", requests ${writing:,.0f}, and ${keeping:,.0f} for each month of keeping it"
    return [Figure("cost", computing + writing + keeping, "$", basis)]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2g}"
