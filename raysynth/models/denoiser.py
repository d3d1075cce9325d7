"""The networks of diffusion: MONAI's and diffusers' U-Nets, guided by a `ConditionBatch`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raysynth.config.model import (
    DiffusionConfig,
    InpaintingConfig,
    LatentDiffusionConfig,
    LayoutDiffusionConfig,
    LayoutGuided,
    LayoutLatentDiffusionConfig,
    SemanticDiffusionConfig,
    StableDiffusionConfig,
    TextDiffusionConfig,
    UNet,
    Window,
)
from raysynth.models.conditioner import (
    NUM_CLASSES,
    ConditionBatch,
    Conditioner,
    EncodedCondition,
    ScoreContext,
    edge_map,
    layout_channels,
    one_hot_layout,
    split_known,
)
from raysynth.models.monai import SPADE, DiffusionModelUNet, SPADEDiffusionModelUNet
from raysynth.models.text import TextEncoder, clip_tokens

Network = TypeVar("Network", bound=nn.Module)


class Denoiser(nn.Module, ABC):
    """Predicts noise, x_0 or v from what is noisy, its timestep and a condition."""

    def forward(self, x_t: Tensor, timestep: Tensor, condition: ConditionBatch) -> Tensor:
        """The prediction, (B, c, h, w).

        Args:
            x_t: noisy latents or images (B, c, h, w).
            timestep: of each sample, (B,).
            condition: of each sample.
        """
        return self.predict(x_t, timestep, self.encode(condition))

    @abstractmethod
    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """What `predict` needs of conditions; it stays the same over all steps of a sample."""

    @abstractmethod
    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""


class LatentDenoiser(Denoiser):
    """Masks beside the input, boxes and attributes in cross-attention (system A)."""

    def __init__(self, unet: DiffusionModelUNet, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """Input channels and context."""
        encoded: EncodedCondition = self.conditioner(condition)
        return encoded

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""
        x = torch.cat([x_t, encoded.channels.to(x_t.dtype)], dim=1)
        prediction: Tensor = self.unet(x, timestep, context=encoded.context)
        return prediction


class TextDenoiser(Denoiser):
    """Prompts in cross-attention, and as a whole beside the timestep (system B)."""

    def __init__(self, unet: DiffusionModelUNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet = unet
        # Where MONAI has a table of classes, as diffusers' `class_embed_type="projection"`.
        width = unet.class_embedding.embedding_dim
        unet.add_module("class_embedding", nn.Linear(text_encoder.width, width))
        self.text_encoder = text_encoder

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """The prompts' words; without a prompt, those of the empty one."""
        prompts = condition.text or ("",) * len(condition)
        nothing = torch.empty(len(condition), 0, 1, 1, device=condition.box.device)
        return EncodedCondition(nothing, self.text_encoder(prompts))

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""
        assert encoded.context is not None
        whole = encoded.context[:, 0]
        prediction: Tensor = self.unet(x_t, timestep, context=encoded.context, class_labels=whole)
        return prediction


class StableDenoiser(Denoiser):
    """Stable Diffusion: prompts in cross-attention, read by a text encoder that stays as it is."""

    def __init__(self, unet: Any, text_encoder: Any, tokenizer: Tokenizer) -> None:
        """Joins the parts.

        Args:
            unet: diffusers' UNet2DConditionModel, perhaps with adapters.
            text_encoder: transformers' CLIPTextModel.
            tokenizer: fills prompts up to their longest length.
        """
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder.requires_grad_(False)
        self.tokenizer = tokenizer

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """The prompts' tokens; without a prompt, those of the empty one.

        Raises:
            InputError: a prompt is too long.
        """
        device = condition.box.device
        prompts = condition.text or ("",) * len(condition)
        tokens = torch.tensor(clip_tokens(self.tokenizer, prompts), device=device)
        with torch.no_grad():
            context = self.text_encoder(tokens).last_hidden_state
        return EncodedCondition(torch.empty(len(condition), 0, 1, 1, device=device), context)

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""
        prediction: Tensor = self.unet(x_t, timestep, encoded.context, return_dict=False)[0]
        return prediction


class InpaintingDenoiser(Denoiser):
    """The image with its hole, and the hole's mask, beside the input (system E)."""

    def __init__(self, unet: DiffusionModelUNet, window_hu: Window) -> None:
        super().__init__()
        self.unet = unet
        self.window_hu = window_hu

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """The image, 0 in the hole, and the mask, 1 there. Where nothing is known all is hole."""
        known, keep = split_known(condition, self.window_hu)
        return EncodedCondition(torch.cat([known, 1 - keep], dim=1))

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""
        x = torch.cat([x_t, encoded.channels.to(x_t.dtype)], dim=1)
        prediction: Tensor = self.unet(x, timestep)
        return prediction


