from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raysynth.training.history import read_history
from tests.training.tiny import fit_tiny, tiny_config
from tests.training.two_workers import FIRST, LAST


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    plain = fit_tiny(tmp_path / "plain", tiny_config())
    compiled = fit_tiny(tmp_path / "compiled", tiny_config(compile=True))
    assert compiled.now.loss == pytest.approx(plain.now.loss, abs=1e-4)
    for name, tensor in compiled.weights.items():
        torch.testing.assert_close(tensor, plain.weights[name], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_every_engine_on_two_workers_equals_one(tmp_path: Path) -> None:
    """Alone, and where each goes on from another's checkpoint, on one worker or two."""
    fit_tiny(tmp_path / "chain", tiny_config(max_seen_samples=FIRST))
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
    assert LAST == 64
    chained = fit_tiny(tmp_path / "chain", tiny_config(max_seen_samples=80))
    straight = fit_tiny(tmp_path / "straight", tiny_config(max_seen_samples=80))
    curves = [
        [point["loss"] for point in read_history(tmp_path / name / "log" / "history.jsonl")]
        for name in ("chain", "straight")
    ]
    assert len(curves[0]) == 10
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    for name, tensor in chained.weights.items():
        torch.testing.assert_close(tensor, straight.weights[name], rtol=0, atol=1e-5)
    total = sum(float(tensor.double().abs().sum()) for tensor in alone.weights.values())
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 8
    for name, (loss, weights) in results.items():
        tolerance = 1e-2 if "bf16" in name else 1e-5
        assert loss == pytest.approx(alone.now.loss, abs=tolerance), name
        assert weights == pytest.approx(total, rel=tolerance), name
