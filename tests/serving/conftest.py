"""A bundle of random weights that is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.config import ExperimentConfig
from tests.sampling.crashing_run import drawing_config, make_bundle


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A recipe whose bundle is there; of eight slots and four steps."""
    config = drawing_config(Path(tmp_path_factory.mktemp("served")))
    make_bundle(config)
    return config
