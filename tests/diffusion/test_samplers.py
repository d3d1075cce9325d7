import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from raysynth.diffusion.samplers import inference_timesteps, sampler_step, step_table
from raysynth.diffusion.schedule import build_schedule, predicted_x_0, prediction_target, q_sample
from raysynth.errors import InputError

SCALED_LINEAR = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}
SAMPLERS = ("ddpm", "ddim", "dpm_solver++")


def diffusers_scheduler(sampler, prediction_type):
    options = {**SCALED_LINEAR, "prediction_type": prediction_type}
    match sampler:
        case "ddpm":
            return DDPMScheduler(**options, clip_sample=False, variance_type="fixed_small")
        case "ddim":
            return DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True)
        case _:
            return DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++")


def network(x_t, timestep):
    """Some smooth function of both: a stand-in for a network that gives bounded predictions."""
    return torch.tanh(0.7 * x_t + 0.3 * torch.sin(timestep.view(-1, 1, 1, 1) / 100))


def columns(weights):
    return [column.float().view(-1, 1, 1, 1) for column in weights.unbind(-1)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    # diffusers' DDIM takes T // steps for its stride even where that is not the next timestep.
    [(s, n) for s in SAMPLERS for n in (1, 2, 10, 50)] + [("ddpm", 7), ("dpm_solver++", 37)],
)
def test_each_step_equals_diffusers(sampler, steps, prediction_type):
    schedule = build_schedule("scaled_linear")
    table = step_table(sampler, schedule, steps)
    theirs = diffusers_scheduler(sampler, prediction_type)
    theirs.set_timesteps(steps)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()

    x_t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_0_prev = torch.zeros_like(x_t)
    ours_rng, theirs_rng = (torch.Generator().manual_seed(1) for _ in range(2))
    for timestep, weights in zip(table.timesteps, table.weights, strict=True):
        prediction = network(x_t, timestep)
        x_0 = predicted_x_0(schedule, prediction_type, x_t, prediction, timestep.expand(2))
        noise = torch.randn(x_t.shape, generator=ours_rng)
        x_next = sampler_step(columns(weights), x_t, x_0, x_0_prev, noise)
        extra = {"generator": theirs_rng} if sampler == "ddpm" else {}
        expected = theirs.step(prediction, timestep, x_t, **extra).prev_sample
        # Epsilon networks asked for few steps give |x| of 30: there one float32 digit is 2e-6.
        torch.testing.assert_close(x_next, expected, rtol=1e-6, atol=1e-5)
        x_t, x_0_prev = x_next, x_0


@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_perfect_denoiser_gives_x_0(sampler, schedule_name, steps):
    schedule = build_schedule(schedule_name)
    table = step_table(sampler, schedule, steps)
    x_0, x_t = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for weights in table.weights:
        x_t = sampler_step(columns(weights), x_t, x_0, x_0, torch.randn_like(x_t))
    torch.testing.assert_close(x_t, x_0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver++"])
def test_deterministic_samplers_keep_the_noise(sampler):
    """With the true x_0 every x_t stays on the line alpha x_0 + sigma noise."""
    schedule = build_schedule("scaled_linear")
    table = step_table(sampler, schedule, 9)
    x_0, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, noise, table.timesteps[:1])
    for step in range(8):
        weights = table.weights[step : step + 1, :, None, None, None].unbind(1)
        x_t = sampler_step(weights, x_t, x_0, x_0, torch.zeros_like(x_t))
        expected = q_sample(schedule, x_0, noise, table.timesteps[step + 1 : step + 2])
        torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-12)


def test_a_batch_mixes_samplers_and_positions():
    schedule = build_schedule("linear")
    rows = [(step_table("ddpm", schedule, 10), 3), (step_table("ddim", schedule, 5), 0)]
    rows += [(step_table("dpm_solver++", schedule, 20), 7)]
    x_t, x_0, x_0_prev, noise = torch.randn(4, 3, 2, 4, 4)
    weights = torch.stack([table.weights[position] for table, position in rows])
    together = sampler_step(columns(weights), x_t, x_0, x_0_prev, noise)
    for i, (table, position) in enumerate(rows):
        alone = sampler_step(
            columns(table.weights[position]), x_t[i : i + 1], x_0[i : i + 1], x_0_prev[i], noise[i]
        )
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_reach_a_known_density(sampler):
    """Data N(2, 0.5^2): the ideal network is known in closed form, so the result must match."""
    schedule = build_schedule("linear")
    mean, std = 2.0, 0.5
    table = step_table(sampler, schedule, 200)
    x_t = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x_0_prev, rng = torch.zeros_like(x_t), torch.Generator().manual_seed(1)
    for timestep, weights in zip(table.timesteps, table.weights, strict=True):
        alpha_bar = schedule.alphas_cumprod[timestep].item()
        gain = alpha_bar**0.5 * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        x_0 = mean + gain * (x_t - alpha_bar**0.5 * mean)
        noise = torch.randn(x_t.shape, generator=rng)
        x_t, x_0_prev = sampler_step(columns(weights), x_t, x_0, x_0_prev, noise), x_0
    assert x_t.mean().item() == pytest.approx(mean, abs=0.02)
    assert x_t.std().item() == pytest.approx(std, abs=0.03)


def test_timesteps_of_all_steps_visit_each_once():
    schedule = build_schedule("linear", 40)
    assert inference_timesteps(schedule, 40).tolist() == list(range(39, -1, -1))


@pytest.mark.parametrize("steps", [0, 41])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(InputError, match=f"num_inference_steps {steps}: this model allows 1 to 40"):
        step_table("ddim", build_schedule("linear", 40), steps)


def test_prediction_target_of_v_is_orthogonal_mix():
    schedule = build_schedule("cosine")
    x_0, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    timestep = torch.tensor([400])
    v = prediction_target(schedule, "v_prediction", x_0, noise, timestep)
    sigma = (1 - schedule.alphas_cumprod[400]).sqrt().item()
    torch.testing.assert_close(v, torch.full_like(v, -sigma))
