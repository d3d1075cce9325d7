"""The encoder of extractors: shapes, gradients, and what it must not lose."""

from __future__ import annotations

import pytest
import torch

from raysynth.config import ExtractorConfig
from raysynth.models.encoder import Encoder, SelfTaughtEncoder

TINY = ExtractorConfig(channels=(8, 16), feature_dim=6, embedding_dim=10)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("size", [16, 21])
def test_every_size_gives_a_vector(spatial_dims: int, size: int) -> None:
    features = Encoder(TINY, spatial_dims).eval()(torch.randn(3, 1, *(size,) * spatial_dims))
    assert features.shape == (3, 6)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradients_reach_every_parameter(spatial_dims: int) -> None:
    torch.manual_seed(0)
    network = SelfTaughtEncoder(TINY, spatial_dims)
    view, degraded = (torch.randn(4, 1, *(16,) * spatial_dims) for _ in range(2))
    terms = network(view, view.flip(2), degraded, torch.rand(4, 3))
    assert set(terms) == {"invariance", "variance", "covariance", "degradation"}
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("channels", [(8,), (8, 16, 16)])
def test_level_and_contrast_are_not_normalised_away(channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(TINY.model_copy(update={"channels": channels})).eval()
    x = torch.rand(4, 1, 32, 32) - 0.5
    with torch.inference_mode():
        pooled = encoder.pool(x)
        for changed in (x + 0.2, 0.5 * x):
            moved = (encoder.pool(changed) - pooled).norm(dim=1)
            assert (moved > 0.05 * pooled.norm(dim=1)).all()
