"""What a cluster is made of, as `raysynth plan` needs to know it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from raysynth.config.base import Section
from raysynth.config.recipe import read_section


class Hardware(Section):
    """A cluster of equal nodes. GB are 10^9 bytes, GiB 2^30.

    Every default is an assumption that the plan names; a figure of your own is better.
    """

    name: str
    gpu: str
    """What the processors are called, for people."""
    num_gpus: int = Field(1, ge=1)
    """Processors that each run one worker: GPUs, or groups of cores."""
    gpus_per_node: int = Field(8, ge=1)
    memory_gib: float = Field(gt=0)
    """Of one GPU."""
    peak_bf16_tflops: float = Field(gt=0)
    """Dense, without sparsity. A multiplication and an addition are two operations."""
    peak_fp32_tflops: float = Field(gt=0)
    """Of convolutions: of GPUs that have TF32, that of TF32."""
    training_utilisation: float = Field(0.4, gt=0)
    """Share of the peak that a training step reaches."""
    sampling_utilisation: float = Field(0.4, gt=0)
    """Share of the peak that network calls of the sampling engine reach, at the recipe's batch."""
    decoding_utilisation: float = Field(0.3, gt=0)
    handling_s_per_megavoxel: float = Field(0.03, ge=0)
    """Of drawing, beside network calls: measuring the nodule, counting others, compressing. On one
    core of a Xeon a volume of 512^3 took 4.2 s."""
    overlaps: bool = True
    """Whether gradients are exchanged while the backward pass goes on."""
    gpu_link_gb_s: float = Field(gt=0)
    """Between the GPUs of a node, one way."""
    network_gb_s: float = Field(gt=0)
    """Of a node, one way."""
    store_gb_s: float = Field(gt=0)
    """Of the store, for all nodes together."""
    store_puts_per_s: float = Field(3500.0, gt=0)
    """S3 takes 3,500 a second and prefix."""
    gpu_hours_between_failures: float = Field(50_677.0, gt=0)
    """Llama 3's training saw one in 50,677 (419 in 54 days on 16,384 GPUs; published)."""
    nodes_lost_per_hour: float = Field(0.0, ge=0, lt=1)
    """Share of nodes that a provider takes back, of a spot market 0.05."""
    restart_s: float = Field(300.0, ge=0)
    """From a failure until work goes on."""
    straggler_sigma: float = Field(0.05, ge=0)
    """Of the logarithm of a step's time, between workers and steps."""
    checkpoint_gb_s: float = Field(1.0, gt=0)
    """That one worker writes to where checkpoints lie."""
    dollars_per_gpu_hour: float = Field(0.0, ge=0)
    dollars_per_1000_puts: float = Field(0.005, ge=0)
    dollars_per_tb_month: float = Field(23.0, ge=0)


def load_hardware(path: Path | str) -> Hardware:
    """Reads the description of a cluster, such as `cluster/hardware/h100_1000.yaml`.

    Raises:
        InputError: no such file, no valid YAML, an unknown key or an impossible value.
    """
    return read_section(Hardware, Path(path), {"name": Path(path).stem})
