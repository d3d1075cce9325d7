"""A tiny recipe, and a store that was made by it once."""

from __future__ import annotations

import pytest

from raysynth.config import ExperimentConfig
from tests.data.tiny import tiny_config


@pytest.fixture(scope="session")
def phantom_store(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> ExperimentConfig:
    """The recipe of a store with four phantoms and the slices cut from them. Read it only."""
    from raysynth.data.ingest import ingest
    from raysynth.data.shard import shard

    config = tiny_config(tmp_path_factory.mktemp("phantoms"))
    ingest(config)
    shard(config)
    return config
