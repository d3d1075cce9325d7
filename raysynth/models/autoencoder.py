"""Autoencoders between images in [-1, 1] and latents: MONAI's networks behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.vqvae import VQVAE
from torch import Tensor, nn
from torch.nn import functional

from raysynth.config.model import AutoencoderKLConfig, VQVAEConfig


class Autoencoder(nn.Module, ABC):
    """What every autoencoder offers. Latents are unscaled: a bundle's latent_scale comes after."""

    latent_channels: int

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, c, *latent) of images (B, 1, *spatial); the same for the same images."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 1, *spatial) of latents (B, c, *latent)."""

    @abstractmethod
    def training_terms(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms whose sum is the loss.

        Args:
            x: images (B, 1, *spatial).
            noise: standard normal (B, c, *latent), for networks that sample their latents.
        """

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`training_terms`, under the name that distributed wrappers look for."""
        return self.training_terms(x, noise)


class KLAutoencoder(Autoencoder):
    """Continuous latents with a small Kullback-Leibler penalty (Rombach et al. 2022)."""

    def __init__(self, config: AutoencoderKLConfig, spatial_dims: int = 2) -> None:
        super().__init__()
        self.latent_channels = config.latent_channels
        self.kl_weight = config.kl_weight
        self.network = AutoencoderKL(
            spatial_dims=spatial_dims,
            channels=config.channels,
            num_res_blocks=config.num_res_blocks,
            attention_levels=(False,) * len(config.channels),
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            # Attention over every latent cell would tie the networks to small images.
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )

    def encode(self, x: Tensor) -> Tensor:
        """The mean of the latent distribution."""
        return self.network.encode(x)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents."""
        return self.network.decode(latents)

    def training_terms(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Reconstruction and gradient error, and KL to a standard normal, summed over a sample."""
        mean, sigma = (moment.float() for moment in self.network.encode(x))
        reconstruction = self.network.decode(mean + sigma * noise)
        kl = 0.5 * (mean.square() + sigma.square() - 2 * sigma.log() - 1).flatten(1).sum(1).mean()
        return {**reconstruction_terms(reconstruction, x), "kl": self.kl_weight * kl}


class VQAutoencoder(Autoencoder):
    """Latents near the entries of a codebook that follows them (van den Oord et al. 2017).

    As in latent diffusion, `encode` gives the vectors before quantisation and `decode` snaps to the
    nearest code first, so a diffusion model works in a continuous space.
    """

    def __init__(self, config: VQVAEConfig, spatial_dims: int = 2) -> None:
        super().__init__()
        self.latent_channels = config.latent_channels
        # MONAI halves the image at each level; ours keeps the first, as the KL network does.
        halvings = len(config.channels) - 1
        self.network = VQVAE(
            spatial_dims=spatial_dims,
            in_channels=1,
            out_channels=1,
            channels=config.channels,
            num_res_layers=config.num_res_blocks,
            num_res_channels=config.channels,
            downsample_parameters=((1, 3, 1, 1), *[(2, 4, 1, 1)] * halvings),
            upsample_parameters=(*[(2, 4, 1, 1, 0)] * halvings, (1, 3, 1, 1, 0)),
            num_embeddings=config.num_codes,
            embedding_dim=config.latent_channels,
            commitment_cost=config.commitment_weight,
            decay=0.99,
        )

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's vectors, not yet quantised."""
        return self.network.encode(x)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of the codes nearest to the latents."""
        return self.network.decode(self.quantize(latents))

    def quantize(self, latents: Tensor) -> Tensor:
        """The nearest code of every cell. MONAI's own builds a one-hot row of all codes a cell."""
        codes = self.network.quantizer.quantizer.embedding.weight
        cells = latents.float().movedim(1, -1)
        distances = codes.square().sum(1) - 2 * cells.flatten(0, -2) @ codes.T
        nearest = codes[distances.argmin(dim=1)].view(cells.shape)
        return nearest.movedim(-1, 1).to(latents.dtype)

    def training_terms(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Reconstruction and gradient error, and the distance of latents from their codes."""
        reconstruction, commitment = self.network(x)
        return {**reconstruction_terms(reconstruction, x), "commitment": commitment}


def reconstruction_terms(reconstruction: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Mean absolute error of values and of differences between neighbours (keeps edges sharp)."""
    reconstruction, x = reconstruction.float(), x.float()
    gradients = [
        functional.l1_loss(reconstruction.diff(dim=axis), x.diff(dim=axis))
        for axis in range(2, x.ndim)
    ]
    return {
        "reconstruction": functional.l1_loss(reconstruction, x),
        "gradient": torch.stack(gradients).mean(),
    }


def build_autoencoder(config: AutoencoderKLConfig | VQVAEConfig) -> Autoencoder:
    """A fresh autoencoder of the configured family, for axial slices."""
    if isinstance(config, VQVAEConfig):
        return VQAutoencoder(config)
    return KLAutoencoder(config)
