"""Holes are filled, all else stays: in every sampler, at every step, whatever the mates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysynth.condition import Condition
from raysynth.config import InpaintingConfig, SamplingConfig
from raysynth.config.model import PredictionType, ScheduleName
from raysynth.config.sampling import SamplerName
from raysynth.diffusion.schedule import build_schedule
from raysynth.errors import InputError
from raysynth.models.conditioner import collate
from raysynth.models.denoiser import Denoiser, build_denoiser
from raysynth.models.space import PixelSpace
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.window import normalize

SIZE, WINDOW = 16, (-1000.0, 400.0)
SAMPLERS: tuple[SamplerName, ...] = ("ddpm", "ddim", "dpm_solver++", "unipc")
HU = np.random.default_rng(0).integers(-1000, 400, (SIZE, SIZE)).astype(np.int16)
X = normalize(torch.from_numpy(HU), WINDOW)[None]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    config = InpaintingConfig(
        channels=(8, 16),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=8,
    )
    network = build_denoiser(config, 1, SIZE)
    with torch.no_grad():
        for parameter in network.parameters():  # MONAI starts output layers at zero
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network.eval()


def engine(
    denoiser: Denoiser,
    guided: bool = False,
    schedule_name: ScheduleName = "cosine",
    prediction_type: PredictionType = "epsilon",
) -> SamplingEngine:
    schedule, shape = build_schedule(schedule_name), (1, SIZE, SIZE)
    space = PixelSpace(WINDOW)
    return SamplingEngine(
        denoiser, schedule, prediction_type, shape, SIZE, 3, space=space, guided=guided
    )


def request(sampler: SamplerName, hole: np.ndarray, guidance_scale: float = 1.0) -> SampleRequest:
    condition = Condition(known_hu=HU, known_mask=~hole)
    return SampleRequest(f"{sampler}-{hole.sum()}", 7, condition, sampler, 6, guidance_scale)


def square() -> np.ndarray:
    hole = np.zeros((SIZE, SIZE), bool)
    hole[4:11, 5:12] = True
    return hole


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_hole_changes(denoiser: Denoiser, sampler: SamplerName, guided: bool) -> None:
    hole = square()
    (drawn,) = engine(denoiser, guided).run([request(sampler, hole, 2.0 if guided else 1.0)])
    assert torch.equal(drawn.x_0[:, ~hole], X[:, ~hole])
    assert (drawn.x_0[:, hole] - X[:, hole]).abs().min() > 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_a_hole_nothing_changes_and_without_an_image_all_is_drawn(
    denoiser: Denoiser, sampler: SamplerName
) -> None:
    (kept,) = engine(denoiser).run([request(sampler, np.zeros((SIZE, SIZE), bool))])
    assert torch.equal(kept.x_0, X)
    plain = SampleRequest("plain", 7, Condition(), sampler, 6)
    all_hole = request(sampler, np.ones((SIZE, SIZE), bool))
    (one,), (other,) = (engine(denoiser).run([asked]) for asked in (plain, all_hole))
    assert torch.equal(one.x_0, other.x_0)


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
@pytest.mark.parametrize(
    ("schedule_name", "prediction_type"), [("cosine", "epsilon"), ("rectified_flow", "flow")]
)
def test_what_is_kept_has_the_noise_of_its_step(
    denoiser: Denoiser,
    sampler: SamplerName,
    schedule_name: ScheduleName,
    prediction_type: PredictionType,
) -> None:
    running = engine(denoiser, False, schedule_name, prediction_type)
    asked, schedule = request(sampler, square()), build_schedule(schedule_name)
    running.admit(asked)
    noise = torch.empty(1, SIZE, SIZE).normal_(generator=torch.Generator().manual_seed(7))
    for timestep in (832, 666, 499, 332, 166):  # six steps, trailing
        running.step()
        expected = (schedule.alphas[timestep] * X + schedule.sigmas[timestep] * noise).float()
        there = ~square()
        torch.testing.assert_close(
            running._x_t[0][:, there], expected[:, there], rtol=1e-4, atol=1e-4
        )


def test_a_fill_does_not_depend_on_its_mates(denoiser: Denoiser) -> None:
    asked = [request(sampler, np.roll(square(), shift)) for shift, sampler in enumerate(SAMPLERS)]
    alone = [next(engine(denoiser).run([one])).x_0 for one in asked]
    together = {one.sample_id: one.x_0 for one in engine(denoiser).run(asked * 1)}
    for one, x_0 in zip(asked, alone, strict=True):
        assert torch.equal(together[one.sample_id], x_0)


def test_the_network_reads_the_image_without_its_hole_and_the_hole(denoiser: Denoiser) -> None:
    hole = square()
    encoded = denoiser.encode(collate([Condition(known_hu=HU, known_mask=~hole)], SIZE))
    image, mask = encoded.channels[0]
    assert torch.equal(mask.bool(), torch.from_numpy(hole))
    assert not image[torch.from_numpy(hole)].any()
    assert torch.equal(image[torch.from_numpy(~hole)], X[0][torch.from_numpy(~hole)])
    null = denoiser.encode(collate([Condition()], SIZE))
    assert torch.equal(null.channels, torch.stack([torch.zeros_like(X), torch.ones_like(X)], 1))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition(known_hu=HU), "give both, or neither"),
        (Condition(known_hu=HU[:8], known_mask=np.ones((8, SIZE), bool)), r"known_hu of shape"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(condition: Condition, message: str) -> None:
    with pytest.raises(InputError, match=message):
        collate([condition], SIZE)


def test_nothing_of_the_host_fades_into_a_hole_unless_it_is_asked_for() -> None:
    assert SamplingConfig().feather_px == 0
