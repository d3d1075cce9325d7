"""How synthetic samples are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from raysynth.config.base import Section

BUNDLE_PREFIX = "bundle:"
"""Begins the names of extractors that raysynth trained; the bundle's path follows."""

EXTRACTORS = rf"^(ct-conv|inception2048|{BUNDLE_PREFIX}.+)$"


class EvaluationConfig(Section):
    """Metrics, their regions and controls."""

    extractors: tuple[Annotated[str, Field(pattern=EXTRACTORS)], ...] = ("ct-conv",)
    """`ct-conv` is built in. `inception2048` needs torch-fidelity's weights on disk. `bundle:PATH`
    is an extractor that an extractor recipe trained; a relative path starts at work_dir."""
    inception_weights: Path | None = None
    """torch-fidelity's Inception weights: the file weights-inception-2015-12-05-6726825d.pth."""
    num_bootstrap: int = Field(200, ge=2)
    """Sub-samples behind each interval."""
    controls: bool = True
    """Also sample an untrained model and shuffled conditions, and judge them the same way."""
    num_control_samples: int | None = Field(None, ge=2)
    """Samples of each control and of each swept scale; None: as many as the run has."""
    guidance_scales: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Scales at which the same requests are drawn from the same noise once more, to choose one: the
    report shows quality, diversity and consistency over them. Each request is drawn twice."""

    @model_validator(mode="after")
    def _scales_differ(self) -> EvaluationConfig:
        asked = [f"{scale:g}" for scale in self.guidance_scales]
        if len(asked) == 1 or len(set(asked)) < len(asked):
            raise ValueError(
                f"guidance_scales {', '.join(asked)}: give two or more different ones, or none"
            )
        return self
