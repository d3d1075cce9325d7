"""Draws a tiny run in a process that is killed where it is told to be.

Run as `python -m tests.sampling.crashing_run WORK_DIR PLACE COUNT`, like `tests.data.crashing_run`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.benchmarks import random_bundle
from raysynth.config import ExperimentConfig
from raysynth.sampling.batch import synthesize
from raysynth.session import connect
from tests.data.crashing_run import arm
from tests.data.tiny import tiny_config

MODEL = {
    "family": "latent_diffusion",
    "autoencoder": "bundles/none",
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 4,
}


def drawing_config(work_dir: Path, **sampling: object) -> ExperimentConfig:
    """A recipe of two shards of samples and their controls, four steps each."""
    values = {
        "num_samples": 70,
        "num_inference_steps": 4,
        "nodule_free": 0.1,
        "batch_size": 8,
        "num_actors": 2,
    }
    return ExperimentConfig.model_validate(
        tiny_config(work_dir).model_dump() | {"model": MODEL, "sampling": values | sampling}
    )


def make_bundle(config: ExperimentConfig) -> None:
    """A bundle of random weights: what is drawn shows nothing, but is drawn all the same."""
    random_bundle.make_bundle(config, config.bundle_path, tiny_config(config.work_dir).model)


if __name__ == "__main__":
    arm(sys.argv[2], int(sys.argv[3]))
    with connect(num_cpus=2):
        synthesize(drawing_config(Path(sys.argv[1])))
