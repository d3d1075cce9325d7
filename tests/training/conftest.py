"""A store with random slices, and recipes that train on it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from raysynth.config import ExperimentConfig
from raysynth.models.bundle import load_bundle
from raysynth.store.reader import SampleSet
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, write_rows
from raysynth.training.launch import train
from raysynth.window import normalize
from storage_schema.v1 import latents
from tests.store.conftest import COUNT, SIZE, make_store

TRAINING: dict[str, Any] = {
    "global_batch_size": 8,
    "max_seen_samples": 64,
    "checkpoint_every": 16,
    "log_every": 8,
    "learning_rate": 1e-3,
    "open_shards": 2,
    "ema_decay": 0.9,
}
AUTOENCODER = {
    "family": "autoencoder_kl",
    "window_hu": (-1000, 400),
    "channels": (8, 8),
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "latent_channels": 2,
}
EXTRACTOR = {
    "family": "extractor",
    "window_hu": (-1000, 400),
    "channels": (8, 16),
    "feature_dim": 6,
    "embedding_dim": 12,
}
DIFFUSION = {
    "family": "latent_diffusion",
    "autoencoder": "bundles/ae",
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 4,
    "num_train_timesteps": 100,
}


def recipe(
    work_dir: Path, name: str = "ae", model: dict[str, Any] = AUTOENCODER, **training: Any
) -> ExperimentConfig:
    """A tiny recipe; keywords change its training section."""
    return ExperimentConfig.model_validate(
        {
            "name": name,
            "work_dir": work_dir,
            "data": {"samples": {"size": SIZE, "field_of_view_mm": 36.0}},
            "model": model,
            "training": TRAINING | training,
        }
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work_dir with a store, a trained autoencoder `ae`, and its latents."""
    work_dir = tmp_path_factory.mktemp("trained")
    make_store(str(work_dir / "store"))
    summary = train(recipe(work_dir))
    bundle = load_bundle(summary.bundle)
    samples = SampleSet(open_root(work_dir / "store")["samples/slices"])
    import torch

    with torch.inference_mode():
        images = torch.from_numpy(normalize(samples.read("hu"), bundle.window_hu))
        encoded = bundle.autoencoder.encode(images[:, None]).numpy().astype(np.float16)
    path = f"latents/slices/{summary.digest[:12]}"
    attributes = {
        "latent_scale": float(1 / encoded.astype(np.float64).std()),
        "bundle": summary.digest,
        "parent_snapshot": "none",
    }

    def build(root: zarr.Group) -> None:
        group = create_sample_set(root, path, latents(COUNT, encoded.shape[1:]), attributes)
        write_rows(group, 0, {"latents": encoded})

    with StoreRun(str(work_dir / "store"), "encode", "1") as run:
        run.declare(build, "Latents")
        run.publish("encoded")
    return work_dir
