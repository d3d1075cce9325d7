import numpy as np
import pytest
import torch

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config.model import LatentDiffusionConfig
from raysynth.diffusion.losses import diffusion_loss
from raysynth.diffusion.schedule import build_schedule, q_sample
from raysynth.models.conditioner import collate
from raysynth.models.denoiser import LatentDenoiser, build_denoiser

CONFIGURATIONS = [(1, "tokens"), *((n, c) for n in (2, 3, 4) for c in ("tokens", "single"))]


def tiny(conditioning=4, context="tokens"):
    config = LatentDiffusionConfig(
        autoencoder="unused",
        conditioning=conditioning,
        context=context,
        channels=(8, 16),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=8,
    )
    return build_denoiser(config, latent_channels=3, latent_size=8)


def awake(denoiser: LatentDenoiser) -> LatentDenoiser:
    """MONAI starts output layers at zero; trained ones are not."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=rng)
    return denoiser


def conditions(count=2):
    layout = np.zeros((32, 32), dtype=np.uint8)
    layout[4:28, 3:14], layout[4:28, 18:29] = Label.RIGHT_LUNG, Label.LEFT_LUNG
    requests = [Condition(layout, (6 + i, 5, 12 + i, 11), (1, 2, 3, 4, 5)) for i in range(count)]
    return collate(requests, 32)


@pytest.mark.parametrize(("conditioning", "context"), CONFIGURATIONS)
def test_every_parameter_learns_and_null_differs(conditioning, context):
    torch.manual_seed(0)
    denoiser = awake(tiny(conditioning, context))
    x_t, timestep, batch = torch.randn(2, 3, 8, 8), torch.tensor([10, 900]), conditions()
    prediction = denoiser(x_t, timestep, batch)
    assert prediction.shape == x_t.shape
    prediction.square().mean().backward()
    # One key makes softmax constant: the published context teaches its queries and keys nothing.
    idle = [".attn2.to_q.", ".attn2.to_k."] if context == "single" else []
    for name, parameter in denoiser.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached or any(part in name for part in idle), name
    with torch.no_grad():
        null = denoiser(x_t, timestep, batch.null())
    assert (prediction - null).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def differs(denoiser, one, other):
    x_t, timestep = torch.randn(len(one), 3, 8, 8), torch.tensor([500] * len(one))
    with torch.no_grad():
        gap = denoiser(x_t, timestep, one) - denoiser(x_t, timestep, other)
    return bool(gap.abs().max() > 1e-6)


@pytest.mark.parametrize(("conditioning", "context"), CONFIGURATIONS)
def test_each_configuration_sees_its_parts_and_no_others(conditioning, context):
    torch.manual_seed(0)
    denoiser, batch = awake(tiny(conditioning, context)).eval(), conditions()
    null = batch.null()
    without_box = type(batch)(batch.layout, null.box, batch.attributes)
    without_scores = type(batch)(batch.layout, batch.box, null.attributes)
    without_lungs = type(batch)(null.layout, batch.box, batch.attributes)
    assert differs(denoiser, batch, without_box)
    assert differs(denoiser, batch, without_scores) == (conditioning >= 3)
    assert differs(denoiser, batch, without_lungs) == (conditioning >= 4)


def test_encoding_once_changes_nothing():
    torch.manual_seed(0)
    denoiser, batch = awake(tiny()).eval(), conditions()
    x_t, timestep = torch.randn(2, 3, 8, 8), torch.tensor([0, 999])
    with torch.no_grad():
        encoded = denoiser.encode(batch)
        assert torch.equal(denoiser(x_t, timestep, batch), denoiser.predict(x_t, timestep, encoded))


def test_a_tiny_network_overfits_one_sample():
    torch.manual_seed(0)
    schedule, denoiser, batch = build_schedule("scaled_linear"), tiny(), conditions()
    x_0, noise = torch.randn(2, 2, 3, 8, 8)
    timestep = torch.tensor([300, 700])
    x_t = q_sample(schedule, x_0, noise, timestep)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=5e-3)
    losses = []
    for _ in range(120):
        prediction = denoiser(x_t, timestep, batch)
        loss = diffusion_loss(schedule, "epsilon", prediction, x_0, noise, timestep).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.2
