"""Model families. The family decides which fields exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from raysynth.config.base import Section
from raysynth.config.pretrained import (
    Network,
    downsampling_of,
    latent_channels_of,
    latent_scale_of,
    read_autoencoder,
    read_stable_diffusion,
)

Window = tuple[float, float]

Organ = Literal["lung", "nodule", "liver", "kidney", "spleen", "tumour"]
"""What a hole may be made of: lungs and kidneys are both sides."""

ScheduleName = Literal["linear", "scaled_linear", "cosine", "rectified_flow"]

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]

LossName = Literal["l2", "l1"]


def _check_groups(channels: tuple[int, ...], norm_num_groups: int) -> None:
    """Group normalisation divides the channels of every level."""
    for width in channels:
        if width % norm_num_groups:
            raise ValueError(
                f"channels {channels}: {width} is not a multiple of "
                f"norm_num_groups {norm_num_groups}"
            )


class OfImages(Section):
    """A field of models that read or draw images themselves."""

    window_hu: Window = (-1000.0, 400.0)
    """HU that map to -1 and 1; what lies outside is clipped."""

    @model_validator(mode="after")
    def _check_window(self) -> OfImages:
        low, high = self.window_hu
        if not low < high:
            raise ValueError(f"window_hu {self.window_hu}: give (low, high) with low < high")
        return self


class Autoencoder(OfImages):
    """Fields that both autoencoders share. `channels` has one entry a level, each level halves."""

    window_hu: Window = (-1000.0, 2500.0)
    channels: tuple[PositiveInt, ...] = Field((64, 128, 256), min_length=1)
    num_res_blocks: int = Field(2, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    adversarial_weight: float = Field(0.0, ge=0)
    """Of being taken for real by a discriminator of patches, beside the reconstruction error; 0:
    there is none. A tiny autoencoder reconstructed worse with it: both networks' gradients are
    clipped together, and the discriminator's may take most of that."""
    discriminator_channels: PositiveInt = 64

    @property
    def downsampling(self) -> int:
        """Factor by which a latent is smaller than its image, per axis."""
        return int(2 ** (len(self.channels) - 1))

    @model_validator(mode="after")
    def _check(self) -> Autoencoder:
        _check_groups(self.channels, self.norm_num_groups)
        return self


class AutoencoderKLConfig(Autoencoder):
    """Continuous latents with a small Kullback-Leibler penalty, of slices or of volumes."""

    family: Literal["autoencoder_kl"] = "autoencoder_kl"
    latent_channels: int = Field(4, ge=1)
    kl_weight: float = Field(1e-6, ge=0)


class VQVAEConfig(Autoencoder):
    """Vector-quantised latents (system A: x4, 3 channels, 8,192 codes)."""

    family: Literal["vqvae"] = "vqvae"
    latent_channels: int = Field(3, ge=1)
    num_codes: int = Field(8192, ge=2)
    commitment_weight: float = Field(0.25, ge=0)


class PretrainedAutoencoderConfig(OfImages):
    """An autoencoder from a diffusers folder, frozen unless it is trained on.

    Of a model of three colours, images are repeated over them and the outputs averaged.
    """

    family: Literal["pretrained_autoencoder"] = "pretrained_autoencoder"
    window_hu: Window = (-1000.0, 2500.0)
    pretrained: Path
    """Folder of a VQModel or AutoencoderKL: config.json and safetensors."""
    network: Network | None = None
    """The folder's config.json, from which it is read as soon as the folder is there."""

    @model_validator(mode="before")
    @classmethod
    def _read_folder(cls, values: Any) -> Any:
        return _with_folder(values, lambda folder: {"network": read_autoencoder(folder)})

    @property
    def is_known(self) -> bool:
        """Whether the folder was there to be read."""
        return self.network is not None

    @property
    def downsampling(self) -> int:
        """Factor by which a latent is smaller than its image, per axis; 1 while unknown."""
        return 1 if self.network is None else downsampling_of(self.network)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        assert self.network is not None
        return latent_channels_of(self.network)

    @property
    def latent_scale(self) -> float | None:
        """The published factor on latents; None: to be measured."""
        assert self.network is not None
        return latent_scale_of(self.network)


AutoencoderConfig = AutoencoderKLConfig | VQVAEConfig | PretrainedAutoencoderConfig


