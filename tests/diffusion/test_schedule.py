import pytest
import torch
from diffusers import DDPMScheduler

from raysynth.diffusion.losses import diffusion_loss, min_snr_weight
from raysynth.diffusion.schedule import (
    build_schedule,
    predicted_x_0,
    prediction_target,
    q_sample,
)

DIFFUSERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_schedule_equals_diffusers(name):
    ours, theirs = build_schedule(name), DDPMScheduler(**DIFFUSERS[name])
    alphas_cumprod = ours.alphas.square()
    before = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    betas = (1 - alphas_cumprod / before).float()
    torch.testing.assert_close(betas, theirs.betas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.sigmas.square() + alphas_cumprod, torch.ones(1000).double())
    assert ours.is_variance_preserving


def test_rectified_flow_is_a_straight_line_to_pure_noise():
    schedule = build_schedule("rectified_flow", 50)
    assert schedule.sigmas.tolist() == pytest.approx([(k + 1) / 50 for k in range(50)])
    assert torch.equal(schedule.alphas, 1 - schedule.sigmas)
    assert schedule.alphas[-1] == 0
    assert not schedule.is_variance_preserving
    x_0, noise = torch.randn(2, 50, 3, dtype=torch.float64)
    timestep = torch.arange(50)
    x_t = q_sample(schedule, x_0, noise, timestep)
    velocity = prediction_target(schedule, "flow", x_0, noise, timestep)
    torch.testing.assert_close(x_0 + schedule.sigmas[:, None] * velocity, x_t)


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [(name, kind) for name in DIFFUSERS for kind in ("epsilon", "sample", "v_prediction")]
    + [("rectified_flow", "flow"), ("rectified_flow", "sample")],
)
def test_x_0_survives_noising(name, prediction_type):
    schedule = build_schedule(name)
    x_0, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    timestep = torch.tensor([0, 1, 250, 500, 900, 990])
    x_t = q_sample(schedule, x_0, noise, timestep)
    target = prediction_target(schedule, prediction_type, x_0, noise, timestep)
    torch.testing.assert_close(
        predicted_x_0(schedule, prediction_type, x_t, target, timestep), x_0, rtol=0, atol=1e-9
    )


def test_q_sample_equals_diffusers():
    x_0, noise = torch.randn(2, 4, 3, 4, 4, 4)
    timestep = torch.tensor([0, 10, 500, 999])
    theirs = DDPMScheduler(**DIFFUSERS["scaled_linear"]).add_noise(x_0, noise, timestep)
    ours = q_sample(build_schedule("scaled_linear"), x_0, noise, timestep)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_loss_is_one_number_a_sample():
    schedule = build_schedule("linear")
    x_0, noise = torch.randn(2, 3, 1, 4, 4)
    timestep = torch.tensor([5, 500, 999])
    target = prediction_target(schedule, "v_prediction", x_0, noise, timestep)
    shifted = target + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    loss = diffusion_loss(schedule, "v_prediction", shifted, x_0, noise, timestep)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0]))
    absolute = diffusion_loss(schedule, "v_prediction", shifted, x_0, noise, timestep, loss="l1")
    torch.testing.assert_close(absolute, torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_pixels_count_by_their_weight(loss):
    schedule = build_schedule("linear")
    x_0, noise = torch.randn(2, 2, 3, 4, 4)
    timestep = torch.tensor([5, 500])
    error = torch.zeros(4, 4)
    error[:2] = 2.0
    weight = torch.full((2, 1, 4, 4), 0.25)
    weight[:, :, :2] = 1.0
    errors = diffusion_loss(
        schedule, "epsilon", noise + error, x_0, noise, timestep, weight, loss=loss
    )
    expected = (4.0 if loss == "l2" else 2.0) / (1 + 0.25)
    torch.testing.assert_close(errors, torch.full((2,), expected))


TIMESTEPS = torch.tensor([0, 3, 50, 250, 500, 900, 999])


@pytest.mark.parametrize("gamma", [0.1, 5.0])
@pytest.mark.parametrize(
    ("name", "prediction_type", "weight"),
    [
        ("cosine", "epsilon", lambda snr, gamma: snr.clamp(max=gamma) / snr),
        ("linear", "epsilon", lambda snr, gamma: snr.clamp(max=gamma) / snr),
        ("linear", "sample", lambda snr, gamma: snr.clamp(max=gamma)),
        ("linear", "v_prediction", lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1)),
        ("rectified_flow", "sample", lambda snr, gamma: snr.clamp(max=gamma)),
        # sigma = 1 / (1 + sqrt(snr)), as alpha + sigma = 1.
        (
            "rectified_flow",
            "flow",
            lambda snr, gamma: snr.clamp(max=gamma) / (1 + snr.sqrt()).square(),
        ),
    ],
)
def test_min_snr_weights_have_their_closed_forms(name, prediction_type, weight, gamma):
    schedule = build_schedule(name)
    snr = (schedule.alphas / schedule.sigmas).square()[TIMESTEPS]
    torch.testing.assert_close(
        min_snr_weight(schedule, prediction_type, TIMESTEPS, gamma), weight(snr, gamma)
    )


@pytest.mark.parametrize(
    ("name", "prediction_types"),
    [
        ("linear", ("epsilon", "sample", "v_prediction")),
        ("rectified_flow", ("flow", "sample")),
    ],
)
def test_min_snr_makes_all_predictions_minimise_the_same(name, prediction_types):
    """The same wrong x_0 costs min(snr, gamma) times its squared error, whatever predicts it."""
    schedule = build_schedule(name)
    x_0, noise, wrong = torch.randn(3, len(TIMESTEPS), 2, 4, 4, dtype=torch.float64)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in schedule.at(TIMESTEPS))
    x_t = q_sample(schedule, x_0, noise, TIMESTEPS)
    predictions = {
        "epsilon": (x_t - alpha * wrong) / sigma,
        "sample": wrong,
        "v_prediction": (alpha * x_t - wrong) / sigma,
        "flow": (x_t - wrong) / sigma,
    }
    snr = (schedule.alphas / schedule.sigmas).square()[TIMESTEPS].clamp(max=5)
    expected = snr * (wrong - x_0).square().flatten(1).mean(dim=1)
    for kind in prediction_types:
        for weight in (None, torch.ones(len(TIMESTEPS), 1, 4, 4)):
            loss = diffusion_loss(
                schedule, kind, predictions[kind], x_0, noise, TIMESTEPS, weight, snr_gamma=5.0
            )
            torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-9)
