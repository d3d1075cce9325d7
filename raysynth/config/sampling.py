"""How synthetic samples are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raysynth.config.base import Section

SamplerName = Literal["ddpm", "ddim", "dpm_solver++"]


DRAWING = (
    "num_samples",
    "nodule_free",
    "hole",
    "hole_margin_px",
    "sampler",
    "num_inference_steps",
    "guidance_scale",
    "prior",
    "batch_size",
    "use_gpu",
    "compile",
)
"""Fields that decide what is drawn. A GPU draws other noise from the same seed than a CPU, and a
compiled network rounds otherwise."""


class SamplingConfig(Section):
    """A batch run of the sampling engine."""

    num_samples: int = Field(2048, ge=1)
    nodule_free: float = Field(0.0, ge=0, lt=1)
    """Share of the samples that are asked for without any nodule."""
    hole: Literal["organ", "box", "free", "new_tissue"] = "organ"
    """Of models that fill holes: the organ itself; the box around it; strokes; or the outline of
    another patient's tumour, put into the same organ of this one."""
    hole_margin_px: int = Field(8, ge=0)
    """Around the organ's box."""
    sampler: SamplerName = "ddim"
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(1.0, ge=0)
    """1 follows the condition as trained; more follows it harder, at two network calls a step."""
    prior: Literal["independent", "joint"] = "joint"
    """Where conditions come from: `independent` as published (place, size and scores unrelated),
    `joint` draws whole LIDC nodules and keeps them inside the lung."""
    batch_size: int = Field(8, ge=1)
    """Slots of the engine: the fixed batch shape at which a sample is reproducible bit by bit."""
    num_actors: int = Field(1, ge=1)
    use_gpu: bool = False
    compile: bool = False
    """Compile the network: a minute once, then 1.4 to 1.7 times as fast for single samples on a
    CPU. Needs a C++ compiler there."""
    threads_per_actor: int = Field(1, ge=1)
