"""An encoder of images into features that metrics compare, and how it learns without labels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysynth.config.model import ExtractorConfig
from raysynth.models.vicreg import covariance, invariance, variance

Conv = type[nn.Conv2d] | type[nn.Conv3d]

NUM_DEGRADATIONS = 3
"""Blur, noise and shift (`raysynth.training.views`)."""


class Encoder(nn.Module):
    """A residual network; features are means over the image, of every level.

    Levels of full size see noise and sharpness, small ones what is shown. Normalisation stands
    inside the residual branches alone: what bypasses them keeps level and contrast of the image.
    Images may have any size of 16 or more.
    """

    def __init__(self, config: ExtractorConfig, spatial_dims: int = 2) -> None:
        super().__init__()
        conv: Conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        first, *_ = config.channels
        # A border of zeros would be an edge that no image has.
        self.levels = nn.ModuleList([conv(1, first, 3, padding=1, padding_mode="replicate")])
        for before, width in itertools.pairwise(config.channels):
            down = conv(before, width, 3, stride=2, padding=1, padding_mode="replicate")
            blocks = (_Residual(conv, width, config) for _ in range(config.num_res_blocks))
            self.levels.append(nn.Sequential(down, *blocks))
        # Means over an image vary little beside their size: without this nothing is learned.
        self.norm = nn.BatchNorm1d(sum(config.channels), affine=False, momentum=0.01)
        self.last = nn.Linear(sum(config.channels), config.feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, feature_dim) of images (B, 1, *spatial) in [-1, 1]."""
        return self.project(self.pool(x))

    def pool(self, x: Tensor) -> Tensor:
        """Means of the rectified activations of every level, (B, sum of channels)."""
        pooled = []
        for level in self.levels:
            x = level(x)
            pooled.append(functional.relu(x).flatten(2).mean(dim=2))
        return torch.cat(pooled, dim=1)

    def project(self, pooled: Tensor) -> Tensor:
        """Features of what `pool` gives; in training by the spread of this batch."""
        features: Tensor = self.last(self.norm(pooled))
        return features


class _Residual(nn.Module):
    """Two convolutions beside the identity (He et al. 2016, pre-activation)."""

    def __init__(self, conv: Conv, width: int, config: ExtractorConfig) -> None:
        super().__init__()
        self.branch = nn.Sequential()
        for _ in range(2):
            self.branch.append(nn.GroupNorm(config.norm_num_groups, width))
            self.branch.append(nn.SiLU())
            self.branch.append(conv(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.branch(x)
        return changed


class SelfTaughtEncoder(nn.Module):
    """The encoder beside what only its training needs.

    VICReg asks for features that views of one image share; alone, it may drop what a metric must
    see. So a linear map of the features shall also tell how an image was degraded.
    """

    def __init__(self, config: ExtractorConfig, spatial_dims: int = 2) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, spatial_dims)
        self.expander = nn.Sequential(
            nn.Linear(config.feature_dim, config.embedding_dim),
            nn.ReLU(),
            nn.Linear(config.embedding_dim, config.embedding_dim),
        )
        self.gauge = nn.Linear(config.feature_dim, NUM_DEGRADATIONS, bias=False)

    def forward(
        self, view: Tensor, other: Tensor, degraded: Tensor, strengths: Tensor
    ) -> dict[str, Tensor]:
        """Weighted scalar terms whose sum is the loss (VICReg, eq. 6, and the gauge's error).

        Args:
            view: images (B, 1, *spatial).
            other: views of the same images, of another size.
            degraded: `view`, degraded.
            strengths: how much of each degradation, (B, NUM_DEGRADATIONS) of order 1.
        """
        config = self.config
        pooled = [self.encoder.pool(x) for x in (torch.cat([view, degraded]), other)]
        features, worse, others = self.encoder.project(torch.cat(pooled)).float().chunk(3)
        z, z_prime = self.expander(torch.cat([features, others])).float().chunk(2)
        told = self.gauge(worse - features).float()
        return {
            "invariance": config.invariance_weight * invariance(z, z_prime),
            "variance": config.variance_weight * (variance(z) + variance(z_prime)),
            "covariance": config.covariance_weight * (covariance(z) + covariance(z_prime)),
            "degradation": config.degradation_weight * functional.mse_loss(told, strengths),
        }
