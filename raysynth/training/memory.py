"""Bytes of weights, gradients, moments and averages on one worker, and the engine that fits them.

All engines keep weights and gradients in float32 (activations may be bfloat16): 4 bytes a
parameter where ZeRO's paper counts 2 and a float32 copy (Rajbhandari et al. 2020, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raysynth.config import TrainingConfig
from raysynth.config.training import ZeroStage

EngineName = Literal["plain", "ddp", "deepspeed"]

BUCKET_ELEMENTS = 2**23
"""Gradients that DeepSpeed exchanges at once: 32 MiB, as DDP. Its own default takes 2 GB."""

STATE_SHARE = 0.5
"""Of a worker's memory that its state may take by `engine: auto`; activations need the rest."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine, its ZeRO stage (0 of others than DeepSpeed), and why."""

    name: EngineName
    zero_stage: ZeroStage
    reason: str

    def __str__(self) -> str:
        return f"DeepSpeed ZeRO-{self.zero_stage}" if self.name == "deepspeed" else self.name


@dataclass(frozen=True)
class State:
    """Bytes on one worker besides activations.

    Attributes:
        weights: of all parameters; under ZeRO 1-3 with the float32 part that the optimizer steps.
        gradients: of the trained ones.
        moments: of AdamW, two.
        average: of the weights, each worker its part.
        buckets: that gradients, and under ZeRO-3 weights, pass through during forward and backward.
        stepping: more that exchange and update take afterwards, when activations are gone.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    buckets: int
    stepping: int

    def peak(self, activations: int = 0) -> int:
        """At the fullest moment of a step, with so many bytes of activations."""
        held = self.weights + self.gradients + self.moments + self.average
        return held + max(self.buckets + activations, self.stepping)


def state_of(
    num_parameters: int,
    num_trained: int,
    num_workers: int,
    name: EngineName,
    zero_stage: int,
    *,
    accumulates: bool = False,
) -> State:
    """What a worker holds besides activations.

    The parts are those of ZeRO's table (Rajbhandari et al. 2020, figure 1); what passes by is as
    DeepSpeed 0.19 does it, measured by `jobs.benchmarks.memory`.

    Args:
        num_parameters: of the network.
        num_trained: of these, the trained ones.
        num_workers: N, that share what an engine shards.
        name: of the engine.
        zero_stage: of DeepSpeed.
        accumulates: whether a step takes several micro batches; then ZeRO 2 and 3 hold what has
            been added up beside what is new.
    """
    whole, part = 4 * num_trained, 4 * -(-num_trained // num_workers)
    frozen = 4 * (num_parameters - num_trained)
    if name != "deepspeed":
        return State(whole + frozen, whole, 2 * whole, part, 0, 0)
    bucket = min(4 * BUCKET_ELEMENTS, whole)
    match zero_stage:
        case 0:  # all gradients are copied into one piece
            return State(whole + frozen, whole, 2 * whole, part, 0, whole)
        case 1:
            return State(whole + part + frozen, whole, 2 * part, part, bucket, 0)
        case 2:  # gradients of the part are copied into one piece
            passing = bucket + part * accumulates
            return State(whole + part + frozen, part, 2 * part, part, passing, part)
        case _:  # weights are gathered, ahead too, and gradients scattered
            passing = part + 2 * bucket if accumulates else 4 * bucket
            return State(2 * part + frozen, part, 2 * part, part, passing, part + bucket)


def choose_engine(
    config: TrainingConfig, num_parameters: int, num_trained: int, memory_bytes: float
) -> EngineChoice:
    """The engine that a recipe gets, and why.

    Args:
        config: the recipe's.
        num_parameters: of the network.
        num_trained: of these, the trained ones.
        memory_bytes: of one worker.
    """
    if config.engine == "deepspeed":
        reason = f"the recipe asks for DeepSpeed ZeRO-{config.zero_stage}"
        return EngineChoice("deepspeed", config.zero_stage, reason)
    if config.num_workers == 1:
        return EngineChoice("plain", 0, "one worker has nobody to exchange gradients with")
    if config.engine == "ddp":
        return EngineChoice("ddp", 0, "the recipe asks for it")
    # ZeRO 1-3 costs a small model 1.7-2.1 times the step: it pays where memory is short.
    room = STATE_SHARE * memory_bytes

    def held_by(name: EngineName, stage: ZeroStage) -> int:
        accumulates = config.gradient_accumulation_steps > 1
        state = state_of(
            num_parameters,
            num_trained,
            config.num_workers,
            name,
            stage,
            accumulates=accumulates,
        )
        return state.peak()

    whole = held_by("ddp", 0)
    told = f"weights, gradients and moments take {whole / 2**30:.2g} GiB whole"
    if whole <= room:
        return EngineChoice("ddp", 0, f"{told}, less than half of {memory_bytes / 2**30:.3g} GiB")
    stages: tuple[ZeroStage, ...] = (1, 2, 3)
    stage = next((one for one in stages if held_by("deepspeed", one) <= room), stages[-1])
    return EngineChoice(
        "deepspeed",
        stage,
        f"{told}, more than half of {memory_bytes / 2**30:.3g} GiB; shared by "
        f"{config.num_workers} workers under ZeRO-{stage} "
        f"{held_by('deepspeed', stage) / 2**30:.2g} GiB",
    )
