"""How synthetic samples are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

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
    """Samples of each control; None: as many as the run has."""
