"""Anatomically aware sampling: only what the layout names is drawn, in every space and sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config import (
    AutoencoderKLConfig,
    LayoutDiffusionConfig,
    LayoutLatentDiffusionConfig,
    PatchSamples,
    SamplingConfig,
)
from raysynth.config.sampling import SamplerName
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError
from raysynth.layout.holes import layout_hole
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import save_bundle
from raysynth.models.conditioner import collate
from raysynth.models.denoiser import build_denoiser
from raysynth.models.facts import BundleFacts
from raysynth.models.space import feathered
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.sampling.planner import PlannedSample

SIZE, WINDOW = 16, (-1000.0, 400.0)
SHAPE = (SIZE,) * 3
SAMPLES = PatchSamples(size=SIZE, field_of_view_mm=64.0, centre="lungs")
HU = np.random.default_rng(0).integers(-1000, 400, SHAPE).astype(np.int16)

NETWORK = {
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 8,
    "num_train_timesteps": 250,
}
AUTOENCODER = AutoencoderKLConfig(
    window_hu=WINDOW, channels=(8, 16), num_res_blocks=1, norm_num_groups=8, latent_channels=2
)
KINDS = ("pixel", "latent", "latent flow")
RUNS: list[tuple[str, SamplerName]] = [
    (kind, sampler)
    for kind in KINDS
    for sampler in ("ddpm", "ddim", "dpm_solver++", "unipc")
    if (kind, sampler) != ("latent flow", "ddpm")
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fresh networks that are blind to nothing, in each space."""
    flow = {"schedule": "rectified_flow", "prediction_type": "flow"}
    configs = {
        "pixel": LayoutDiffusionConfig.model_validate(NETWORK),
        "latent": LayoutLatentDiffusionConfig.model_validate(
            NETWORK | {"autoencoder": "a", "schedule": "cosine"}
        ),
        "latent flow": LayoutLatentDiffusionConfig.model_validate(
            NETWORK | {"autoencoder": "a"} | flow
        ),
    }
    paths = {}
    for kind, config in configs.items():
        torch.manual_seed(0)
        latent = isinstance(config, LayoutLatentDiffusionConfig)
        channels, cells = (2, SIZE // 2) if latent else (1, SIZE)
        denoiser = build_denoiser(config, channels, cells, spatial_dims=3)
        autoencoder = build_autoencoder(AUTOENCODER, 3)
        with torch.no_grad():
            for parameter in denoiser.parameters():  # MONAI starts output layers at zero
                if not parameter.any():
                    parameter.normal_(std=0.05)
        facts = BundleFacts(
            model=config,
            autoencoder=AUTOENCODER if latent else None,
            samples=SAMPLES,
            intensity="hu",
            sources=("phantom",),
            snapshot="0",
            patients={"train": 1},
            indicative=True,
            seen_samples=0,
        )
        paths[kind] = tmp_path_factory.mktemp("bundles") / kind.replace(" ", "_")
        encoder = autoencoder.state_dict() if latent else None
        save_bundle(paths[kind], facts, encoder, denoiser.state_dict())
    return paths


def sampler_of(path: Path, sampler: SamplerName, **changes: object) -> BundleSampler:
    settings = {"sampler": sampler, "num_inference_steps": 5, "batch_size": 2, "feather_px": 2}
    return BundleSampler(path, SamplingConfig.model_validate(settings | changes), seed=0)


def layout(lung: tuple[int, int] = (3, 13)) -> NDArray[np.uint8]:
    labels = np.full(SHAPE, Label.BODY, np.uint8)
    labels[2:14, lung[0] : lung[1], 4:12] = Label.LEFT_LUNG
    labels[7:10, 7:10, 7:10] = Label.NODULE
    return labels


def planned(labels: NDArray[np.uint8], hole: NDArray[np.bool_] | None) -> PlannedSample:
    known = {} if hole is None else {"known_hu": HU, "known_mask": ~hole}
    return PlannedSample("one", 7, Condition(labels, **known), -1)


@pytest.mark.parametrize(("kind", "sampler"), RUNS)
def test_outside_the_layout_voxels_are_the_references(
    bundles: dict[str, Path], kind: str, sampler: SamplerName
) -> None:
    labels = layout()
    hole = layout_hole(labels, ("lung", "nodule"))
    (drawn,) = sampler_of(bundles[kind], sampler).draw([planned(labels, hole)])
    assert np.array_equal(drawn[~hole], HU[~hole])
    assert np.mean(drawn[hole] != HU[hole]) > 0.9
    nothing = planned(labels, np.zeros(SHAPE, bool))
    assert np.array_equal(sampler_of(bundles[kind], sampler).draw([nothing])[0], HU)


@pytest.mark.parametrize(("kind", "sampler"), RUNS)
def test_where_all_is_hole_it_is_plain_sampling(
    bundles: dict[str, Path], kind: str, sampler: SamplerName
) -> None:
    drawer = sampler_of(bundles[kind], sampler)
    everything = planned(layout(), np.ones(SHAPE, bool))
    (plain,), (all_hole,) = (drawer.draw([one]) for one in (planned(layout(), None), everything))
    assert np.array_equal(plain, all_hole)


@pytest.mark.parametrize(("kind", "sampler"), RUNS)
def test_a_volume_does_not_depend_on_its_mates(
    bundles: dict[str, Path], kind: str, sampler: SamplerName
) -> None:
    several = []
    for number, lung in enumerate(((3, 13), (2, 9), (6, 14))):
        labels = layout(lung)
        hole = None if number == 1 else layout_hole(labels, ("lung", "nodule"))
        one = planned(labels, hole)
        several.append(replace(one, sample_id=str(number), seed=number))
    drawer = sampler_of(bundles[kind], sampler)
    together = drawer.draw(several)
    for hu, one in zip(together, several, strict=True):
        assert np.array_equal(sampler_of(bundles[kind], sampler).draw([one])[0], hu)


@pytest.mark.parametrize(("kind", "sampler"), RUNS)
def test_the_background_has_the_noise_of_every_step(
    bundles: dict[str, Path], kind: str, sampler: SamplerName
) -> None:
    """Its mean is alpha x, its variance sigma^2, and solvers keep one noise all the way."""
    drawer = sampler_of(bundles[kind], sampler)
    engine, space = drawer.engine(1.0), drawer.bundle.space
    labels = layout()
    one = planned(labels, layout_hole(labels, ("lung", "nodule")))
    known, keep = space.known(collate([one.condition], SIZE, 3), feather_px=2)
    schedule = NoiseSchedule.from_config(drawer.bundle.diffusion)
    # On many voxels: the variance is then known to a few percent.
    engine.admit(SampleRequest("one", 7, one.condition, sampler, 5))
    noise = torch.empty(drawer.bundle.latent_shape)
    noise.normal_(generator=torch.Generator().manual_seed(7))
    there = (keep[0, 0] == 1).expand(noise.shape)
    assert there.float().mean() > 0.3
    for timestep in (199, 149, 99, 49):  # five steps of 250, trailing
        engine.step()
        alpha, sigma = (level.float() for level in schedule.at(torch.tensor(timestep)))
        residual = (engine._x_t[0] - alpha * known[0])[there]
        if sampler == "ddpm":
            count, tolerance = residual.numel(), 5 * (2 / residual.numel()) ** 0.5
            assert abs(residual.mean().item()) <= 5 * sigma.item() / count**0.5
            variance = residual.square().mean().item()
            assert variance == pytest.approx(sigma.square().item(), rel=tolerance)
        else:
            torch.testing.assert_close(residual, sigma * noise[there], rtol=1e-4, atol=2e-4)


def test_feathers_lie_inside_the_hole() -> None:
    keep = torch.ones(1, 1, *SHAPE)
    keep[..., 4:12] = 0
    weights = feathered(keep, 2)
    assert torch.equal(weights == 1, keep == 1)
    profile = weights[0, 0, 8, 8]
    expected = [1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1]
    torch.testing.assert_close(profile, torch.tensor(expected))
    assert torch.equal(feathered(keep, 0), keep)


def test_what_is_in_the_hole_reaches_no_latent_that_is_kept(bundles: dict[str, Path]) -> None:
    space = sampler_of(bundles["latent"], "ddim").bundle.space
    labels = layout()
    hole = layout_hole(labels, ("lung", "nodule"))

    def known(hu: NDArray[np.int16]) -> Tensor:
        condition = Condition(labels, known_hu=hu, known_mask=~hole)
        latents, keep = space.known(collate([condition], SIZE, 3), feather_px=0)
        assert keep.sum() > 0
        return latents

    other = np.where(hole, HU[::-1], HU)
    assert torch.equal(known(HU), known(other))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            Condition(layout()[:8]),
            r"layout of shape \(8, 16, 16\): this model needs \(16, 16, 16\)",
        ),
        (Condition(np.full(SHAPE, Label.BODY, np.uint8)), "shows no lung or nodule"),
        (Condition(), "shows no lung or nodule"),
        (Condition(layout(), known_hu=HU[:, :8], known_mask=np.ones(SHAPE, bool)), "known_hu of"),
        (Condition(layout(), box=(1, 2, 3, 4)), "give six whole numbers"),
    ],
)
def test_bad_requests_are_refused_before_a_network_is_loaded(
    tmp_path: Path, bundles: dict[str, Path], condition: Condition, message: str
) -> None:
    path = tmp_path / "facts_alone"
    path.mkdir()
    (path / "bundle.json").write_bytes((bundles["pixel"] / "bundle.json").read_bytes())
    with pytest.raises(InputError, match=message):
        sampler_of(path, "ddim").draw([PlannedSample("one", 1, condition, -1)])


def test_an_engine_without_a_space_keeps_nothing(bundles: dict[str, Path]) -> None:
    drawer = sampler_of(bundles["pixel"], "ddim")
    bundle = drawer.bundle
    assert bundle.denoiser is not None
    engine = SamplingEngine(
        bundle.denoiser,
        NoiseSchedule.from_config(bundle.diffusion),
        "epsilon",
        bundle.latent_shape,
        SIZE,
        1,
    )
    condition = Condition(layout(), known_hu=HU, known_mask=np.ones(SHAPE, bool))
    with pytest.raises(InputError, match="give the engine a space"):
        engine.admit(SampleRequest("one", 1, condition, "ddim", 2))
