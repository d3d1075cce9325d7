"""What diffusers loads of an exported model computes what ours computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel
from torch import nn

from raysynth.config import ExperimentConfig, LayoutDiffusionConfig
from raysynth.config.model import TextDiffusionConfig
from raysynth.diffusion.schedule import build_schedule
from raysynth.errors import InputError
from raysynth.export.diffusers import _save, converted_unet, export_diffusers
from raysynth.export.diffusers import scheduler as scheduler_of
from raysynth.export.verify import verify
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import load_bundle, save_bundle
from raysynth.models.denoiser import build_denoiser
from tests.export.test_bundle import _put_run, config  # noqa: F401 - a fixture
from tests.models.test_bundle import AUTOENCODERS, DIFFUSION
from tests.models.test_bundle import facts as _facts

SHAPE: dict[str, Any] = {
    "channels": (16, 32, 32),
    "attention_levels": (False, False, True),
    "num_res_blocks": 2,
    "num_head_channels": 16,
    "norm_num_groups": 8,
}
NETWORKS = {
    "tokens": (DIFFUSION, 4),
    "channels": (DIFFUSION.model_copy(update={"conditioning": 1}), 4),
    "layout": (LayoutDiffusionConfig(**SHAPE), 1),
    "text": (TextDiffusionConfig(**SHAPE, autoencoder="elsewhere"), 4),
}


def _stirred(network: nn.Module) -> nn.Module:
    """Without the zeros that networks start with, under which much would look equal."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_converted_networks_compute_the_same(name: str) -> None:
    model, channels = NETWORKS[name]
    ours: Any = _stirred(build_denoiser(model, channels, 8)).unet
    theirs = converted_unet(ours, 8)
    x, timestep = torch.randn(2, ours.in_channels, 16, 16), torch.tensor([3, 700])
    if ours.with_conditioning:
        width = theirs.config.cross_attention_dim
        context = torch.randn(2, 5, width)
        labels = torch.randn(2, width) if name == "text" else None
        expected = ours(x, timestep, context=context, class_labels=labels)
        found = theirs(x, timestep, context, class_labels=labels).sample
    else:
        expected, found = ours(x, timestep), theirs(x, timestep).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_schedules_hold_the_same_noise(name: str) -> None:
    model = DIFFUSION.model_copy(update={"schedule": name})
    alphas = scheduler_of(model).alphas_cumprod.sqrt().double()
    torch.testing.assert_close(alphas, build_schedule(name).alphas, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_bundle_becomes_a_folder_of_diffusers(
    config: ExperimentConfig,  # noqa: F811
    tmp_path: Path,
) -> None:
    bundle = load_bundle(config.bundle_path)
    _put_run(config, bundle.digest, "passed")
    with pytest.raises(InputError, match="run `raysynth evaluate` first"):
        export_diffusers(config, tmp_path / "out")
    (config.work_dir / "evaluation").mkdir()
    found = json.dumps({"metrics": {}, "adherence": {}})
    (config.work_dir / "evaluation" / "run.json").write_text(found)
    released = export_diffusers(config, tmp_path / "out")
    assert released.parts == (
        "autoencoder.safetensors",
        "scheduler",
        "unet",
        "conditioner.safetensors",
    )
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    assert DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    ours: Any = bundle.denoiser
    x = torch.randn(1, ours.unet.in_channels, 8, 8)
    context = torch.randn(1, 3, unet.config.cross_attention_dim)
    expected = ours.unet(x, torch.tensor([5]), context=context)
    torch.testing.assert_close(unet(x, 5, context).sample, expected, rtol=1e-4, atol=1e-5)
    assert {one.verdict for one in verify(tmp_path / "out")} == {"valid"}
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    [wrong] = [one for one in verify(tmp_path / "out") if one.verdict != "valid"]
    assert Path(wrong.path) == weights


@torch.no_grad()
def test_an_autoencoder_of_diffusers_is_left_as_it_is(tmp_path: Path) -> None:
    ours: Any = build_autoencoder(AUTOENCODERS["vq"])
    facts = _facts(DIFFUSION, autoencoder=AUTOENCODERS["vq"], latent_scale=0.5)
    channels, size, *_ = facts.latent_shape
    denoiser = build_denoiser(DIFFUSION, channels, size)
    save_bundle(tmp_path / "bundle", facts, ours.state_dict(), denoiser.state_dict())
    assert "vae" in list(_save(load_bundle(tmp_path / "bundle"), tmp_path / "out"))
    vae: Any = VQModel.from_pretrained(tmp_path / "out", subfolder="vae")
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(vae.encode(x).latents, ours.network.encode(x).latents)
    assert vae.config.scaling_factor == 0.5
