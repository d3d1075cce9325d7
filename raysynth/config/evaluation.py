"""How synthetic samples are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raysynth.config.base import Section


class EvaluationConfig(Section):
    """Metrics, their regions and controls."""

    extractors: tuple[Literal["ct-conv", "inception2048"], ...] = ("ct-conv",)
    """`ct-conv` is built in. `inception2048` needs torch-fidelity's weights on disk."""
    inception_weights: Path | None = None
    """torch-fidelity's Inception weights: the file weights-inception-2015-12-05-6726825d.pth."""
    num_bootstrap: int = Field(200, ge=2)
    """Sub-samples behind each interval."""
    controls: bool = True
    """Also sample an untrained model and shuffled conditions, and judge them the same way."""
    num_control_samples: int | None = Field(None, ge=2)
    """Samples of each control and of each swept scale; None: as many as the run has."""
    stream: bool = False
    """Show FID and KID while samples are drawn, from a process beside the samplers that takes about
    a hundredth of their time; the last values go to `work_dir`/evaluation/`name`_stream.json."""
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
