"""Streams of metrics, as Ray Serve calls them: from many threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from raysynth.serving.metrics import MetricsKeeper
from tests.sampling.crashing_run import drawing_config


def test_samples_that_come_at_once_are_counted_once_each(tmp_path: Path) -> None:
    config = drawing_config(tmp_path)
    keeper = MetricsKeeper(config, tmp_path / "metrics")
    rng = np.random.default_rng(0)
    hu = rng.normal(0, 200, (64, *config.samples.shape)).astype(np.int16)
    keeper.create("someone", "trial", "sent")
    keeper.push("someone", "trial", "real", None, hu=hu)
    fresh = MetricsKeeper(config, tmp_path / "metrics")  # all threads find it unopened

    def push(row: int) -> int:
        new = fresh.push("someone", "trial", "synthetic", None, hu=hu[row : row + 1])
        fresh.read("someone", "trial")
        return new

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(push, range(len(hu)))) == [1] * len(hu)
    told = fresh.read("someone", "trial")
    assert told["counts"] == {"real": 64, "synthetic": 64}
    assert MetricsKeeper(config, tmp_path / "metrics").read("someone", "trial") == told
    fid = next(value for key, value in told["metrics"].items() if key.startswith("fid/"))
    assert abs(fid["value"]) < 1e-3  # the same samples, in whatever order
