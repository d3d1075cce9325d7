"""A tiny autoencoder on random slices: seconds, not minutes."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysynth.config import AutoencoderKLConfig, TrainingConfig
from raysynth.models.autoencoder import build_autoencoder
from raysynth.training.context import LocalContext
from raysynth.training.loop import Outcome, RunFiles, fit
from raysynth.training.objectives import AutoencoderObjective, Batch

WINDOW_HU = (-1000.0, 400.0)
MODEL = AutoencoderKLConfig(
    window_hu=WINDOW_HU,
    channels=(8, 8),
    num_res_blocks=1,
    norm_num_groups=4,
    latent_channels=2,
    kl_weight=1e-4,
)


class ArrayStream:
    """Batches of 16 slices in memory, over and over."""

    def __init__(self, global_batch_size: int, num_slices: int = 16, *, damaged: bool = False):
        random = np.random.default_rng(0)
        self.hu = random.integers(-1000, 400, (num_slices, 16, 16)).astype(np.int16)
        self.global_batch_size, self.damaged = global_batch_size, damaged

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        while True:
            position = np.arange(seen_samples, seen_samples + self.global_batch_size)
            yield {"position": position, "hu": self.hu[position % len(self.hu)]}
            seen_samples += self.global_batch_size


def tiny_objective() -> AutoencoderObjective:
    torch.manual_seed(0)
    return AutoencoderObjective(build_autoencoder(MODEL), WINDOW_HU, (2, 8, 8), seed=0)


def tiny_config(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "global_batch_size": 8,
        "max_seen_samples": 64,
        "checkpoint_every": 16,
        "log_every": 8,
        "learning_rate": 1e-3,
        "warmup_samples": 16,
        "ema_decay": 0.9,
    }
    return TrainingConfig(**values | changes)


def files_in(folder: Path, fingerprint: str = "recipe") -> RunFiles:
    return RunFiles(folder / "checkpoints", folder / "log", fingerprint, snapshot="none")


def fit_tiny(folder: Path, config: TrainingConfig, **changes: Any) -> Outcome:
    objective = changes.get("objective") or tiny_objective()
    stream = changes.get("stream") or ArrayStream(config.global_batch_size)
    files = changes.get("files") or files_in(folder)
    return fit(objective, stream, config, LocalContext(), files)
