"""Decoding in slabs gives what the whole network gives."""

from __future__ import annotations

import pytest
import torch

from raysynth.config import AutoencoderKLConfig
from raysynth.models import slabs
from raysynth.models.autoencoder import KLAutoencoder


@pytest.fixture(scope="module")
def autoencoder() -> KLAutoencoder:
    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        channels=(8, 8, 16), num_res_blocks=2, norm_num_groups=4, latent_channels=3
    )
    network = KLAutoencoder(config, spatial_dims=3)
    with torch.no_grad():
        for parameter in network.parameters():  # norms that do something
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("planes", [1, 3, 5, 64])
@pytest.mark.parametrize("size", [(8, 8, 8), (5, 8, 6)])
def test_slabs_of_any_height_equal_the_whole(
    autoencoder: KLAutoencoder,
    monkeypatch: pytest.MonkeyPatch,
    planes: int,
    size: tuple[int, int, int],
) -> None:
    latents = 2 * torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(slabs, "SLAB_VOXELS", planes * 16 * size[1] * size[2])
    given = latents.clone()
    with torch.no_grad():
        whole = autoencoder.network.decode(latents)
        in_slabs = autoencoder.decode(latents)
    assert torch.equal(latents, given)
    # A unit of the window is 700 HU: seams far below 1 HU.
    torch.testing.assert_close(in_slabs, whole, rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_the_whole_network(autoencoder: KLAutoencoder) -> None:
    latents = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    autoencoder.decode(latents).sum().backward()
    assert latents.grad is not None
