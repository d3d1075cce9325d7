"""The phantom store of the data tests, with a bundle of random weights beside it."""

from __future__ import annotations

import pytest

from raysynth.config import ExperimentConfig
from tests.data.conftest import phantom_store
from tests.sampling.crashing_run import drawing_config, make_bundle

__all__ = ["phantom_store"]


@pytest.fixture(scope="session")
def drawing(phantom_store: ExperimentConfig) -> ExperimentConfig:
    """A recipe that can be drawn from. Its store is changed by nobody but its own run."""
    config = drawing_config(phantom_store.work_dir)
    make_bundle(config)
    return config