class Diffusion(Section):
    """Fields that all diffusion models share: the noise they are trained with, and the loss."""

    num_train_timesteps: int = Field(1000, ge=1)
    schedule: ScheduleName = "scaled_linear"
    prediction_type: PredictionType = "epsilon"
    """`flow` belongs to the schedule `rectified_flow`, which else allows `sample` alone."""
    loss: LossName = "l2"
    snr_gamma: float | None = Field(None, gt=0)
    """Cap on the signal-to-noise ratio that weighs each timestep's error of x_0 (min-SNR; Hang et
    al. 2023 take 5). None: the prediction's own error counts the same at all timesteps."""
    condition_drop: float = Field(0.1, ge=0, lt=1)
    """Share of training samples whose condition is dropped, so that guidance is available."""

    @model_validator(mode="after")
    def _prediction_fits_schedule(self) -> Diffusion:
        asked = f"prediction_type {self.prediction_type} with schedule {self.schedule}"
        if self.prediction_type == "flow" and self.schedule != "rectified_flow":
            raise ValueError(f"{asked}: a flow needs rectified_flow; use that, or v_prediction")
        if self.schedule == "rectified_flow" and self.prediction_type not in ("flow", "sample"):
            raise ValueError(f"{asked}: this schedule ends in pure noise; use flow or sample")
        return self

    @model_validator(mode="after")
    def _weight_fits_loss(self) -> Diffusion:
        if self.snr_gamma is not None and self.loss != "l2":
            raise ValueError(
                f"snr_gamma {self.snr_gamma} with loss {self.loss}: it weighs squared errors; "
                "use loss l2, or leave snr_gamma out"
            )
        return self


class UNet(Section):
    """Fields of MONAI's U-Nets."""

    channels: tuple[PositiveInt, ...] = Field((128, 256, 384, 512), min_length=1)
    attention_levels: tuple[bool, ...] = (False, True, True, True)
    num_res_blocks: int = Field(2, ge=1)
    num_head_channels: PositiveInt | tuple[PositiveInt, ...] = 32
    """Width of an attention head: at every level, or one for each."""
    norm_num_groups: int = Field(32, ge=1)
    checkpointing: bool = False
    """Compute activations once more in the backward pass instead of keeping them: a third more
    work, and a fraction of the memory."""

    @property
    def head_channels(self) -> tuple[int, ...]:
        """Width of an attention head at each level."""
        given = self.num_head_channels
        return given if isinstance(given, tuple) else (given,) * len(self.channels)

    @model_validator(mode="after")
    def _check(self) -> UNet:
        if len(self.channels) != len(self.attention_levels):
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} entries and channels "
                f"{len(self.channels)}: give one for each level"
            )
        if len(self.head_channels) != len(self.channels):
            raise ValueError(
                f"num_head_channels has {len(self.head_channels)} entries and channels "
                f"{len(self.channels)}: give one number, or one for each level"
            )
        for width, attends, head in zip(
            self.channels, self.attention_levels, self.head_channels, strict=True
        ):
            if width % self.norm_num_groups or (attends and width % head):
                raise ValueError(
                    f"channels {self.channels}: {width} is not a multiple of norm_num_groups "
                    f"{self.norm_num_groups} and, with attention, of num_head_channels "
                    f"{self.num_head_channels}"
                )
        return self

    @property
    def downsampling(self) -> int:
        """Factor by which the U-Net's deepest level is smaller than its input, per axis."""
        return int(2 ** (len(self.channels) - 1))


class OfLatents(Diffusion):
    """A field of diffusion models that work on an autoencoder's latents."""

    autoencoder: Path
    """Bundle of a trained autoencoder; a relative path starts at the recipe's work_dir."""


class LatentDiffusionConfig(OfLatents, UNet):
    """2D latent diffusion guided by a nodule box, attributes and the lungs (system A)."""

    family: Literal["latent_diffusion"] = "latent_diffusion"
    conditioning: Literal[1, 2, 3, 4] = 4
    """1: nodule mask at the input. 2: + mask in cross-attention. 3: + attributes in cross-attention
    (all three as published). 4: + lung mask at the input (ours)."""
    context: Literal["tokens", "single"] = "tokens"
    """`single`: the published one-vector context. `tokens`: one token a mask patch and score."""


class TextGuided(OfLatents):
    """A field of diffusion models that are told a prompt, and nothing else."""


class TextDiffusionConfig(TextGuided, UNet):
    """2D latent diffusion guided by a prompt (system B, for want of Stable Diffusion's weights)."""

    family: Literal["text_diffusion"] = "text_diffusion"
    text_width: PositiveInt = 256
    text_layers: PositiveInt = 4
    text_heads: PositiveInt = 4
    max_tokens: int = Field(77, ge=8)
    """Longest prompt, in words and commas."""

    @model_validator(mode="after")
    def _check_heads(self) -> TextDiffusionConfig:
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_width {self.text_width} is not a multiple of text_heads {self.text_heads}"
            )
        return self


