"""Does a recipe's training step fit a GPU's memory, and what would?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raysynth.config import ExperimentConfig
from raysynth.config.model import AutoencoderConfig, UNet
from raysynth.errors import InputError
from raysynth.training.footprint import Footprint, training_footprint
from raysynth.training.memory import EngineChoice, State, choose_engine, state_of

ALLOWANCE = 1.1
"""For the allocator's gaps and the libraries' scratch space."""

SMALLEST_SIZE = 16
"""Of patches that are proposed."""


@dataclass(frozen=True)
class Need:
    """Memory of one worker.

    Attributes:
        engine: that the recipe gets.
        state: weights, gradients, moments, average, buckets.
        activations: at the fullest moment of a micro batch.
        footprint: of the step.
    """

    engine: EngineChoice
    state: State
    activations: int
    footprint: Footprint

    @property
    def total(self) -> int:
        """Bytes, with an allowance for what is not counted."""
        return round(ALLOWANCE * self.state.peak(self.activations))


def need_of(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None, memory_bytes: float
) -> Need:
    """What a recipe's training step needs.

    Args:
        config: the recipe.
        autoencoder: of a model of latents.
        memory_bytes: of one worker, by which `engine: auto` decides.
    """
    return _need(config, training_footprint(config, autoencoder), memory_bytes)


def _need(config: ExperimentConfig, footprint: Footprint, memory_bytes: float) -> Need:
    training = config.training
    counts = footprint.num_parameters, footprint.num_trained
    engine = choose_engine(training, *counts, memory_bytes)
    parts = training.gradient_accumulation_steps
    state = state_of(
        *counts, training.num_workers, engine.name, engine.zero_stage, accumulates=parts > 1
    )
    return Need(engine, state, footprint.activation_bytes(training.forward_batch_size), footprint)


def what_fits(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None, memory_bytes: float
) -> tuple[str, ...] | None:
    """Changes of a recipe, as `--set` takes them, after which its training step fits.

    In the order of what they cost: smaller micro batches, activations computed twice, ZeRO, and
    then, as the model is another one, smaller samples.

    Returns:
        None if nothing of this helps; nothing to change if it fits as it is.
    """
    for changes in _alternatives(config, autoencoder):
        changed = _changed(config, changes)
        footprint = training_footprint(changed, autoencoder)
        for more in _cheaper_batches(changed):
            if _need(_changed(changed, more), footprint, memory_bytes).total <= memory_bytes:
                return tuple(f"{name}={_yaml(value)}" for name, value in (changes | more).items())
    return None


def check_fits(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None, memory_bytes: float
) -> Need:
    """What a recipe's training step needs; one that does not fit is refused.

    Raises:
        InputError: says what it needs, and what would fit.
    """
    need = need_of(config, autoencoder, memory_bytes)
    if need.total <= memory_bytes:
        return need
    changes = what_fits(config, autoencoder, memory_bytes)
    advice = "take GPUs with more memory, or more of them under training.engine deepspeed"
    if changes:
        advice = "this would fit: " + " ".join(f"--set {change}" for change in changes)
    raise InputError(
        f"{config.name}: a training step needs {need.total / 2**30:.1f} GiB on every worker "
        f"({need.state.peak() / 2**30:.1f} of weights and optimizer under {need.engine}, "
        f"{need.activations / 2**30:.1f} of activations) and there are "
        f"{memory_bytes / 2**30:.1f}; {advice}"
    )


def _alternatives(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None
) -> Iterator[dict[str, Any]]:
    """Changes that alter what a step computes, none first."""
    twice: dict[str, Any] = {}
    if isinstance(config.model, UNet) and not config.model.checkpointing:
        twice = {"model.checkpointing": True}
    yield {}
    if twice:
        yield twice
    factor = config.model.downsampling
    if autoencoder is not None:
        factor *= autoencoder.downsampling
    size = config.data.samples.size // 2
    while size >= SMALLEST_SIZE and size % factor == 0:
        view = size * config.data.samples.pixel_mm  # voxels stay as large as they are
        smaller = {"data.samples.size": size, "data.samples.field_of_view_mm": view}
        yield {**twice, **smaller}
        size //= 2


def _cheaper_batches(config: ExperimentConfig) -> Iterator[dict[str, Any]]:
    """Changes that leave the result as it is, none first."""
    training = config.training
    micro_batch = training.forward_batch_size
    fewer = [n for n in range(micro_batch - 1, 0, -1) if training.local_batch_size % n == 0]
    smaller: list[dict[str, Any]] = [{}, *({"training.micro_batch_size": n} for n in fewer)]
    yield from smaller
    if training.num_workers > 1:
        for stage in (1, 2, 3):
            zero = {"training.engine": "deepspeed", "training.zero_stage": stage}
            for change in (smaller[0], smaller[-1]):
                yield zero | change


def _changed(config: ExperimentConfig, changes: dict[str, Any]) -> ExperimentConfig:
    for path, value in changes.items():
        config = _with(config, path.split("."), value)
    return config


def _with(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if rest:
        value = _with(getattr(section, name), rest, value)
    return section.model_copy(update={name: value})


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
