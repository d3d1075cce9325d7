import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from raysynth.diffusion.samplers import inference_timesteps, sampler_step, step_table
from raysynth.diffusion.schedule import (
    NoiseSchedule,
    build_schedule,
    predicted_x_0,
    prediction_target,
    q_sample,
    x_0_weights,
)
from raysynth.errors import InputError

SCALED_LINEAR = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}
DETERMINISTIC = ("ddim", "dpm_solver++", "unipc")
SAMPLERS = ("ddpm", *DETERMINISTIC)


def diffusers_scheduler(sampler, prediction_type):
    options = {**SCALED_LINEAR, "prediction_type": prediction_type}
    match sampler:
        case "ddpm":
            return DDPMScheduler(**options, clip_sample=False, variance_type="fixed_small")
        case "ddim":
            return DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True)
        case "dpm_solver++":
            return DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++")
        case _:
            return UniPCMultistepScheduler(**options, solver_order=2, solver_type="bh2")


def network(x_t, timestep):
    """Some smooth function of both: a stand-in for a network that gives bounded predictions."""
    return torch.tanh(0.7 * x_t + 0.3 * torch.sin(timestep.view(-1, 1, 1, 1) / 100))


def columns(weights):
    return [column.float().view(-1, 1, 1, 1) for column in weights.unbind(-1)]


def course(table, x_t, estimate, rng=None):
    """x_t before each step and at the end, of a whole course with a perfect or imperfect network.

    Args:
        table: the sampler's.
        x_t: noise.
        estimate: gives x_0 for x_t and timestep.
        rng: of the noise; None: there is none.
    """
    x_0_prev = x_0_prev2 = torch.zeros_like(x_t)
    for timestep, weights in zip(table.timesteps, table.weights.to(x_t), strict=True):
        yield x_t
        x_0 = estimate(x_t, timestep)
        noise = torch.zeros_like(x_t) if rng is None else torch.randn(x_t.shape, generator=rng)
        x_t = sampler_step(weights, x_t, x_0, x_0_prev, x_0_prev2, noise)
        x_0_prev, x_0_prev2 = x_0, x_0_prev
    yield x_t


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    # diffusers' DDIM takes T // steps for its stride even where that is not the next timestep.
    [(s, n) for s in SAMPLERS for n in (1, 2, 10, 50)]
    + [("ddpm", 7), ("dpm_solver++", 37), ("unipc", 3), ("unipc", 37)],
)
def test_each_step_equals_diffusers(sampler, steps, prediction_type):
    schedule = build_schedule("scaled_linear")
    table = step_table(sampler, schedule, steps)
    theirs = diffusers_scheduler(sampler, prediction_type)
    theirs.set_timesteps(steps)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()

    x_t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_0_prev = x_0_prev2 = torch.zeros_like(x_t)
    ours_rng, theirs_rng = (torch.Generator().manual_seed(1) for _ in range(2))
    for timestep, weights in zip(table.timesteps, table.weights, strict=True):
        prediction = network(x_t, timestep)
        x_0 = predicted_x_0(schedule, prediction_type, x_t, prediction, timestep.expand(2))
        noise = torch.randn(x_t.shape, generator=ours_rng)
        x_next = sampler_step(columns(weights), x_t, x_0, x_0_prev, x_0_prev2, noise)
        extra = {"generator": theirs_rng} if sampler == "ddpm" else {}
        expected = theirs.step(prediction, timestep, x_t, **extra).prev_sample
        # Epsilon networks asked for few steps give |x| of 30: there one float32 digit is 2e-6.
        torch.testing.assert_close(x_next, expected, rtol=1e-6, atol=1e-5)
        x_t, x_0_prev, x_0_prev2 = x_next, x_0, x_0_prev


def compare_flow_courses(schedule, table, theirs):
    """Each x_t of a flow equals that of a scheduler of diffusers, under a bounded velocity."""
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x_t, timestep):
        return network(x_t, timestep) - x_t

    def estimate(x_t, timestep):
        prediction = velocity(x_t, timestep)
        return predicted_x_0(schedule, "flow", x_t, prediction, timestep.expand(2))

    theirs.set_timesteps(sigmas=schedule.sigmas[table.timesteps].numpy())
    x_t, expected = start, [start]
    for i, timestep in enumerate(table.timesteps):
        x_t = theirs.step(velocity(x_t, timestep), theirs.timesteps[i], x_t).prev_sample
        expected.append(x_t)
    ours = torch.stack(list(course(table, start, estimate)))
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 10, 37])
def test_ddim_on_rectified_flow_is_the_euler_method(steps):
    """Each step is x_t + (t_next - t) prediction, whatever the network predicts."""
    schedule = build_schedule("rectified_flow")
    table = step_table("ddim", schedule, steps)
    time = torch.cat([(table.timesteps.double() + 1) / 1000, torch.zeros(1)])
    p, q = x_0_weights("flow", *schedule.at(table.timesteps))
    a, b, *rest = table.weights.unbind(1)
    torch.testing.assert_close(a + b * p, torch.ones_like(a), rtol=0, atol=1e-14)
    torch.testing.assert_close(b * q, time.diff(), rtol=0, atol=1e-14)
    assert not any(weights.any() for weights in rest)
    compare_flow_courses(schedule, table, FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 37])
