"""The network of latent diffusion: MONAI's U-Net, guided by a `ConditionBatch`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raysynth.config.model import LatentDiffusionConfig
from raysynth.models.conditioner import ConditionBatch, Conditioner, EncodedCondition
from raysynth.models.monai import DiffusionModelUNet


class LatentDenoiser(nn.Module):
    """Predicts noise, x_0 or v from noisy latents, their timestep and a condition."""

    def __init__(self, unet: DiffusionModelUNet, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, x_t: Tensor, timestep: Tensor, condition: ConditionBatch) -> Tensor:
        """The prediction, (B, c, h, w).

        Args:
            x_t: noisy latents (B, c, h, w).
            timestep: of each sample, (B,).
            condition: of each sample.
        """
        return self.predict(x_t, timestep, self.encode(condition))

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """What `predict` needs of conditions; it stays the same over all steps of a sample."""
        encoded: EncodedCondition = self.conditioner(condition)
        return encoded

    def predict(self, x_t: Tensor, timestep: Tensor, encoded: EncodedCondition) -> Tensor:
        """The prediction for conditions that are already encoded."""
        x = torch.cat([x_t, encoded.channels.to(x_t.dtype)], dim=1)
        prediction: Tensor = self.unet(x, timestep, context=encoded.context)
        return prediction


def build_denoiser(
    config: LatentDiffusionConfig, latent_channels: int, latent_size: int
) -> LatentDenoiser:
    """A fresh network.

    Args:
        config: widths and the conditioning configuration.
        latent_channels: channels of the autoencoder's latents.
        latent_size: cells along a latent's side.
    """
    conditioner = Conditioner(config, latent_size)
    unet = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=latent_channels + conditioner.num_channels,
        out_channels=latent_channels,
        channels=config.channels,
        attention_levels=config.attention_levels,
        num_res_blocks=config.num_res_blocks,
        num_head_channels=config.num_head_channels,
        norm_num_groups=config.norm_num_groups,
        with_conditioning=conditioner.context is not None,
        cross_attention_dim=conditioner.context_width,
        use_flash_attention=True,
    )
    return LatentDenoiser(unet, conditioner)
