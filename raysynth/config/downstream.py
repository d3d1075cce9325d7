"""How the usefulness of synthetic samples is put to the trial."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raysynth.config.base import Section
from raysynth.config.sampling import TextureClass

Task = Literal["classification", "malignancy", "localisation", "segmentation"]


class Imbalance(Section):
    """A rare kind of nodule, made rarer in training, then filled up by several means."""

    texture: TextureClass = "non_solid"
    kept: float = Field(0.1, ge=0, lt=1)
    """Share of the patients with such nodules whose slices of them stay in training; at least one
    patient's do."""


class DownstreamConfig(Section):
    """Networks that are trained on real samples, on real and synthetic ones, and on controls."""

    tasks: tuple[Task, ...] = ("classification", "localisation", "segmentation")
    """`classification`: nodule or none, on crops. `malignancy`: benign or malignant nodules, where
    readers rated them. `localisation`: boxes on slices. `segmentation`: the nodule's pixels; the
    only one for volumes."""
    folds: int = Field(10, ge=2)
    """Of the patients whom the generator was not trained on. With fewer than 6 no signed-rank test
    can be significant."""
    seeds: int = Field(1, ge=1)
    """Trainings of each network, with other weights and batches; figures are their means."""
    ratios: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0, 2.0)
    """Synthetic samples per real one, an arm for each."""
    accepted_only: bool = False
    """Leave out synthetic samples in which the nodule asked for was not found."""
    augmented_copies: int = Field(4, ge=0)
    """Flipped, turned, shifted and noisy copies of every real sample in the arm `augmented`; 0:
    no such arm. Volumes are turned by quarters in the axial plane, and not shifted."""
    imbalance: Imbalance | None = None
    """Also thin out one kind of nodule; needs ratings, and requests for such nodules."""
    steps: int = Field(2000, ge=1)
    """Optimizer steps of every network: the same in all arms, so more data is not more training."""
    batch_size: int = Field(32, ge=2)
    """Samples a step; of volumes crops of up to 64 voxels a side."""
    detection_batch_size: int = Field(4, ge=1)
    """Of `localisation`, whose images are whole slices."""
    learning_rate: float = Field(1e-3, gt=0)
    width: int = Field(64, ge=4)
    """Channels of the classifier's first stage, and twice those of the segmenting network; 64
    as published, 8 to 16 for a CPU."""
    backbone: Literal["narrow", "resnet18", "resnet34", "resnet50"] = "resnet50"
    """Of the Faster R-CNN; never pretrained. `narrow`: an SE-ResNet-18 of that width, with a
    pyramid and heads to match, for a CPU."""
    detection_size: int = Field(256, ge=32)
    """Pixels a side that slices are brought to for it; less is faster and loses small nodules."""
    num_bootstrap: int = Field(1000, ge=10)
    """Draws of patients behind each interval."""
    use_gpu: bool = False

    @model_validator(mode="after")
    def _differ(self) -> DownstreamConfig:
        for name in ("tasks", "ratios"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                shown = ", ".join(map(str, given)) or "nothing"
                raise ValueError(f"{name} {shown}: give one or more, each once")
        return self