class StableDiffusionConfig(TextGuided):
    """Stable Diffusion v1 or v2, fine-tuned from a diffusers folder (system B).

    Text encoder and autoencoder stay as they are. `num_train_timesteps`, `schedule` and
    `prediction_type` are those of the folder's scheduler.
    """

    family: Literal["stable_diffusion"] = "stable_diffusion"
    pretrained: Path
    """Folder of a StableDiffusionPipeline. Its `vae`, as a bundle, is the `autoencoder`."""
    tuning: Literal["lora", "full"] = "lora"
    """Train low-rank updates of the attention's projections (Hu et al. 2022), or all of the U-Net.
    Updates are added to the weights in the bundle."""
    lora_rank: int = Field(16, ge=1)
    networks: dict[Literal["unet", "text_encoder", "vae"], Network] = Field(default_factory=dict)
    """Each part's config.json, read from the folder as soon as it is there."""

    @model_validator(mode="before")
    @classmethod
    def _read_folder(cls, values: Any) -> Any:
        return _with_folder(values, read_stable_diffusion)

    @property
    def is_known(self) -> bool:
        """Whether the folder was there to be read."""
        return bool(self.networks)

    @property
    def downsampling(self) -> int:
        """Factor by which the U-Net's deepest level is smaller than its input; 1 while unknown."""
        return downsampling_of(self.networks["unet"]) if self.networks else 1


class SemanticDiffusionConfig(Diffusion, UNet, OfImages):
    """2D diffusion of pixels, the layout's labels in the decoder's normalisations (system C)."""

    family: Literal["semantic_diffusion"] = "semantic_diffusion"
    layout_channels: PositiveInt = 128
    """Hidden channels between the layout and each normalisation's scale and shift."""
    edge_map: bool = False
    """One channel more beside the labels: 1 where a neighbour has another label."""
    schedule: ScheduleName = "linear"
    condition_drop: float = Field(0.2, ge=0, lt=1)


class HoleFilling(Section):
    """A field of models that fill holes of slices."""

    organs: tuple[Organ, ...] = Field(("lung", "liver", "kidney", "spleen", "tumour"), min_length=1)
    """What holes are made of, each organ alone or several in one hole."""


class InpaintingConfig(Diffusion, UNet, OfImages, HoleFilling):
    """2D diffusion of pixels that fills holes of slices (system E)."""

    family: Literal["inpainting"] = "inpainting"
    outside_weight: float = Field(0.1, gt=0, le=1)
    """Weight in the loss of a pixel outside the hole; inside it is 1."""
    schedule: ScheduleName = "cosine"


class LayoutGuided(Section):
    """A field of models that are told, voxel by voxel, where lung and nodule are (system D).

    They take slices or volumes, as the sample set is.
    """

    layout_labels: tuple[Literal["lung", "nodule"], ...] = Field(("lung", "nodule"), min_length=1)
    """One input channel for each; everything else is background to the model."""


class LayoutDiffusionConfig(Diffusion, UNet, OfImages, LayoutGuided):
    """Diffusion of pixels or voxels, the layout beside the input (system D, Lung-DDPM)."""

    family: Literal["layout_diffusion"] = "layout_diffusion"
    schedule: ScheduleName = "cosine"
    loss: LossName = "l1"
    condition_drop: float = Field(0.0, ge=0, lt=1)


class LayoutLatentDiffusionConfig(OfLatents, UNet, LayoutGuided):
    """Diffusion of latents: the layout beside the input, a nodule's scores in cross-attention."""

    family: Literal["layout_latent_diffusion"] = "layout_latent_diffusion"


class Gan(OfImages):
    """Fields that generators trained against a discriminator share. They draw in one call."""

    discriminator_channels: PositiveInt = 64
    discriminator_rate: float = Field(1.0, gt=0)
    """The discriminator's learning rate, in the generator's."""


class SpadeGanConfig(Gan):
    """Normalisations that follow the layout (Park et al. 2019), system C's baseline."""

    family: Literal["spade_gan"] = "spade_gan"
    channels: tuple[PositiveInt, ...] = Field((64, 128, 256, 512, 1024, 1024), min_length=1)
    """From the image's own size to the smallest; each level halves."""
    layout_channels: PositiveInt = 128
    num_discriminators: int = Field(2, ge=1)
    """Each further one sees the image at half the size."""
    discriminator_layers: int = Field(4, ge=2)
    feature_weight: float = Field(10.0, ge=0)
    """Of the distance between a discriminator's features of real and of generated images."""
    discriminator_rate: float = Field(4.0, gt=0)

    @property
    def downsampling(self) -> int:
        """Factor by which the smallest level is smaller than the image, per axis."""
        return int(2 ** len(self.channels))


