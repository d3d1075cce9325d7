from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raysynth.training.engines import choose_engine
from tests.training.tiny import fit_tiny, tiny_config


def test_auto_takes_the_simplest_engine() -> None:
    assert choose_engine(tiny_config())[0] == "plain"
    assert choose_engine(tiny_config(num_workers=2))[0] == "ddp"
    name, reason = choose_engine(tiny_config(engine="deepspeed", zero_stage=3))
    assert name == "deepspeed"
    assert "ZeRO-3" in reason


@pytest.mark.slow
def test_every_engine_on_two_workers_equals_one(tmp_path: Path) -> None:
    extensions = tmp_path / "extensions"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "tests.training.two_workers", str(tmp_path)),
        ],
        check=True,
        timeout=500,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1"},
    )
    assert not extensions.exists()  # DeepSpeed compiled nothing
    alone = fit_tiny(tmp_path / "alone", tiny_config())
    total = sum(float(tensor.double().abs().sum()) for tensor in alone.weights.values())
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 8
    for name, (loss, weights) in results.items():
        tolerance = 1e-2 if "bf16" in name else 1e-5
        assert loss == pytest.approx(alone.now.loss, abs=tolerance), name
        assert weights == pytest.approx(total, rel=tolerance), name