def test_unipc_of_flows_equals_diffusers(steps):
    """On a straight line that stops short of pure noise: there diffusers puts sigma 1 - 1e-6."""
    time = 0.98 * torch.arange(1, 1001, dtype=torch.float64) / 1000
    schedule = NoiseSchedule(1 - time, time)
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    compare_flow_courses(schedule, step_table("unipc", schedule, steps), theirs)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_a_flow_starts_from_pure_noise_at_first_order(sampler, steps):
    table = step_table(sampler, build_schedule("rectified_flow"), steps)
    assert table.weights.isfinite().all()
    first = step_table("ddim", build_schedule("rectified_flow"), steps).weights[0]
    assert torch.equal(table.weights[0], first)
    assert not table.is_stochastic


def test_ddpm_on_a_flow_is_refused():
    with pytest.raises(InputError, match="sampler ddpm needs a variance-preserving schedule: use"):
        step_table("ddpm", build_schedule("rectified_flow"), 10)


@pytest.mark.parametrize(
    ("sampler", "schedule_name"),
    [(s, n) for s in SAMPLERS for n in ("linear", "scaled_linear", "cosine")]
    + [(s, "rectified_flow") for s in DETERMINISTIC],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_perfect_denoiser_gives_x_0(sampler, schedule_name, steps):
    table = step_table(sampler, build_schedule(schedule_name), steps)
    x_0, x_t = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    *_, drawn = course(table, x_t, lambda *_: x_0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, x_0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule_name", ["scaled_linear", "rectified_flow"])
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_keep_the_noise(sampler, schedule_name):
    """With the true x_0 every x_t stays on the line alpha x_0 + sigma noise."""
    schedule = build_schedule(schedule_name)
    table = step_table(sampler, schedule, 9)
    x_0, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    start = q_sample(schedule, x_0, noise, table.timesteps[:1])
    *visited, _ = course(table, start, lambda *_: x_0)
    for x_t, timestep in zip(visited, table.timesteps, strict=True):
        expected = q_sample(schedule, x_0, noise, timestep[None])
        torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-12)


def test_a_batch_mixes_samplers_and_positions():
    schedule = build_schedule("linear")
    rows = [(step_table("ddpm", schedule, 10), 3), (step_table("ddim", schedule, 5), 0)]
    rows += [(step_table("dpm_solver++", schedule, 20), 7), (step_table("unipc", schedule, 8), 4)]
    state = torch.randn(5, 4, 2, 4, 4)  # x_t, three estimates and noise
    weights = torch.stack([table.weights[position] for table, position in rows])
    together = sampler_step(columns(weights), *state)
    for i, (table, position) in enumerate(rows):
        alone = sampler_step(columns(table.weights[position]), *state[:, i : i + 1])
        assert torch.equal(together[i], alone[0])


MEAN, STD = 2.0, 0.5


def ideal(schedule):
    """The perfect network of data N(MEAN, STD^2): E[x_0 | x_t] in closed form."""

    def estimate(x_t, timestep):
        alpha, sigma = (level.item() for level in schedule.at(timestep))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)

    return estimate


@pytest.mark.parametrize(
    ("sampler", "schedule_name"),
    [(s, "linear") for s in SAMPLERS] + [(s, "rectified_flow") for s in DETERMINISTIC],
)
def test_samplers_reach_a_known_density(sampler, schedule_name):
    schedule = build_schedule(schedule_name)
    x_t = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    *_, drawn = course(step_table(sampler, schedule, 200), x_t, ideal(schedule), rng)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(STD, abs=0.03)


QUANTILES = torch.linspace(-2, 2, 9, dtype=torch.float64)


def quantiles_of_x_t(schedule, timestep):
    """The probability-flow ODE maps quantiles onto quantiles: its exact solution."""
    alpha, sigma = schedule.at(timestep)
    return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * QUANTILES


def ode_errors(sampler, schedule, steps):
    """Largest distance from the exact solution before each step and at the end."""
    table = step_table(sampler, schedule, steps)
    expected = [quantiles_of_x_t(schedule, timestep) for timestep in table.timesteps]
    visited = course(table, expected[0], ideal(schedule))
    expected.append(MEAN + STD * QUANTILES)
    return [(x_t - x).abs().max().item() for x_t, x in zip(visited, expected, strict=True)]


@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear", "cosine", "rectified_flow"])
def test_more_steps_come_closer_and_higher_orders_come_sooner(schedule_name):
    schedule = build_schedule(schedule_name)
    at_ten = []
    for sampler in DETERMINISTIC:
        few, ten, some, many = (ode_errors(sampler, schedule, n)[-1] for n in (5, 10, 20, 80))
        assert few > some > many
        at_ten.append(ten)
    assert at_ten == sorted(at_ten, reverse=True)


@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver++", 2), ("unipc", 3)])
def test_samplers_have_their_order(sampler, order, schedule_name):
    """Half-way, as the step to x_0 itself is of first order in all of them."""
    schedule = build_schedule(schedule_name)
    coarse, fine = (ode_errors(sampler, schedule, steps)[steps // 2] for steps in (100, 200))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_ddpm_comes_closer_with_more_steps():
    """Each step is linear and adds noise, so the variance that it ends with is known exactly."""
    schedule = build_schedule("linear")
    errors = []
    for steps in (5, 20, 80, 320):
        table = step_table("ddpm", schedule, steps)
        alpha, sigma = schedule.at(table.timesteps)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        variance = 1.0
        for (a, b, _, _, e), g in zip(table.weights.tolist(), gain.tolist(), strict=True):
            variance = (a + b * g) ** 2 * variance + e**2
        errors.append(abs(variance**0.5 - STD))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


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
    sigma = schedule.sigmas[400].item()
    torch.testing.assert_close(v, torch.full_like(v, -sigma))
