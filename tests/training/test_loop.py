from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

from raysynth.errors import InputError, RaysynthError
from raysynth.training.history import read_history
from raysynth.training.loop import Outcome
from raysynth.training.objectives import Batch
from tests.training.tiny import ArrayStream, files_in, fit_tiny, tiny_config


class Interrupted(Exception):
    """Stands for a kill."""


class BreakingStream(ArrayStream):
    """Ends without warning at one position."""

    def __init__(self, global_batch_size: int, last: int) -> None:
        super().__init__(global_batch_size)
        self.last = last

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        for batch in super().batches(seen_samples):
            if batch["position"][0] >= self.last:
                raise Interrupted
            yield batch


def curve(folder: Path) -> list[dict[str, float]]:
    """What a history must say again after a resume."""
    names = ("seen_samples", "step", "loss", "kl", "grad_norm", "learning_rate")
    points = read_history(folder / "log" / "history.jsonl")
    return [{name: point[name] for name in names} for point in points]


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one.now.loss == pytest.approx(other.now.loss, abs=1e-6)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(tensor, other.weights[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, fit_tiny(folder, tiny_config())


def test_one_batch_is_learned(tmp_path: Path) -> None:
    config = tiny_config(max_seen_samples=8 * 100, learning_rate=3e-3, checkpoint_every=800)
    stream = ArrayStream(8, num_slices=8)
    stream.hu[:] = np.linspace(-900, 300, 16).astype(np.int16)  # every row the same ramp
    fit_tiny(tmp_path, config, stream=stream)
    losses = [point["loss"] for point in curve(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


def test_history_and_board_hold_every_interval(unbroken: tuple[Path, Outcome]) -> None:
    folder, outcome = unbroken
    points = read_history(folder / "log" / "history.jsonl")
    assert [point["seen_samples"] for point in points] == list(range(8, 65, 8))
    assert points[0]["learning_rate"] == pytest.approx(5e-4)  # half-way through the warm-up
    assert points[-1]["loss"] == outcome.now.loss
    assert outcome.samples_per_s > 0
    assert any((folder / "log").glob("events.out.tfevents.*"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, unbroken: tuple[Path, Outcome]
) -> None:
    with pytest.raises(Interrupted):  # 8 samples behind the checkpoint at 32
        fit_tiny(tmp_path, tiny_config(), stream=BreakingStream(8, last=40))
    resumed = fit_tiny(tmp_path, tiny_config())
    assert_same(resumed, unbroken[1])
    assert curve(tmp_path) == curve(unbroken[0])


def test_a_damaged_checkpoint_costs_an_interval_and_no_more(
    tmp_path: Path, unbroken: tuple[Path, Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    fit_tiny(tmp_path, tiny_config(max_seen_samples=48))
    newest = tmp_path / "checkpoints" / "seen-000000000048" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed = fit_tiny(tmp_path, tiny_config())
    assert "rank-00000.safetensors does not match its SHA-256" in caplog.text
    assert_same(resumed, unbroken[1])
    assert curve(tmp_path) == curve(unbroken[0])


def test_micro_batches_change_nothing(tmp_path: Path, unbroken: tuple[Path, Outcome]) -> None:
    split = fit_tiny(tmp_path, tiny_config(micro_batch_size=2))
    assert split.now.loss == pytest.approx(unbroken[1].now.loss, abs=1e-5)


def test_a_finished_run_can_be_made_longer(tmp_path: Path, unbroken: tuple[Path, Outcome]) -> None:
    first = fit_tiny(tmp_path, tiny_config(max_seen_samples=32))
    again = fit_tiny(tmp_path, tiny_config(max_seen_samples=32))
    assert again.now == first.now
    assert_same(fit_tiny(tmp_path, tiny_config()), unbroken[1])


def test_the_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    fit_tiny(tmp_path, tiny_config(max_seen_samples=16))
    with pytest.raises(InputError, match="of another recipe"):
        fit_tiny(tmp_path, tiny_config(), files=files_in(tmp_path, "other"))


def test_time_is_up(tmp_path: Path) -> None:
    outcome = fit_tiny(tmp_path, tiny_config(max_seen_samples=10**6, max_seconds=0.3))
    assert 8 <= outcome.now.seen_samples < 10**5
    assert (tmp_path / "checkpoints" / "latest").exists()


def test_bf16_follows_fp32_and_leaves_no_trace(
    tmp_path: Path, unbroken: tuple[Path, Outcome]
) -> None:
    half = fit_tiny(tmp_path / "bf16", tiny_config(precision="bf16"))
    assert half.now.loss == pytest.approx(unbroken[1].now.loss, abs=0.02)
    assert half.now.loss != unbroken[1].now.loss
    assert all(tensor.dtype == torch.float32 for tensor in half.weights.values())
    assert_same(fit_tiny(tmp_path / "fp32", tiny_config()), unbroken[1])


class DamagedObjective:
    """The tiny autoencoder, but the loss of some positions is not a number."""

    def __init__(self, first: int, stop: int) -> None:
        from tests.training.tiny import tiny_objective

        self.first, self.stop = first, stop
        self.inner = tiny_objective()
        self.module, self.columns = self.inner.module, self.inner.columns

    def loss(self, module, batch, device):  # type: ignore[no-untyped-def]
        terms = self.inner.loss(module, batch, device)
        bad = self.first <= batch["position"][0] < self.stop
        return {name: term * (math.nan if bad else 1.0) for name, term in terms.items()}

    def preview(self, module, batch, device):  # type: ignore[no-untyped-def]
        return self.inner.preview(module, batch, device)


def test_a_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    outcome = fit_tiny(tmp_path, tiny_config(), objective=DamagedObjective(16, 32))
    assert outcome.now.skipped_steps == 2
    assert all(tensor.isfinite().all() for tensor in outcome.weights.values())
    points = read_history(tmp_path / "log" / "history.jsonl")
    assert len(points) == 8
    assert [point["seen_samples"] for point in points if "loss" not in point] == [24, 32]
    assert all(math.isfinite(point["loss"]) for point in points if "loss" in point)
    assert "NaN" not in (tmp_path / "log" / "history.jsonl").read_text()


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    config = tiny_config(max_seen_samples=800)
    with pytest.raises(RaysynthError, match=r"10 steps in a row .* lower training.learning_rate"):
        fit_tiny(tmp_path, config, objective=DamagedObjective(16, 800))
