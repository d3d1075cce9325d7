import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config.model import LatentDiffusionConfig
from raysynth.diffusion.schedule import build_schedule
from raysynth.errors import InputError
from raysynth.models.conditioner import collate
from raysynth.models.denoiser import build_denoiser
from raysynth.sampling.engine import SampleRequest, SamplingEngine

LATENT_SHAPE, SAMPLE_SIZE = (3, 8, 8), 32
SAMPLERS = ("ddpm", "ddim", "dpm_solver++", "unipc")


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    config = LatentDiffusionConfig(
        autoencoder="unused",
        channels=(8, 16),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=8,
    )
    network = build_denoiser(config, latent_channels=3, latent_size=8)
    # MONAI starts output layers at zero; a trained network is not blind to its input. Nor does it
    # blow up every rounding error, as random layers of larger weights do.
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network.eval()


def engine(
    denoiser,
    max_slots,
    guided=False,
    prediction_type="epsilon",
    compiled=False,
    schedule="scaled_linear",
):
    return SamplingEngine(
        denoiser,
        build_schedule(schedule),
        prediction_type,
        LATENT_SHAPE,
        SAMPLE_SIZE,
        max_slots,
        guided=guided,
        compiled=compiled,
    )


def request(number, guided=False):
    """A request that differs from the others in everything, and follows from its number."""
    rng = random.Random(number)
    layout = np.full((SAMPLE_SIZE, SAMPLE_SIZE), Label.BODY, dtype=np.uint8)
    layout[4:28, 3 : rng.randint(8, 14)] = Label.RIGHT_LUNG
    y, x = rng.randint(0, 24), rng.randint(0, 24)
    return SampleRequest(
        sample_id=f"sample-{number}",
        seed=number,
        condition=Condition(layout, (y, x, y + 5, x + 5), tuple(rng.choices(range(1, 6), k=5))),
        sampler=rng.choice(SAMPLERS),
        num_inference_steps=rng.choice([1, 2, 3, 5, 8]),
        guidance_scale=rng.choice([0.0, 1.0, 2.0, 4.5]) if guided else 1.0,
    )


@pytest.mark.parametrize("guided", [False, True])
def test_a_sample_is_its_request_whatever_its_mates(denoiser, guided):
    requests = [request(number, guided) for number in range(12)]
    alone = engine(denoiser, 4, guided)
    expected = {r.sample_id: next(alone.run([r])).x_0 for r in requests}
    rng = random.Random(0)
    for _ in range(6):
        mix = rng.sample(requests, rng.randint(1, len(requests)))
        results = list(engine(denoiser, 4, guided).run(mix))
        assert sorted(r.sample_id for r in results) == sorted(r.sample_id for r in mix)
        for sample_id, x_0, batch_shape in results:
            assert torch.equal(x_0, expected[sample_id]), sample_id
            assert batch_shape == (8 if guided else 4)


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_whatever_the_mates(denoiser):
    requests = [request(number, guided=True) for number in range(8)]
    plain = {one.sample_id: one.x_0 for one in engine(denoiser, 4, guided=True).run(requests)}
    compiled = engine(denoiser, 4, guided=True, compiled=True)
    together = {one.sample_id: one.x_0 for one in compiled.run(requests)}
    for one in requests:
        (alone,) = compiled.run([one])
        assert torch.equal(alone.x_0, together[one.sample_id])
        torch.testing.assert_close(alone.x_0, plain[one.sample_id], rtol=1e-4, atol=1e-4)


def test_without_a_compiler_nothing_is_compiled(denoiser, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"sampling.compile true needs a C\+\+ compiler"):
        engine(denoiser, 1, compiled=True)


def test_late_arrivals_change_nothing(denoiser):
    """Admission between any two steps, as a server does it, into slots that others have left."""
    one = engine(denoiser, 3)
    expected = {n: next(one.run([request(n)])).x_0 for n in range(8)}
    busy, results = engine(denoiser, 3), {}
    waiting = [request(n) for n in (5, 2, 7, 0, 1, 6, 3, 4)]
    rng = random.Random(1)
    while waiting or busy.num_busy:
        if waiting and rng.random() < 0.5 and busy.admit(waiting[0]):
            waiting.pop(0)
        busy.step()
        results |= {finished.sample_id: finished.x_0 for finished in busy.retire()}
    assert len(results) == 8
    for number, x_0 in expected.items():
        assert torch.equal(results[f"sample-{number}"], x_0)


def test_batch_shapes_agree_to_float_tolerance(denoiser):
    requests = [request(number, guided=True) for number in range(6)]
    one, eight = (
        {r.sample_id: r.x_0 for r in engine(denoiser, slots, guided=True).run(requests)}
        for slots in (1, 8)
    )
    for sample_id, x_0 in one.items():
        # A guided, untrained network gives latents far above 1: tolerance relative to their size.
        scale = max(1.0, x_0.abs().max().item())
        assert (x_0 - eight[sample_id]).abs().max() <= 1e-4 * scale


