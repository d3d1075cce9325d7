"""How synthetic samples are judged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raysynth.config.base import Section

BUNDLE_PREFIX = "bundle:"
"""Begins the names of extractors that raysynth trained; the bundle's path follows."""

EXTRACTOR_NAMES = (
    "ct-conv, bundle:PATH, inception2048, medicalnet50, torchvision:MODEL and "
    "module:PACKAGE.NAME:FUNCTION"
)
"""As a recipe can name extractors."""

_WITHOUT_WEIGHTS = re.compile(rf"ct-conv|{BUNDLE_PREFIX}.+|module:[\w.]+:\w+")
_WITH_WEIGHTS = re.compile(r"inception2048|medicalnet50|torchvision:\w+")


LpipsNetwork = Literal["alex", "vgg", "squeeze"]


class LpipsConfig(Section):
    """The files that LPIPS needs, which are others' work and not part of the package."""

    network: LpipsNetwork = "alex"
    backbone: Path
    """ImageNet weights as torchvision publishes them, of AlexNet, VGG16 or SqueezeNet 1.1."""
    heads: Path
    """alex.pth, vgg.pth or squeeze.pth of LPIPS v0.1."""


class EvaluationConfig(Section):
    """Metrics, their regions and controls."""

    extractors: tuple[str, ...] = Field(("ct-conv",), min_length=1)
    """What features are compared: `EXTRACTOR_NAMES`. `ct-conv` is built in; `bundle:PATH` was
    trained by an extractor recipe, and a relative path starts at work_dir; a module of the user's
    brings its own weights; the others need a file of weights each. `medicalnet50` takes volumes."""
    extractor_weights: dict[str, Path] = Field(default_factory=dict)
    """File of weights by extractor, for example `inception2048`: torch-fidelity's
    weights-inception-2015-12-05-6726825d.pth. State dicts (.pth) or .safetensors."""
    lpips: LpipsConfig | None = None
    """Compare pairs of slices by LPIPS, too: a filled slice with its host, and two samples of one
    request."""
    num_bootstrap: int = Field(200, ge=2)
    """Sub-samples behind each interval."""
    controls: bool = True
    """Also sample an untrained model and shuffled conditions, and judge them the same way."""
    num_control_samples: int | None = Field(None, ge=2)
    """Samples of each control and of each swept scale; None: as many as the run has."""
    num_pairs: int = Field(0, ge=0)
    """So many requests are drawn twice, to tell how alike the samples of one are (diversity)."""
    stream: bool = False
    """Show FID and KID while samples are drawn, from a process beside the samplers that takes about
    a hundredth of their time; the last values go to `work_dir`/evaluation/`name`_stream.json."""
    guidance_scales: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Scales at which the same requests are drawn from the same noise once more, to choose one: the
    report shows quality, diversity and consistency over them. Each request is drawn twice."""

    @model_validator(mode="after")
    def _extractors_are_known(self) -> EvaluationConfig:
        for name in self.extractors:
            if not (_WITHOUT_WEIGHTS.fullmatch(name) or _WITH_WEIGHTS.fullmatch(name)):
                raise ValueError(f"extractors: no extractor {name!r}; there are {EXTRACTOR_NAMES}")
        if len(set(self.extractors)) < len(self.extractors):
            raise ValueError(f"extractors {', '.join(self.extractors)}: name each once")
        for name in self.extractor_weights:
            if not _WITH_WEIGHTS.fullmatch(name):
                raise ValueError(
                    f"extractor_weights.{name}: no extractor of that name takes weights; "
                    "inception2048, medicalnet50 and torchvision:MODEL do"
                )
        return self

    @model_validator(mode="after")
    def _scales_differ(self) -> EvaluationConfig:
        asked = [f"{scale:g}" for scale in self.guidance_scales]
        if len(asked) == 1 or len(set(asked)) < len(asked):
            raise ValueError(
                f"guidance_scales {', '.join(asked)}: give two or more different ones, or none"
            )
        return self
