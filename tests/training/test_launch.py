from __future__ import annotations

import multiprocessing
import random
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.models.bundle import load_bundle
from raysynth.training.history import read_history
from raysynth.training.launch import train
from tests.store.conftest import make_store
from tests.training.conftest import DIFFUSION, recipe


def test_an_autoencoder_becomes_a_bundle(trained: Path) -> None:
    bundle = load_bundle(trained / "bundles" / "ae")
    assert bundle.denoiser is None
    assert bundle.window_hu == (-1000, 400)
    assert bundle.latent_shape == (2, 12, 12)
    assert bundle.facts.seen_samples == 64
    assert bundle.facts.indicative


def test_a_diffusion_model_takes_its_autoencoder_along(trained: Path) -> None:
    config = recipe(trained, "ldm", DIFFUSION)
    summary = train(config)
    assert summary.engine == "plain"
    assert summary.seen_samples == 64
    assert summary.final_loss == read_history(summary.history)[-1]["loss"]

    bundle = load_bundle(summary.bundle)
    assert bundle.digest == summary.digest
    assert bundle.denoiser is not None
    assert bundle.latent_scale != 1.0
    alone = load_bundle(trained / "bundles" / "ae").autoencoder.state_dict()
    for name, tensor in bundle.autoencoder.state_dict().items():
        assert torch.equal(tensor, alone[name])


def test_the_same_command_twice_is_done(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = recipe(trained, "twice")
    first = train(config)
    caplog.set_level("INFO")
    changed = (trained / "bundles" / "twice" / "bundle.json").stat().st_mtime_ns
    assert train(config) == first
    assert "is trained already" in caplog.text
    assert (trained / "bundles" / "twice" / "bundle.json").stat().st_mtime_ns == changed

    longer = train(recipe(trained, "twice", max_seen_samples=80))
    assert longer.seen_samples == 80
    assert read_history(longer.history)[7]["loss"] == first.final_loss
    shutil.rmtree(longer.bundle)
    assert train(recipe(trained, "twice", max_seen_samples=80)).digest == longer.digest


def test_another_recipe_of_the_same_name_is_refused(trained: Path) -> None:
    with pytest.raises(InputError, match=r"of another recipe .* give the recipe another name"):
        train(recipe(trained, "ae", learning_rate=5e-4))


def test_one_process_trains_a_recipe(trained: Path) -> None:
    (trained / "checkpoints" / "busy").mkdir(parents=True)
    with (
        FileLock(trained / "checkpoints" / "busy" / ".lock"),
        pytest.raises(InputError, match="another process trains into"),
    ):
        train(recipe(trained, "busy"))


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run ingest first"):
        train(recipe(tmp_path))
    make_store(str(tmp_path / "store"))
    with pytest.raises(InputError, match="train the model first"):
        train(recipe(tmp_path, "ldm", DIFFUSION))
    other = recipe(tmp_path).model_dump(mode="json")
    other["data"]["samples"]["name"] = "other"
    with pytest.raises(InputError, match="no samples/other: run shard first"):
        train(type(recipe(tmp_path)).model_validate(other))
    train(recipe(tmp_path, max_seen_samples=8))
    with pytest.raises(InputError, match=r"no latents .* run encode first"):
        train(recipe(tmp_path, "ldm", DIFFUSION))


@pytest.mark.ray
def test_a_machine_too_small_is_not_waited_for(trained: Path, local_ray: None) -> None:
    with pytest.raises(InputError, match=r"wants 1 GPU and this machine offers 0"):
        train(recipe(trained, "gpu", use_gpu=True))
    with pytest.raises(InputError, match=r"wants 4 CPU"):
        train(recipe(trained, "cpus", num_workers=2, threads_per_worker=2))


LONG = {"max_seen_samples": 320, "checkpoint_every": 40, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def alone(trained: Path) -> list[float]:
    """The curve of one worker in this process."""
    summary = train(recipe(trained, "alone", **LONG))
    return [point["loss"] for point in read_history(summary.history)]


class Killer(threading.Thread):
    """Kills rank 0 as soon as the run has a checkpoint."""

    def __init__(self, work_dir: Path, name: str) -> None:
        super().__init__(daemon=True)
        self.checkpoints = work_dir / "checkpoints" / name
        self.history = str(work_dir / "logs" / name / "history.jsonl")
        self.killed = 0

    def run(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not self.killed:
            time.sleep(0.005)
            if any(self.checkpoints.glob("seen-*")):
                for process in psutil.process_iter():
                    if process.pid != psutil.Process().pid and self._writes(process):
                        self.first = (self.checkpoints / "seen-000000000040").stat().st_ino
                        process.kill()
                        self.killed = process.pid

    def _writes(self, process: psutil.Process) -> bool:
        try:
            return any(file.path == self.history for file in process.open_files())
        except psutil.Error:
            return False


@pytest.mark.ray
def test_two_workers_equal_one_even_if_one_is_killed(
    trained: Path, local_ray: None, alone: list[float]
) -> None:
    killer = Killer(trained, "ddp")
    killer.start()
    summary = train(recipe(trained, "ddp", num_workers=2, **LONG))
    assert killer.killed
    assert summary.engine == "ddp"
    points = read_history(summary.history)
    assert [point["seen_samples"] for point in points] == list(range(8, 321, 8))
    assert [point["loss"] for point in points] == pytest.approx(alone, abs=1e-5)
    # It went on from a checkpoint: the first one was not written a second time.
    assert (killer.checkpoints / "seen-000000000040").stat().st_ino == killer.first


@pytest.mark.ray
def test_deepspeed_equals_one_worker(trained: Path, local_ray: None, alone: list[float]) -> None:
    settings = {"num_workers": 2, "engine": "deepspeed", "zero_stage": 2}
    summary = train(recipe(trained, "zero2", **settings))
    assert summary.engine == "deepspeed"
    losses = [point["loss"] for point in read_history(summary.history)]
    assert losses == pytest.approx(alone[:8], abs=1e-5)
    with pytest.raises(InputError, match="go on with that engine"):
        train(recipe(trained, "zero2", num_workers=1, max_seen_samples=80))


def _train(config: ExperimentConfig) -> None:
    train(config)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_the_same(trained: Path) -> None:
    """Every other kill hits the writing of a checkpoint."""
    settings = {"max_seen_samples": 1600, "checkpoint_every": 40, "keep_checkpoints": 2}
    unbroken = read_history(train(recipe(trained, "unbroken", **settings)).history)
    config = recipe(trained, "killed", **settings)
    checkpoints = trained / "checkpoints" / "killed"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["raysynth.training.launch"])
    chance = random.Random(0)
    hit_writing = 0
    for kill in range(10):
        at_start = _seen(checkpoints)
        process = processes.Process(target=_train, args=(config,))
        process.start()
        while _seen(checkpoints) == at_start:  # it gets a little further every time
            assert process.is_alive()
            time.sleep(0.001)
        if kill % 2:
            time.sleep(chance.random() / 4)
        else:
            while process.is_alive() and not any(checkpoints.glob(".writing-*")):
                pass
        process.kill()
        process.join()
        hit_writing += any(checkpoints.glob(".writing-*"))
    assert _seen(checkpoints) < 1600
    assert hit_writing >= 3
    again = read_history(train(config).history)
    assert [p["loss"] for p in again] == pytest.approx([p["loss"] for p in unbroken], abs=1e-6)


def _seen(checkpoints: Path) -> int:
    """Samples of the newest committed checkpoint."""
    try:
        return int((checkpoints / "latest").read_text().removeprefix("seen-"))
    except FileNotFoundError:
        return 0