def diffusers_scheduler(sampler, prediction_type):
    options = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "trailing",
        "prediction_type": prediction_type,
    }
    match sampler:
        case "ddpm":
            return DDPMScheduler(**options, clip_sample=False)
        case "ddim":
            return DDIMScheduler(**options, clip_sample=False)
        case "dpm_solver++":
            return DPMSolverMultistepScheduler(**options)
        case _:
            return UniPCMultistepScheduler(**options)


@torch.no_grad()
def diffusers_sample(denoiser, asked, prediction_type):
    """The loop of diffusers' pipelines with classifier-free guidance, for one request."""
    scheduler = diffusers_scheduler(asked.sampler, prediction_type)
    scheduler.set_timesteps(asked.num_inference_steps)
    generator = torch.Generator().manual_seed(asked.seed)
    x_t = torch.randn((1, *LATENT_SHAPE), generator=generator)
    encoded = denoiser.encode(collate([Condition(), asked.condition], SAMPLE_SIZE))
    for timestep in scheduler.timesteps:
        prediction = denoiser.predict(torch.cat([x_t] * 2), timestep.expand(2), encoded)
        null, conditional = prediction.chunk(2)
        guided = null + asked.guidance_scale * (conditional - null)
        extra = {"generator": generator} if asked.sampler == "ddpm" else {}
        x_t = scheduler.step(guided, timestep, x_t, **extra).prev_sample
    return x_t[0]


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "epsilon"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_the_pipeline_loop_of_diffusers(denoiser, sampler, prediction_type):
    asked = SampleRequest("s", 7, request(3).condition, sampler, 10, guidance_scale=2.0)
    (finished,) = engine(denoiser, 1, True, prediction_type).run([asked])
    expected = diffusers_sample(denoiser, asked, prediction_type)
    scale = max(1.0, expected.abs().max().item())
    assert (finished.x_0 - expected).abs().max() <= 1e-5 * scale


def test_flows_share_the_engine_and_keep_their_bits(denoiser):
    """All deterministic samplers, mixed, and Euler's method written out."""
    flows = [
        replace(request(number), sampler=sampler, num_inference_steps=steps)
        for number, (sampler, steps) in enumerate(
            (sampler, steps) for sampler in SAMPLERS[1:] for steps in (1, 4, 9)
        )
    ]
    running = engine(denoiser, 4, prediction_type="flow", schedule="rectified_flow")
    expected = {one.sample_id: next(running.run([one])).x_0 for one in flows}
    for sample_id, x_0, _ in running.run(reversed(flows)):
        assert x_0.isfinite().all()
        assert torch.equal(x_0, expected[sample_id])

    euler = next(one for one in flows if (one.sampler, one.num_inference_steps) == ("ddim", 4))
    x_t = torch.randn((1, *LATENT_SHAPE), generator=torch.Generator().manual_seed(euler.seed))
    with torch.no_grad():
        encoded = denoiser.encode(collate([euler.condition], SAMPLE_SIZE))
        for timestep in (999, 749, 499, 249):
            x_t = x_t - 0.25 * denoiser.predict(x_t, torch.tensor([timestep]), encoded)
    torch.testing.assert_close(expected[euler.sample_id], x_t[0], rtol=0, atol=1e-4)


def test_condition_guidance_and_seed_matter(denoiser):
    base = request(3)
    variants = [
        base,
        SampleRequest("seed", 99, base.condition, base.sampler, base.num_inference_steps),
        SampleRequest("null", base.seed, Condition(), base.sampler, base.num_inference_steps),
        SampleRequest("s2", base.seed, base.condition, base.sampler, base.num_inference_steps, 2.0),
    ]
    results = [r.x_0 for r in engine(denoiser, 4, guided=True).run(variants)]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert (one - other).abs().max() > 1e-4


def test_a_full_engine_admits_nothing_more(denoiser):
    full = engine(denoiser, 1)
    assert full.admit(request(0))
    assert not full.admit(request(1))
    assert full.num_busy == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale 2.0 of sample x: this engine runs without"),
        ({"num_inference_steps": 1001}, "num_inference_steps 1001: this model allows 1 to 1000"),
        ({"condition": Condition(box=(0, 0, 99, 9))}, r"box \(0, 0, 99, 9\)"),
    ],
)
def test_requests_that_do_not_fit_are_refused_and_leave_no_trace(denoiser, changes, message):
    asked = {
        "sample_id": "x",
        "seed": 0,
        "condition": Condition(),
        "sampler": "ddim",
        "num_inference_steps": 2,
    } | changes
    refusing = engine(denoiser, 1)
    with pytest.raises(InputError, match=message):
        refusing.admit(SampleRequest(**asked))
    assert refusing.num_busy == 0


def test_a_diverged_sample_does_not_infect_the_next_in_its_slot(denoiser):
    one = engine(denoiser, 1)
    asked = replace(request(3), sampler="unipc", num_inference_steps=5)
    expected = next(one.run([asked])).x_0
    one.admit(replace(request(4), num_inference_steps=5))
    with torch.inference_mode():
        one._x_t.fill_(float("nan"))
    while one.num_busy:
        one.step()
    one.step()
    assert one.retire()[0].x_0.isnan().all()
    assert torch.equal(next(one.run([asked])).x_0, expected)
