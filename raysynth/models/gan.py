"""What is trained against a discriminator, which is gone afterwards: GANs, and autoencoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from raysynth.config.model import (
    AutoencoderKLConfig,
    GanConfig,
    LayoutGanConfig,
    Pix2PixConfig,
    SpadeGanConfig,
    VQVAEConfig,
)
from raysynth.models.autoencoder import Autoencoder
from raysynth.models.conditioner import (
    NUM_CLASSES,
    ConditionBatch,
    layout_channels,
    one_hot_layout,
    split_known,
)
from raysynth.models.denoiser import published_spade
from raysynth.models.monai import PatchDiscriminator, SPADEDecoder, UNet


class Generator(nn.Module, ABC):
    """Draws images of conditions in one call."""

    @abstractmethod
    def encode(self, condition: ConditionBatch) -> Tensor:
        """What generator and discriminator read of conditions, (B, k, y, x)."""

    @abstractmethod
    def forward(self, encoded: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 1, y, x)."""


class SpadeGenerator(Generator):
    """Park et al. 2019 without their image encoder: the layout alone decides the image."""

    def __init__(self, config: SpadeGanConfig, size: int) -> None:
        super().__init__()
        first = config.channels[0]
        self.decoder = published_spade(
            SPADEDecoder(
                spatial_dims=2,
                out_channels=first,
                label_nc=NUM_CLASSES,
                input_shape=(size, size),
                channels=list(reversed(config.channels)),  # it keeps and changes the list
                is_vae=False,
                spade_intermediate_channels=config.layout_channels,
            )
        )
        for name, module in list(self.decoder.named_modules()):
            if name.endswith(("conv_0.conv", "conv_1.conv", "conv_s.conv")):
                spectral_norm(module)
        self.last = nn.Conv2d(first, 1, 3, padding=1)

    def encode(self, condition: ConditionBatch) -> Tensor:
        """A channel for each label."""
        return one_hot_layout(condition.layout)

    def forward(self, encoded: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 1, y, x)."""
        return torch.tanh(self.last(self.decoder(encoded)))


class Pix2PixGenerator(Generator):
    """A U-Net from the image with its hole and the hole's mask to the image."""

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__()
        self.window_hu = config.window_hu
        self.unet = UNet(
            spatial_dims=2,
            in_channels=2,
            out_channels=1,
            channels=config.channels,
            strides=(2,) * (len(config.channels) - 1),
            norm="BATCH",
            dropout=config.dropout,
        )

    def encode(self, condition: ConditionBatch) -> Tensor:
        """The image, 0 in the hole, and the mask, 1 there."""
        known, keep = split_known(condition, self.window_hu)
        return torch.cat([known, 1 - keep], dim=1)

    def forward(self, encoded: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 1, y, x)."""
        return torch.tanh(self.unet(encoded))


class LayoutGenerator(Generator):
    """A U-Net from the layout to the image, of slices or volumes (pix2pix)."""

    def __init__(self, config: LayoutGanConfig, size: int, spatial_dims: int) -> None:
        super().__init__()
        self.organs, self.size = config.layout_labels, size
        self.unet = UNet(
            spatial_dims=spatial_dims,
            in_channels=len(config.layout_labels),
            out_channels=1,
            channels=config.channels,
            strides=(2,) * (len(config.channels) - 1),
            norm="INSTANCE",  # of one volume at a time there is no batch to normalise over
            dropout=config.dropout,
        )

    def encode(self, condition: ConditionBatch) -> Tensor:
        """A channel for each organ."""
        return layout_channels(condition.layout, self.organs, self.size)

    def forward(self, encoded: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 1, *spatial)."""
        return torch.tanh(self.unet(encoded))


