import pytest
import torch

from raysynth.config.model import AutoencoderKLConfig, VQVAEConfig
from raysynth.models.autoencoder import build_autoencoder, reconstruction_terms

SMALL = {"channels": (8, 16, 16), "num_res_blocks": 1, "norm_num_groups": 8}
CONFIGS = {
    "kl": AutoencoderKLConfig(**SMALL, latent_channels=4),
    "vq": VQVAEConfig(**SMALL, latent_channels=3, num_codes=32),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    torch.manual_seed(0)
    return CONFIGS[request.param]


def test_shapes_and_determinism(config):
    autoencoder = build_autoencoder(config).eval()
    x = torch.rand(2, 1, 32, 24) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(x)
        assert latents.shape == (2, config.latent_channels, 8, 6)
        assert config.downsampling == 4
        assert torch.equal(latents, autoencoder.encode(x))
        assert autoencoder.decode(latents).shape == x.shape


def test_gradients_reach_every_parameter(config):
    autoencoder = build_autoencoder(config)
    noise = torch.randn(2, config.latent_channels, 4, 4)
    terms = autoencoder(torch.rand(2, 1, 16, 16) * 2 - 1, noise)
    assert set(terms) == {
        "reconstruction",
        "gradient",
        *(["kl"] if config.family == "autoencoder_kl" else ["codebook", "commitment"]),
    }
    sum(terms.values()).backward()
    for name, parameter in autoencoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_one_image_is_learned(config):
    autoencoder = build_autoencoder(config)
    ramp = torch.linspace(-0.8, 0.8, 16)
    x = (ramp[:, None] * ramp[None, :]).view(1, 1, 16, 16)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    for _ in range(150):
        noise = torch.randn(1, config.latent_channels, 4, 4)
        loss = sum(autoencoder(x, noise).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    autoencoder.eval()
    with torch.no_grad():
        error = (autoencoder.decode(autoencoder.encode(x)) - x).abs().mean()
    assert error < 0.5 * x.abs().mean()


def test_kl_term_matches_its_closed_form():
    autoencoder = build_autoencoder(CONFIGS["kl"]).eval()
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        mean, sigma = autoencoder.network.encode(x)
        normal = torch.distributions.Normal(mean, sigma)
        unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        expected = torch.distributions.kl_divergence(normal, unit).sum(dim=(1, 2, 3)).mean()
        kl = autoencoder(x, torch.randn_like(mean))["kl"]
    torch.testing.assert_close(kl / CONFIGS["kl"].kl_weight, expected)


def test_quantize_and_its_gradient_equal_diffusers():
    autoencoder = build_autoencoder(CONFIGS["vq"])
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    autoencoder.spread_codes(x)
    latents = torch.randn(2, 3, 4, 5)
    expected, _, _ = autoencoder.network.quantize(latents)
    torch.testing.assert_close(autoencoder.quantize(latents), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(autoencoder.quantize(latents), expected)

    decoded = autoencoder.network(x).sample
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x)), decoded)
    reconstruction_terms(decoded, x)["reconstruction"].backward()
    expected = autoencoder.network.quant_conv.weight.grad.clone()
    autoencoder.zero_grad()
    autoencoder(x, torch.empty(0))["reconstruction"].backward()
    torch.testing.assert_close(autoencoder.network.quant_conv.weight.grad, expected)


def test_a_codebook_begins_among_the_latents():
    torch.manual_seed(0)
    autoencoder = build_autoencoder(CONFIGS["vq"])
    x = torch.rand(4, 1, 32, 32) * 2 - 1
    used_at_random = codes_used(autoencoder, x)
    autoencoder.spread_codes(x)
    assert codes_used(autoencoder, x) > 24 > used_at_random  # of 32


def codes_used(autoencoder, x):
    with torch.no_grad():
        return len(
            autoencoder.quantize(autoencoder.encode(x)).movedim(1, -1).flatten(0, -2).unique(dim=0)
        )


def test_reconstruction_terms_of_a_constant_offset():
    x = torch.rand(2, 1, 8, 8)
    terms = reconstruction_terms(x + 0.25, x)
    assert terms["reconstruction"].item() == pytest.approx(0.25)
    assert terms["gradient"].item() == pytest.approx(0, abs=1e-6)
