"""Ingest and shard into a bucket, by Ray's workers, give what they give in a folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from raysynth.config import ExperimentConfig
from raysynth.store.validate import validate
from tests.data.tiny import content

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUN = """
import sys
from pathlib import Path
from raysynth.config import ExperimentConfig
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.session import connect

config = ExperimentConfig.model_validate_json(sys.argv[1])
with connect(num_cpus=2):
    ingest(config)
    shard(config)
    assert ingest(config).added == 0
"""


def test_a_store_in_a_bucket_equals_one_in_a_folder(
    phantom_store: ExperimentConfig, s3_url: str
) -> None:
    values = json.loads(phantom_store.model_dump_json()) | {"store": s3_url}
    # A cluster of its own: workers have the environment that their node started with.
    subprocess.run([sys.executable, "-c", RUN, json.dumps(values)], check=True, timeout=300)
    assert validate(s3_url, full=True) == []
    assert content(s3_url) == content(phantom_store.store_url)
