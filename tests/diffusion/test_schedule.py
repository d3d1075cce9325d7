import pytest
import torch
from diffusers import DDPMScheduler

from raysynth.diffusion.losses import diffusion_loss
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
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
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
