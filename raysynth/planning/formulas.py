"""Closed forms of what a run on many GPUs takes, in seconds, bytes and GB/s (10^9 bytes)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from raysynth.config.hardware import Hardware
from raysynth.training.memory import EngineChoice

BACKWARD_SHARE = 2 / 3
"""Of a training step's arithmetic; gradients can be exchanged during it."""

GRADIENT_BYTES = 4
"""Of a gradient or weight that workers exchange: all engines keep them in float32."""


@dataclass(frozen=True)
class Exchange:
    """Gradients, and under ZeRO weights, that workers tell each other in one optimizer step.

    Attributes:
        gigabytes: that each GPU sends.
        seconds: that this takes by itself.
        exposed_s: of these, what the backward passes do not hide.
    """

    gigabytes: float
    seconds: float
    exposed_s: float


def exchange(
    num_trained: int,
    num_workers: int,
    engine: EngineChoice,
    hardware: Hardware,
    *,
    compute_s: float,
    num_micro_batches: int,
    by_node: bool = True,
) -> Exchange:
    """What exchanging gradients takes.

    A ring all-reduce of G bytes sends 2 G (N - 1) / N a GPU (Patarasu & Yuan 2009). Within nodes of
    k GPUs first, and once a node over the network after, a node sends 2 G (m - 1) / m for m nodes.
    ZeRO-3 gathers weights in the forward and the backward pass instead: 3 G (Rajbhandari et al.
    2020, section 7).

    Args:
        num_trained: parameters that have gradients.
        num_workers: GPUs that train.
        engine: which one, and its ZeRO stage.
        hardware: links.
        compute_s: of one optimizer step on one GPU.
        num_micro_batches: forward passes in it.
        by_node: whether nodes add up before they use the network; NCCL does so.
    """
    if num_workers == 1:
        return Exchange(0.0, 0.0, 0.0)
    per_node = min(hardware.gpus_per_node, num_workers)
    nodes = -(-num_workers // hardware.gpus_per_node)
    # Rounds over the whole network, each of one "half" all-reduce: reduce-scatter or all-gather.
    every_micro_batch = {2: 1, 3: 3}.get(engine.zero_stage, 0) if engine.name == "deepspeed" else 0
    rounds = every_micro_batch * num_micro_batches
    if engine.zero_stage != 3 or engine.name != "deepspeed":
        rounds += 1 if every_micro_batch else 2
    round_gb = num_trained * GRADIENT_BYTES / 1e9
    inside = round_gb * (per_node - 1) / per_node / hardware.gpu_link_gb_s
    sharing = 1 if by_node else per_node
    between = sharing * round_gb * (nodes - 1) / nodes / hardware.network_gb_s
    seconds = rounds * (inside + between)
    hidden = 0.0
    if hardware.overlaps:
        micro_batches = num_micro_batches if every_micro_batch else 1
        hidden = BACKWARD_SHARE * compute_s * micro_batches / num_micro_batches
    sent = rounds * round_gb * (num_workers - 1) / num_workers
    return Exchange(sent, seconds, max(0.0, seconds - hidden))


def slowest_of(count: int, sigma: float) -> float:
    """How much longer than the median the slowest of several log-normal times takes, about.

    exp(sigma z) at the quantile 1 - 1 / (count + 1) of a standard normal: where the largest of
    `count` draws lies in the median (Blom 1958).
    """
    if count == 1 or sigma == 0:
        return 1.0
    return math.exp(sigma * NormalDist().inv_cdf(0.5 ** (1 / count)))


def best_interval_s(stall_s: float, between_failures_s: float) -> float:
    """Seconds between checkpoints that lose the least time: sqrt(2 d M) (Young 1974)."""
    return math.sqrt(2 * stall_s * between_failures_s)


def goodput(
    stall_s: float, interval_s: float, between_failures_s: float, restart_s: float
) -> float:
    """Share of the time that becomes progress: 1 - (d / t + t / 2M + R / M), 0 at least.

    Args:
        stall_s: d, that training stands still for a checkpoint.
        interval_s: t, between checkpoints.
        between_failures_s: M, of the whole group of workers.
        restart_s: R, from a failure until work goes on.
    """
    lost = stall_s / interval_s + interval_s / (2 * between_failures_s)
    return max(0.0, 1 - lost - restart_s / between_failures_s)