class Pix2PixConfig(Gan, HoleFilling):
    """A U-Net that fills holes in one call (Isola et al. 2017; system E's baseline)."""

    family: Literal["pix2pix"] = "pix2pix"
    channels: tuple[PositiveInt, ...] = Field((64, 128, 256, 512, 512, 512, 512), min_length=2)
    dropout: float = Field(0.5, ge=0, lt=1)
    discriminator_layers: int = Field(3, ge=2)
    l1_weight: float = Field(100.0, ge=0)

    @property
    def downsampling(self) -> int:
        """Factor by which the smallest level is smaller than the image, per axis."""
        return int(2 ** (len(self.channels) - 1))


class LayoutGanConfig(Gan, LayoutGuided):
    """A U-Net from the layout to the image in one call (pix2pix in 3D, system D's baseline)."""

    family: Literal["layout_gan"] = "layout_gan"
    channels: tuple[PositiveInt, ...] = Field((32, 64, 128, 256, 256), min_length=2)
    dropout: float = Field(0.0, ge=0, lt=1)
    discriminator_layers: int = Field(3, ge=2)
    l1_weight: float = Field(100.0, ge=0)

    @property
    def downsampling(self) -> int:
        """Factor by which the smallest level is smaller than the image, per axis."""
        return int(2 ** (len(self.channels) - 1))


class ExtractorConfig(OfImages):
    """An encoder of slices that learns from them alone: a metric's features of this domain.

    It draws nothing. `channels` has one entry a level, each level halves; slices may have any size
    of 16 or more.
    """

    family: Literal["extractor"] = "extractor"
    channels: tuple[PositiveInt, ...] = Field((32, 64, 128, 256), min_length=1, max_length=5)
    num_res_blocks: int = Field(1, ge=1)
    norm_num_groups: int = Field(8, ge=1)
    feature_dim: int = Field(96, ge=2)
    """Length of a feature vector. Fréchet distances need several times as many samples."""
    embedding_dim: int = Field(256, ge=2)
    """Width of the expander between features and VICReg's loss; training alone has it."""
    invariance_weight: float = Field(25.0, ge=0)
    variance_weight: float = Field(25.0, ge=0)
    covariance_weight: float = Field(1.0, ge=0)
    """These three as published (Bardes, Ponce and LeCun 2022, section 4.1)."""
    degradation_weight: float = Field(25.0, ge=0)
    """Of the error in telling blur, noise and shift from the features (ours)."""

    @model_validator(mode="after")
    def _check(self) -> ExtractorConfig:
        _check_groups(self.channels, self.norm_num_groups)
        return self

    @property
    def downsampling(self) -> int:
        """Slices need not be divisible by anything."""
        return 1


DiffusionConfig = (
    LatentDiffusionConfig
    | TextDiffusionConfig
    | StableDiffusionConfig
    | SemanticDiffusionConfig
    | InpaintingConfig
    | LayoutDiffusionConfig
    | LayoutLatentDiffusionConfig
)


def hears_scores(model: Section) -> bool:
    """Whether a model is told the five scores of a nodule, as numbers or in words."""
    if isinstance(model, LatentDiffusionConfig):
        return model.conditioning >= 3
    return isinstance(model, TextGuided | LayoutLatentDiffusionConfig)


def takes_volumes(model: Section) -> bool:
    """Whether a model works on volumes as well as on slices."""
    return isinstance(model, LayoutGuided | AutoencoderKLConfig)


GanConfig = SpadeGanConfig | Pix2PixConfig | LayoutGanConfig

ModelConfig = Annotated[
    AutoencoderConfig | DiffusionConfig | GanConfig | ExtractorConfig,
    Field(discriminator="family"),
]

FromFolder = PretrainedAutoencoderConfig | StableDiffusionConfig
"""Models that start from published weights."""


def _with_folder(values: Any, read: Callable[[Path], dict[str, Any]]) -> Any:
    """A section's values and, if its folder is there, what that says; a bundle has no folder.

    Raises:
        ValueError: the folder cannot be used, or says something else than the values.
    """
    folder = values.get("pretrained") if isinstance(values, dict) else None
    if not isinstance(folder, str | Path) or not Path(folder).expanduser().is_dir():
        return values
    said = read(Path(folder).expanduser())
    for name, value in said.items():
        if (values.get(name) or value) != value:
            raise ValueError(
                f"{name} {values[name]!r}, but {folder} was trained with {value!r}: leave it out"
            )
    return {**values, **said}