class LayoutDenoiser(Denoiser):
    """Lung and nodule beside the input, and perhaps scores in cross-attention (system D)."""

    def __init__(
        self,
        unet: DiffusionModelUNet,
        config: LayoutGuided,
        latent_size: int,
        scores: ScoreContext | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.organs, self.latent_size = config.layout_labels, latent_size
        self.scores = scores

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """A channel for each organ, and a token for each score."""
        channels = layout_channels(condition.layout, self.organs, self.latent_size)
        context = None if self.scores is None else self.scores(condition.attributes)
        return EncodedCondition(channels, context)

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""
        x = torch.cat([x_t, encoded.channels.to(x_t.dtype)], dim=1)
        prediction: Tensor = self.unet(x, timestep, context=encoded.context)
        return prediction


class SemanticDenoiser(Denoiser):
    """The layout's labels scale and shift the decoder's normalised features (system C)."""

    def __init__(self, unet: SPADEDiffusionModelUNet, with_edges: bool) -> None:
        super().__init__()
        self.unet = published_spade(unet)
        self.with_edges = with_edges

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """A channel for each label, and the edges between them where they are wanted."""
        labels = one_hot_layout(condition.layout)
        if not self.with_edges:
            return EncodedCondition(labels)
        return EncodedCondition(torch.cat([labels, edge_map(condition.layout)], dim=1))

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""
        prediction: Tensor = self.unet(x_t, timestep, seg=encoded.channels.to(x_t.dtype))
        return prediction


def build_denoiser(
    config: DiffusionConfig,
    latent_channels: int,
    latent_size: int,
    tokenizer: Tokenizer | None = None,
    spatial_dims: int = 2,
) -> Denoiser:
    """A fresh network.

    Args:
        config: widths and the conditioning configuration.
        latent_channels: channels of what is denoised: latents, or an image's one.
        latent_size: cells along its side.
        tokenizer: of Stable Diffusion; the others need none.
        spatial_dims: 2 of slices, 3 of volumes.
    """
    denoiser: Denoiser = _fresh_denoiser(
        config, latent_channels, latent_size, tokenizer, spatial_dims
    )
    if isinstance(config, UNet) and config.checkpointing:
        recompute_activations(denoiser.unet)
    return denoiser


def recompute_activations(unet: Any) -> None:
    """Has each block of a MONAI U-Net computed anew in the backward pass (Chen et al. 2016)."""
    for block in (*unet.down_blocks, unet.middle_block, *unet.up_blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _fresh_denoiser(
    config: DiffusionConfig,
    latent_channels: int,
    latent_size: int,
    tokenizer: Tokenizer | None,
    spatial_dims: int,
) -> Any:
    shape = _shape(config, latent_channels, spatial_dims) if isinstance(config, UNet) else {}
    match config:
        case StableDiffusionConfig():
            from diffusers import UNet2DConditionModel
            from transformers import CLIPTextConfig, CLIPTextModel

            assert tokenizer is not None
            unet: Any = UNet2DConditionModel
            return StableDenoiser(
                unet.from_config(config.networks["unet"]),
                CLIPTextModel(CLIPTextConfig.from_dict(config.networks["text_encoder"])),
                tokenizer,
            )
        case LatentDiffusionConfig():
            conditioner = Conditioner(config, latent_size)
            unet = DiffusionModelUNet(
                in_channels=latent_channels + conditioner.num_channels,
                with_conditioning=conditioner.context is not None,
                cross_attention_dim=conditioner.context_width,
                **shape,
            )
            return LatentDenoiser(unet, conditioner)
        case TextDiffusionConfig():
            unet = DiffusionModelUNet(
                in_channels=latent_channels,
                with_conditioning=True,
                cross_attention_dim=config.text_width,
                num_class_embeds=1,
                **shape,
            )
            return TextDenoiser(unet, TextEncoder(config))
        case SemanticDiffusionConfig():
            return SemanticDenoiser(
                SPADEDiffusionModelUNet(
                    in_channels=latent_channels,
                    label_nc=NUM_CLASSES + config.edge_map,
                    spade_intermediate_channels=config.layout_channels,
                    **shape,
                ),
                config.edge_map,
            )
        case InpaintingConfig():
            unet = DiffusionModelUNet(in_channels=latent_channels + 2, **shape)
            return InpaintingDenoiser(unet, config.window_hu)
        case LayoutDiffusionConfig():
            in_channels = latent_channels + len(config.layout_labels)
            unet = DiffusionModelUNet(in_channels=in_channels, **shape)
            return LayoutDenoiser(unet, config, latent_size)
        case LayoutLatentDiffusionConfig():
            width = config.channels[0]
            unet = DiffusionModelUNet(
                in_channels=latent_channels + len(config.layout_labels),
                with_conditioning=True,
                cross_attention_dim=width,
                **shape,
            )
            return LayoutDenoiser(unet, config, latent_size, ScoreContext(width))


def _shape(config: UNet, out_channels: int, spatial_dims: int) -> dict[str, Any]:
    """What all U-Nets of MONAI are told."""
    return {
        "spatial_dims": spatial_dims,
        "out_channels": out_channels,
        "channels": config.channels,
        "attention_levels": config.attention_levels,
        "num_res_blocks": config.num_res_blocks,
        "num_head_channels": config.head_channels,
        "norm_num_groups": config.norm_num_groups,
        "use_flash_attention": True,
    }


def published_spade(network: Network) -> Network:
    """The network with scale and shift straight from a convolution (Park et al. 2019, eq. 1).

    MONAI normalises both over the image, so that a layout of one label would say nothing. And it
    has a leaky ReLU where the paper has a plain one.
    """
    for module in network.modules():
        if isinstance(module, SPADE):
            module.mlp_shared.get_submodule("adn").add_module("A", nn.ReLU())
            for convolution in (module.mlp_gamma, module.mlp_beta):
                del convolution.adn
    return network
