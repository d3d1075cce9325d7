from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from raysynth.config import AutoencoderKLConfig, ExperimentConfig
from raysynth.data.encode import encode
from raysynth.errors import InputError
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import load_bundle, save_bundle
from raysynth.models.facts import BundleFacts
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.validate import validate
from raysynth.window import normalize
from tests.data.tiny import tiny_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def latent_config(
    phantom_store: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory
) -> ExperimentConfig:
    """A latent diffusion recipe on a copy of the phantoms, and its untrained autoencoder."""
    work_dir = tmp_path_factory.mktemp("latents")
    shutil.copytree(phantom_store.store_url, work_dir / "store")
    torch.manual_seed(0)
    model = AutoencoderKLConfig(channels=(8, 8, 8), norm_num_groups=4)
    facts = BundleFacts(
        model=model,
        samples=phantom_store.data.samples,
        intensity="hu",
        sources=("phantom",),
        snapshot="none",
        patients={"train": 3, "val": 0, "test": 1},
        indicative=True,
        seen_samples=0,
    )
    path = work_dir / "bundles" / "kl"
    save_bundle(path, facts, build_autoencoder(model).state_dict())
    return latent_recipe(phantom_store.model_copy(update={"work_dir": work_dir}), path)


def latent_recipe(config: ExperimentConfig, autoencoder: Path) -> ExperimentConfig:
    model = {
        "family": "latent_diffusion",
        "autoencoder": autoencoder,
        "channels": (8, 8),
        "attention_levels": (False, False),
        "norm_num_groups": 4,
        "num_head_channels": 8,
    }
    return ExperimentConfig.model_validate({**config.model_dump(), "model": model})


def test_latents_are_what_the_autoencoder_makes_of_the_rows(
    latent_config: ExperimentConfig,
) -> None:
    summary = encode(latent_config)
    bundle = load_bundle(latent_config.autoencoder_path)
    root = open_root(latent_config.store_url)
    samples = SampleSet(open_group(root, "samples/slices"))
    latents = SampleSet(open_group(root, f"latents/slices/{bundle.digest[:12]}"))
    assert validate(latent_config.store_url, full=True) == []
    assert latents.count == samples.count == summary.samples
    assert latents.shape == summary.latent_shape == (4, 8, 8)

    hu, stored = samples.read("hu"), latents.read("latents")
    with torch.inference_mode():
        images = torch.from_numpy(normalize(hu, bundle.window_hu)[:, None])
        expected = bundle.autoencoder.encode(images).numpy()
    np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=1e-4)
    train = stored[samples.index["split"] == 0].astype(np.float64)
    assert summary.latent_scale == pytest.approx(1 / train.std(), rel=1e-6)

    again = encode(latent_config)
    assert (again.snapshot, again.latent_scale) == (summary.snapshot, summary.latent_scale)


def test_samples_unlike_the_training_images_are_refused(
    latent_config: ExperimentConfig, tmp_path: Path
) -> None:
    bundle = load_bundle(latent_config.autoencoder_path)
    finer = bundle.facts.samples.model_copy(update={"field_of_view_mm": 180.0})
    facts = bundle.facts.model_copy(update={"samples": finer})
    save_bundle(tmp_path / "kl", facts, bundle.autoencoder.state_dict())
    with pytest.raises(InputError, match=r"wants pixel_mm 5.625, samples 'slices' have 11.25"):
        encode(latent_recipe(latent_config, tmp_path / "kl"))


def test_only_a_latent_model_has_something_to_encode(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only models of latents"):
        encode(tiny_config(tmp_path))
