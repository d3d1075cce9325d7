"""How synthetic samples are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raysynth.config.base import Section

SamplerName = Literal["ddpm", "ddim", "dpm_solver++", "unipc"]

TextureClass = Literal["non_solid", "part_solid", "solid"]
"""Of a reader's score: 1; 2 and 3; 4 and 5."""

DiameterClass = Literal["below_6", "6_to_8", "8_to_15", "15_up"]

Attribute = Literal["sphericity", "margin", "lobulation", "spiculation", "texture"]

DRAWING = (
    "num_samples",
    "nodule_free",
    "max_draws",
    "cohort",
    "counterfactual",
    "prompts",
    "hole",
    "hole_margin_px",
    "nodules",
    "background",
    "feather_px",
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


class Cohort(Section):
    """Shares of a run's nodules, 0 to 1. Classes that are left out share the rest as in LIDC."""

    texture: dict[TextureClass, float] = Field(default_factory=dict)
    diameter_mm: dict[DiameterClass, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _are_shares(self) -> Cohort:
        for name, asked in (("texture", self.texture), ("diameter_mm", self.diameter_mm)):
            total = round(sum(asked.values()), 9)  # .3 + .35 + .35 is a little less than 1
            is_whole = len(asked) == (3 if name == "texture" else 4)
            if min(asked.values(), default=0) < 0 or total > 1 or (is_whole and total != 1):
                raise ValueError(
                    f"cohort.{name} {asked}: give shares of 0 or more that sum up to 1 at most, "
                    "and to 1 if all classes are given"
                )
        return self


class SamplingConfig(Section):
    """A batch run of the sampling engine."""

    num_samples: int = Field(2048, ge=1)
    nodule_free: float = Field(0.0, ge=0, lt=1)
    """Share of the samples that are asked for without any nodule."""
    max_draws: int = Field(1, ge=1, le=255)
    """How often a sample may be drawn until the nodule asked for is found in it; the last draw
    stays. With 1 nothing is rejected."""
    cohort: Cohort | None = None
    """Which nodules to ask for; none: as LIDC has them."""
    counterfactual: dict[Attribute, tuple[int, ...]] = Field(default_factory=dict)
    """Series that differ in one score alone, such as `{texture: [1, 3, 5]}`: same noise, same
    anatomy, same place. Samples come series by series."""
    prompts: tuple[str, ...] = ()
    """Of text models: what to draw, in turn. None given: prompts about nodules of the database."""
    hole: Literal["organ", "box", "free", "new_tissue"] = "organ"
    """Of models that fill holes: the organ itself; the box around it; strokes; or the outline of
    another patient's tumour, put into the same organ of this one."""
    hole_margin_px: int = Field(8, ge=0)
    """Around the organ's box."""
    nodules: Literal["own", "new"] = "own"
    """Of models guided by layouts: whose nodules are asked for, the host's own or new ones."""
    background: Literal["copied", "drawn"] = "copied"
    """Of the same: voxels outside the layout's labels are the host's own (anatomically aware
    sampling), or drawn with the rest (Med-DDPM)."""
    feather_px: int = Field(0, ge=0)
    """Over how many voxels inside a hole the host's own fade, beginning at its border; 0: none of
    them takes part."""
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

    @model_validator(mode="after")
    def _plans_are_joint(self) -> SamplingConfig:
        if self.prior == "independent" and (self.cohort or self.counterfactual):
            raise ValueError(
                "prior independent draws sizes and scores by itself: leave out cohort and "
                "counterfactual, or use prior joint"
            )
        if len(self.counterfactual) > 1:
            raise ValueError(
                f"counterfactual {', '.join(self.counterfactual)}: change one score at a time"
            )
        for name, values in self.counterfactual.items():
            if len(values) < 2 or not all(1 <= value <= 5 for value in values):
                raise ValueError(
                    f"counterfactual.{name} {values}: give two or more scores from 1 to 5"
                )
        return self
