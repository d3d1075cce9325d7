"""Generators and discriminators: each learns from its own loss, and reads what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config import AutoencoderKLConfig, Pix2PixConfig, SpadeGanConfig, VQVAEConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.conditioner import ConditionBatch, collate
from raysynth.models.gan import (
    Adversaries,
    AutoencoderAdversaries,
    build_adversaries,
    build_generator,
)

SIZE = 32
SMALL = {"channels": (8, 16), "discriminator_channels": 8, "discriminator_layers": 2}
CONFIGS = {
    "spade": SpadeGanConfig(**SMALL, layout_channels=8),
    "pix2pix": Pix2PixConfig(**SMALL | {"channels": (8, 16, 16)}, dropout=0.0),
}


def batch() -> tuple[torch.Tensor, ConditionBatch]:
    random = np.random.default_rng(0)
    conditions = []
    for shift in (0, 5):
        layout = np.full((SIZE, SIZE), Label.BODY, np.uint8)
        layout[4:28, 3 + shift : 14] = Label.RIGHT_LUNG
        hu = random.integers(-1000, 400, (SIZE, SIZE)).astype(np.int16)
        conditions.append(Condition(layout, known_hu=hu, known_mask=layout == Label.BODY))
    return torch.rand(2, 1, SIZE, SIZE) * 2 - 1, collate(conditions, SIZE)


@pytest.fixture(params=CONFIGS)
def adversaries(request: pytest.FixtureRequest) -> Adversaries:
    torch.manual_seed(0)
    return build_adversaries(CONFIGS[request.param], SIZE)


def test_each_loss_moves_its_own_network_alone(adversaries: Adversaries) -> None:
    images, condition = batch()
    terms = adversaries(images, condition)
    of_discriminator = terms.pop("discriminator")
    torch.stack(list(terms.values())).sum().backward(retain_graph=True)
    assert all(one.grad is not None for one in adversaries.generator.parameters())
    assert all(one.grad is None for one in adversaries.discriminator.parameters())
    for parameter in adversaries.generator.parameters():
        parameter.grad = None
    of_discriminator.backward()
    assert all(one.grad is None for one in adversaries.generator.parameters())
    assert all(one.grad is not None for one in adversaries.discriminator.parameters())


def test_a_discriminator_learns_to_tell_and_a_generator_to_deceive(
    adversaries: Adversaries,
) -> None:
    torch.manual_seed(1)
    images, condition = batch()
    images = images * 0.1 + 0.5
    for name in ("discriminator", "generator"):
        network = getattr(adversaries, name)
        optimizer = torch.optim.Adam(network.parameters(), 2e-3, betas=(0.0, 0.9))
        losses = []
        for _ in range(30):
            loss = adversaries(images, condition)[name]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1, name


def test_images_follow_their_own_condition_alone(adversaries: Adversaries) -> None:
    _, condition = batch()
    generator = adversaries.generator.eval()
    with torch.no_grad():
        both = generator(generator.encode(condition))
        alone = generator(generator.encode(condition.select(slice(1))))
    assert both.shape == (2, 1, SIZE, SIZE)
    assert both.abs().max() <= 1
    torch.testing.assert_close(both[:1], alone)
    assert (both[0] - both[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["kl", "vq"])
def test_an_autoencoder_learns_beside_its_discriminator(family: str) -> None:
    torch.manual_seed(0)
    small = {"channels": (8, 16), "num_res_blocks": 1, "norm_num_groups": 8}
    adversarial = {"adversarial_weight": 0.1, "discriminator_channels": 8}
    config = (
        AutoencoderKLConfig(**small | adversarial)
        if family == "kl"
        else VQVAEConfig(**small | adversarial, num_codes=16)
    )
    pair = AutoencoderAdversaries(build_autoencoder(config), config)
    images = torch.rand(2, 1, SIZE, SIZE) * 2 - 1
    noise = torch.randn(2, config.latent_channels, SIZE // 2, SIZE // 2)
    terms = pair(images, noise)
    plain = pair.generator(images, noise)
    assert set(terms) == {*plain, "generator", "discriminator"}
    assert all(torch.allclose(terms[name], plain[name], atol=1e-6) for name in plain)
    of_discriminator = terms.pop("discriminator")
    torch.stack(list(terms.values())).sum().backward(retain_graph=True)
    assert all(one.grad is None for one in pair.discriminator.parameters())
    before = [one.grad.clone() for one in pair.generator.parameters()]
    of_discriminator.backward()
    assert all(one.grad is not None for one in pair.discriminator.parameters())
    after = [one.grad for one in pair.generator.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("config", "size", "millions"),
    [(SpadeGanConfig(), 512, (30, 130)), (Pix2PixConfig(), 256, (15, 80))],
)
def test_generators_of_published_size(
    config: SpadeGanConfig | Pix2PixConfig, size: int, millions: tuple[int, int]
) -> None:
    with torch.device("meta"):
        generator = build_generator(config, size)
    count = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
    assert millions[0] < count < millions[1]