class Adversaries(nn.Module, ABC):
    """A network that makes images and its discriminator: each one's loss moves it alone."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, rate: float) -> None:
        """Puts both together; the discriminator learns at `rate` times the generator's rate."""
        super().__init__()
        self.generator: Any = generator
        self.discriminator = discriminator
        self.discriminator_rate = rate

    def forward(self, images: Tensor, given: Any) -> dict[str, Tensor]:
        """Weighted scalar terms whose sum is the loss.

        Args:
            images: real ones, (B, 1, y, x) in [-1, 1].
            given: what the generator makes its own of, besides: a `ConditionBatch`.
        """
        made, shown, terms = self.make(images, given)
        real = self._judge(images, shown)
        with _frozen(self.discriminator):
            terms |= self.generator_terms(images, made, real, self._judge(made, shown))
        fake = self._judge(made.detach(), shown)
        return {**terms, "discriminator": self.discriminator_loss(real, fake)}

    def make(self, images: Tensor, given: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Images, the channels that the discriminator sees beside them, and terms of their own."""
        encoded = self.generator.encode(given)
        return self.generator(encoded), encoded, {}

    @abstractmethod
    def generator_terms(
        self, images: Tensor, made: Tensor, real: Any, fake: Any
    ) -> dict[str, Tensor]:
        """What the generator minimises.

        Args:
            images: real ones.
            made: generated ones.
            real: the discriminator's output for `images`.
            fake: its output for `made`.
        """

    @abstractmethod
    def discriminator_loss(self, real: Any, fake: Any) -> Tensor:
        """What the discriminator minimises, from its outputs for real and generated images."""

    def _judge(self, images: Tensor, shown: Tensor) -> Any:
        return self.discriminator(torch.cat([images, shown], dim=1))


class MultiScaleDiscriminator(nn.Module):
    """Judges patches of the image, and of the image at half its size, and so on (Wang et al. 2018).

    MONAI's own makes each further one deeper instead, until nothing is left of a small image.
    """

    def __init__(self, config: SpadeGanConfig) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(
                spatial_dims=2,
                channels=config.discriminator_channels,
                in_channels=1 + NUM_CLASSES,
                num_layers_d=config.discriminator_layers,
                norm="INSTANCE",
            )
            for _ in range(config.num_discriminators)
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Scores of the patches at every scale, and the features behind them."""
        scores, features = [], []
        for discriminator in self.scales:
            *of_scale, score = discriminator(x)
            scores.append(score)
            features.append(of_scale)
            x = functional.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        return scores, features


class SpadeAdversaries(Adversaries):
    """Hinge loss and feature matching over several scales (Park et al. 2019, section 3)."""

    def __init__(self, config: SpadeGanConfig, size: int) -> None:
        discriminator = MultiScaleDiscriminator(config)
        super().__init__(SpadeGenerator(config, size), discriminator, config.discriminator_rate)
        self.feature_weight = config.feature_weight

    def generator_terms(
        self, images: Tensor, made: Tensor, real: Any, fake: Any
    ) -> dict[str, Tensor]:
        """To be taken for real, and to look alike inside the discriminator."""
        (_, wanted), (scores, features) = real, fake
        matching = torch.stack(
            [
                functional.l1_loss(one, other.detach())
                for of_scale, wanted_of_scale in zip(features, wanted, strict=True)
                for one, other in zip(of_scale, wanted_of_scale, strict=True)
            ]
        ).mean()
        return {
            "generator": -torch.stack([score.mean() for score in scores]).mean(),
            "features": self.feature_weight * matching,
        }

    def discriminator_loss(self, real: Any, fake: Any) -> Tensor:
        """The hinge loss, mean over scales."""
        return torch.stack([_hinge(*one) for one in zip(real[0], fake[0], strict=True)]).mean()


class Pix2PixAdversaries(Adversaries):
    """The vanilla GAN loss on patches and 100 x L1 (Isola et al. 2017, eq. 4)."""

    def __init__(
        self, config: Pix2PixConfig | LayoutGanConfig, size: int, spatial_dims: int
    ) -> None:
        generator = build_generator(config, size, spatial_dims)
        shown, norm = 2, "BATCH"
        if isinstance(config, LayoutGanConfig):
            shown, norm = len(config.layout_labels), "INSTANCE"
        discriminator = PatchDiscriminator(
            spatial_dims=spatial_dims,
            channels=config.discriminator_channels,
            in_channels=1 + shown,
            num_layers_d=config.discriminator_layers,
            norm=norm,
        )
        super().__init__(generator, discriminator, config.discriminator_rate)
        self.l1_weight = config.l1_weight

    def generator_terms(
        self, images: Tensor, made: Tensor, real: Any, fake: Any
    ) -> dict[str, Tensor]:
        """To be taken for real, and to be near the image."""
        return {
            "generator": _cross_entropy(fake[-1], 1.0),
            "l1": self.l1_weight * functional.l1_loss(made, images),
        }

    def discriminator_loss(self, real: Any, fake: Any) -> Tensor:
        """Half the sum of both errors, as published."""
        return 0.5 * (_cross_entropy(real[-1], 1.0) + _cross_entropy(fake[-1], 0.0))


class AutoencoderAdversaries(Adversaries):
    """An autoencoder whose reconstructions shall pass for real ones (Esser et al. 2021, eq. 5).

    Hinge loss on patches at a fixed weight, where they let it follow the gradients of a perceptual
    term, which needs weights that we lack.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        config: AutoencoderKLConfig | VQVAEConfig,
        spatial_dims: int = 2,
    ) -> None:
        discriminator = PatchDiscriminator(
            spatial_dims=spatial_dims,
            channels=config.discriminator_channels,
            in_channels=1,
            num_layers_d=2,
            norm="INSTANCE",
        )
        super().__init__(autoencoder, discriminator, rate=1.0)
        self.weight = config.adversarial_weight

    def make(self, images: Tensor, given: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstructions with their errors, from the noise of the latents."""
        made, terms = self.generator.reconstruct(images, given)
        return made, images[:, :0], terms

    def generator_terms(
        self, images: Tensor, made: Tensor, real: Any, fake: Any
    ) -> dict[str, Tensor]:
        """To be taken for real."""
        return {"generator": -self.weight * fake[-1].mean()}

    def discriminator_loss(self, real: Any, fake: Any) -> Tensor:
        """The hinge loss."""
        return _hinge(real[-1], fake[-1])


def build_adversaries(config: GanConfig, size: int, spatial_dims: int = 2) -> Adversaries:
    """A fresh generator with its discriminator, for images of `size` pixels a side."""
    if isinstance(config, SpadeGanConfig):
        return SpadeAdversaries(config, size)
    return Pix2PixAdversaries(config, size, spatial_dims)


def build_generator(config: GanConfig, size: int, spatial_dims: int = 2) -> Generator:
    """A fresh generator alone."""
    match config:
        case SpadeGanConfig():
            return SpadeGenerator(config, size)
        case Pix2PixConfig():
            return Pix2PixGenerator(config)
        case LayoutGanConfig():
            return LayoutGenerator(config, size, spatial_dims)


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def _cross_entropy(scores: Tensor, truth: float) -> Tensor:
    return functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, truth))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module to its input, and leave it alone."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
