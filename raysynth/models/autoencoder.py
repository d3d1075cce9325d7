"""Autoencoders between images in [-1, 1] and latents: other people's networks, one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysynth.config.model import (
    AutoencoderConfig,
    AutoencoderKLConfig,
    PretrainedAutoencoderConfig,
    VQVAEConfig,
)
from raysynth.models.monai import AutoencoderKL
from raysynth.models.slabs import decode_in_slabs

KL_WEIGHT, COMMITMENT_WEIGHT = 1e-6, 0.25
"""Of published autoencoders that are trained on: the defaults of our own."""

MAX_CELLS = 16_384
"""Latent cells compared with a codebook at once: half a gigabyte of distances to 8,192 codes."""


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
    def reconstruct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstructed images, and weighted scalar terms whose sum is the loss.

        Args:
            x: images (B, 1, *spatial).
            noise: standard normal (B, c, *latent), for networks that sample their latents.
        """

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The terms of `reconstruct`, under the name that distributed wrappers look for."""
        return self.reconstruct(x, noise)[1]


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
        return self.moments(x)[0]

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images."""
        mean, sigma = self.network.encode(x)
        return mean, sigma

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents; volumes slab by slab where no gradient is asked for."""
        if latents.ndim == 5 and not torch.is_grad_enabled():
            return decode_in_slabs(self.network, latents)
        return self.network.decode(latents)

    def reconstruct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and gradient error, and KL to a standard normal, summed over a sample."""
        mean, sigma = (moment.float() for moment in self.moments(x))
        reconstruction = self.decode(mean + sigma * noise)
        kl = 0.5 * (mean.square() + sigma.square() - 2 * sigma.log() - 1).flatten(1).sum(1).mean()
        terms = {**reconstruction_terms(reconstruction, x), "kl": self.kl_weight * kl}
        return reconstruction, terms


class DiffusersKLAutoencoder(KLAutoencoder):
    """The same idea as diffusers builds it: Stable Diffusion's autoencoder."""

    def __init__(self, network: Any) -> None:
        """Wraps a diffusers AutoencoderKL of 1 or 3 channels."""
        Autoencoder.__init__(self)
        self.latent_channels = network.config.latent_channels
        self.kl_weight = KL_WEIGHT
        self.network: Any = network

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images."""
        latents = self.network.encode(in_colour(x, self.network)).latent_dist
        return latents.mean, latents.std

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents."""
        return in_grey(self.network.decode(latents).sample)


class VQAutoencoder(Autoencoder):
    """Latents near the entries of a learned codebook (van den Oord et al. 2017).

    As in latent diffusion, `encode` gives the vectors before quantisation and `decode` snaps to the
    nearest code first, so a diffusion model works in a continuous space.
    """

    def __init__(self, network: Any, commitment_weight: float = COMMITMENT_WEIGHT) -> None:
        """Wraps a diffusers VQModel of 1 or 3 channels."""
        super().__init__()
        self.latent_channels = network.config.vq_embed_dim or network.config.latent_channels
        self.commitment_weight = commitment_weight
        self.network: Any = network

    @torch.no_grad()
    def spread_codes(self, x: Tensor) -> None:
        """Makes latents of these images (B, 1, y, x) the codes, before training begins.

        Codes that no latent is near are never chosen and never move: from a random start nearly all
        of a codebook stays like that.
        """
        codes = self.network.quantize.embedding.weight
        cells = self.encode(x).movedim(1, -1).flatten(0, -2)
        codes.copy_(cells[torch.randint(len(cells), (len(codes),))])
        codes += 0.01 * cells.std() * torch.randn_like(codes)  # no two are the same

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's vectors, not yet quantised."""
        latents: Tensor = self.network.encode(in_colour(x, self.network)).latents
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images of the codes nearest to the latents."""
        return self._decode_codes(self.quantize(latents))

    def quantize(self, latents: Tensor) -> Tensor:
        """The nearest code of every cell."""
        codes: Tensor = self.network.quantize.embedding.weight
        cells = latents.movedim(1, -1)
        # Half precision would choose other codes.
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            # Of |cell - code|^2 without |cell|^2, which changes no order.
            lengths, directions = codes.float().square().sum(1), 2 * codes.float().T
            nearest = [
                (lengths - part.float() @ directions).argmin(dim=1)
                for part in torch.split(cells.flatten(0, -2), MAX_CELLS)
            ]
        chosen = codes[torch.cat(nearest)].view(cells.shape)
        return chosen.movedim(-1, 1).to(latents.dtype)

    def reconstruct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and gradient error; codes drawn to latents, and latents to codes."""
        latents = self.encode(x)
        codes = self.quantize(latents)
        # The decoder's gradient passes the quantiser unchanged.
        reconstruction = self._decode_codes(latents + (codes - latents).detach())
        commitment = functional.mse_loss(latents, codes.detach())
        return reconstruction, {
            **reconstruction_terms(reconstruction, x),
            "codebook": functional.mse_loss(codes, latents.detach()),
            "commitment": self.commitment_weight * commitment,
        }

    def _decode_codes(self, codes: Tensor) -> Tensor:
        return in_grey(self.network.decode(codes, force_not_quantize=True).sample)


def in_colour(x: Tensor, network: Any) -> Tensor:
    """Images (B, 1, y, x) repeated over the channels that a network of photographs has."""
    return x.expand(-1, network.config.in_channels, -1, -1)


def in_grey(images: Tensor) -> Tensor:
    """The mean of an image's channels, (B, 1, y, x)."""
    return images.mean(dim=1, keepdim=True)


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


def build_autoencoder(config: AutoencoderConfig, spatial_dims: int = 2) -> Autoencoder:
    """A fresh autoencoder of the configured family, for slices; the first one for volumes, too."""
    match config:
        case AutoencoderKLConfig():
            return KLAutoencoder(config, spatial_dims)
        case VQVAEConfig():
            return VQAutoencoder(_vq_model(config), config.commitment_weight)
        case PretrainedAutoencoderConfig():
            return of_diffusers(diffusers_class(config).from_config(config.network))


def diffusers_class(config: PretrainedAutoencoderConfig) -> Any:
    """The class of a pretrained autoencoder; others than these two are never built."""
    from diffusers import AutoencoderKL as DiffusersKL
    from diffusers import VQModel

    assert config.network is not None
    return {"VQModel": VQModel, "AutoencoderKL": DiffusersKL}[config.network["_class_name"]]


def of_diffusers(network: Any) -> Autoencoder:
    """The interface around a diffusers VQModel or AutoencoderKL."""
    is_quantised = network.config["_class_name"] == "VQModel"
    return VQAutoencoder(network) if is_quantised else DiffusersKLAutoencoder(network)


def _vq_model(config: VQVAEConfig) -> Any:
    from diffusers import VQModel

    levels = len(config.channels)
    return VQModel(  # type: ignore[no-untyped-call]
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        num_vq_embeddings=config.num_codes,
        norm_num_groups=config.norm_num_groups,
    )
