import numpy as np
import pytest
import torch

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config.model import LatentDiffusionConfig, SemanticDiffusionConfig
from raysynth.diffusion.losses import diffusion_loss
from raysynth.diffusion.schedule import build_schedule, q_sample
from raysynth.models.conditioner import ConditionBatch, collate, one_hot_layout
from raysynth.models.denoiser import Denoiser, build_denoiser
from raysynth.models.monai import SPADE

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


def awake(denoiser: Denoiser) -> Denoiser:
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


def semantic(**changes):
    small = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1}
    groups = {"num_head_channels": 8, "norm_num_groups": 8, "layout_channels": 8}
    config = SemanticDiffusionConfig(**small | groups | changes)
    return build_denoiser(config, latent_channels=1, latent_size=32)


def test_labels_become_channels():
    layout = torch.tensor([[[0, 1, 2], [3, 4, 5], [16, 200, 5]], [[0] * 3] * 3], dtype=torch.uint8)
    channels = one_hot_layout(layout)
    assert channels.shape == (2, 6, 3, 3)
    assert channels[0].argmax(dim=0).tolist() == [[0, 1, 2], [3, 4, 5], [4, 4, 5]]
    assert (channels[0].sum(dim=0) == 1).all()
    assert not channels[1].any()  # the null condition


def test_scale_and_shift_follow_the_layout_as_published():
    torch.manual_seed(0)
    spade = next(part for part in semantic().modules() if isinstance(part, SPADE))
    x, layout = torch.randn(1, spade.mlp_beta.out_channels, 8, 8), torch.zeros(1, 6, 16, 16)
    layout[:, 2, :, :] = 1  # one label everywhere still says which
    weights = {name: parameter.detach() for name, parameter in spade.named_parameters()}

    def convolved(x, name):
        weight, bias = weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"]
        return torch.nn.functional.conv2d(x, weight, bias, padding=1)

    hidden = convolved(layout[:, :, ::2, ::2], "mlp_shared").relu()
    normalized = torch.nn.functional.group_norm(x, 8, eps=spade.param_free_norm.eps)
    expected = normalized * (1 + convolved(hidden, "mlp_gamma")) + convolved(hidden, "mlp_beta")
    torch.testing.assert_close(spade(x, layout), expected)


@pytest.mark.parametrize("edges", [False, True])
def test_a_semantic_network_sees_the_layout_alone(edges):
    torch.manual_seed(0)
    denoiser, batch = awake(semantic(edge_map=edges)), conditions()
    assert denoiser.encode(batch).channels.shape == (2, 6 + edges, 32, 32)
    assert not denoiser.encode(batch.null()).channels.any()
    x_t, timestep = torch.randn(2, 1, 32, 32), torch.tensor([10, 900])
    prediction = denoiser(x_t, timestep, batch)
    assert prediction.shape == x_t.shape
    prediction.square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    null = batch.null()
    without_layout = type(batch)(null.layout, batch.box, batch.attributes)
    layout_alone = type(batch)(batch.layout, null.box, null.attributes)
    with torch.no_grad():
        assert (prediction - denoiser(x_t, timestep, without_layout)).abs().max() > 1e-4
        assert torch.equal(prediction, denoiser(x_t, timestep, layout_alone))


def test_a_semantic_network_of_published_size():
    with torch.device("meta"):
        denoiser = semantic(
            channels=(256, 256, 512, 512, 1024, 1024),
            attention_levels=(False, False, False, True, True, True),
            num_res_blocks=2,
            num_head_channels=64,
            norm_num_groups=32,
            layout_channels=128,
        )
        x_t = torch.empty(2, 1, 256, 256)
        encoded = one_hot_layout(torch.empty(2, 256, 256, dtype=torch.uint8))
    assert 0.4e9 < sum(parameter.numel() for parameter in denoiser.parameters()) < 0.8e9
    prediction = denoiser.unet(x_t, torch.empty(2, device="meta"), seg=encoded)
    assert prediction.shape == x_t.shape


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


@pytest.mark.parametrize(
    ("conditioning", "context", "millions"),
    [
        (1, "tokens", 89.537),
        (2, "tokens", 133.458),
        (3, "tokens", 133.486),
        (4, "tokens", 133.487),
        (3, "single", 183.366),
    ],
)
def test_attribute_networks_of_published_size(conditioning, context, millions):
    """System A at its defaults: 64 x 64 latents of three channels."""
    config = LatentDiffusionConfig(autoencoder="a", conditioning=conditioning, context=context)
    with torch.device("meta"):
        denoiser = build_denoiser(config, latent_channels=3, latent_size=64)
        x_t, timestep = torch.empty(2, 3, 64, 64), torch.empty(2, dtype=torch.int64)
        layout = torch.empty(2, 256, 256, dtype=torch.uint8)
        box, attributes = (torch.empty(2, n, dtype=torch.int64) for n in (4, 5))
        batch = ConditionBatch(layout, box, attributes)
        assert denoiser(x_t, timestep, batch).shape == x_t.shape
    size = sum(parameter.numel() for parameter in denoiser.parameters())
    assert size == pytest.approx(millions * 1e6, abs=500)
    if conditioning >= 3:
        embedding = denoiser.conditioner.context.attributes
        assert sum(parameter.numel() for parameter in embedding.parameters()) == 24_580
