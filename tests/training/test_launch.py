from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from raysynth.config import ExperimentConfig
from raysynth.data.encode import encode
from raysynth.errors import InputError, Stopped
from raysynth.models.bundle import load_bundle
from raysynth.sampling.draw import BundleSampler
from raysynth.training import loop
from raysynth.training.history import History, read_history
from raysynth.training.launch import _ray_worker, train
from raysynth.training.loop import RunFiles
from raysynth.training.worker import RunPlan, _check_folder
from tests.store.conftest import make_store
from tests.training.conftest import AUTOENCODER, DIFFUSION, EXTRACTOR, recipe


def test_an_autoencoder_becomes_a_bundle(trained: Path) -> None:
    bundle = load_bundle(trained / "bundles" / "ae")
    assert bundle.denoiser is None
    assert bundle.window_hu == (-1000, 400)
    assert bundle.latent_shape == (2, 12, 12)
    assert bundle.facts.seen_samples == 64
    assert bundle.facts.indicative


def test_a_discriminator_trains_an_autoencoder_and_is_gone(trained: Path) -> None:
    adversarial = {"adversarial_weight": 0.1, "discriminator_channels": 4}
    summary = train(recipe(trained, "sharp", AUTOENCODER | adversarial))
    logged = read_history(summary.history)[-1]
    assert {"reconstruction", "kl", "generator", "discriminator"} <= logged.keys()
    sharp, plain = (load_bundle(trained / "bundles" / name).autoencoder for name in ("sharp", "ae"))
    assert sharp.state_dict().keys() == plain.state_dict().keys()


def test_an_extractor_keeps_its_encoder_alone(trained: Path) -> None:
    config = recipe(trained, "features", EXTRACTOR)
    logged = read_history(train(config).history)[-1]
    assert {"invariance", "variance", "covariance", "degradation"} <= logged.keys()
    bundle = load_bundle(config.bundle_path)
    assert (bundle.autoencoder, bundle.denoiser, bundle.generator) == (None,) * 3
    assert bundle.encoder is not None
    files = sorted(file.name for file in config.bundle_path.iterdir())
    assert files == ["bundle.json", "card.md", "encoder.safetensors"]
    assert bundle.facts.snapshot != ""
    assert "draws" not in (config.bundle_path / "card.md").read_text()
    # What its normalisation measured is kept beside the weights.
    assert bundle.encoder.norm.running_mean.abs().min() > 0


def test_an_extractor_neither_draws_nor_encodes(trained: Path) -> None:
    config = recipe(trained, "no_latents", EXTRACTOR)
    train(config)
    with pytest.raises(InputError, match="no_latents is a extractor, which draws nothing"):
        BundleSampler(config.bundle_path, config.sampling, seed=0)
    latent = recipe(trained, "ldm_of_it", DIFFUSION | {"autoencoder": "bundles/no_latents"})
    with pytest.raises(InputError, match="no_latents is a extractor, which has no latents"):
        train(latent)
    with pytest.raises(InputError, match="no_latents is a extractor, which has no latents"):
        encode(latent)


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
def test_a_machine_too_small_is_not_waited_for(
    trained: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"wants 4 CPU and this machine offers 2"):
        train(recipe(trained, "cpus", num_workers=2, threads_per_worker=2))
    # The machine under this test may have a GPU.
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(InputError, match=r"wants 1 GPU and this machine offers 0"):
        train(recipe(trained, "gpu", use_gpu=True))


LONG = {"max_seen_samples": 320, "checkpoint_every": 40, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def alone(trained: Path) -> list[float]:
    """The curve of one worker in this process."""
    summary = train(recipe(trained, "alone", **LONG))
    return [point["loss"] for point in read_history(summary.history)]


def killed_once(steps: Path) -> Callable[[dict[str, Any]], object]:
    """What each worker of a group runs: rank 0 of the first attempt dies between two checkpoints.

    Args:
        steps: a file to which rank 0 adds the `seen_samples` of every step that it has done.
    """

    # Ray ships a function inside a function as it is: its workers need not import this module.
    def run(settings: dict[str, Any]) -> object:
        first_attempt, advance = not steps.exists(), History.advance

        def advance_or_die(history: History, seen_samples: int, loss: float | None) -> None:
            advance(history, seen_samples, loss)
            with steps.open("a") as file:
                file.write(f"{seen_samples}\n")
            if first_attempt and seen_samples == 64:
                while not (settings["plan"].files.checkpoints / "latest").exists():
                    time.sleep(0.01)  # the checkpoint after 40 may still be on its way to the disk
                os.kill(os.getpid(), signal.SIGKILL)

        History.advance = advance_or_die
        return _ray_worker(settings)

    return run


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_equal_one_even_if_one_is_killed(
    trained: Path,
    local_ray: None,
    alone: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = tmp_path / "steps"
    monkeypatch.setattr("raysynth.training.launch._ray_worker", killed_once(steps))
    summary = train(recipe(trained, "ddp", num_workers=2, **LONG))
    assert summary.engine == "ddp"
    # Killed after 64 samples, it went on from the checkpoint after 40.
    done = [int(line) for line in steps.read_text().split()]
    assert done == [*range(8, 65, 8), *range(48, 321, 8)]
    points = read_history(summary.history)
    assert [point["seen_samples"] for point in points] == list(range(8, 321, 8))
    assert [point["loss"] for point in points] == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_deepspeed_equals_one_worker(trained: Path, local_ray: None, alone: list[float]) -> None:
    settings = {"num_workers": 2, "engine": "deepspeed", "zero_stage": 2}
    summary = train(recipe(trained, "zero2", **settings))
    assert summary.engine == "deepspeed"
    losses = [point["loss"] for point in read_history(summary.history)]
    assert losses == pytest.approx(alone[:8], abs=1e-5)
    plain = train(recipe(trained, "zero2", num_workers=1, max_seen_samples=80))
    assert plain.engine == "plain"
    losses = [point["loss"] for point in read_history(plain.history)]
    assert losses == pytest.approx(alone[:10], abs=1e-5)


IN_WRITING = [
    ("open", r"/\.writing-seen-\d+/rank-00000\.safetensors$", 1),
    ("open", r"/\.writing-seen-\d+/manifest\.json$", 1),
    ("os.rename", r"/\.writing-seen-\d+$", 1),
    ("os.rename", r"/\.writing-latest$", 1),  # the checkpoint is whole, and not pointed to
    ("os.rmdir", r"/seen-\d+$", 2),  # it is the newest, and the oldest one is half deleted
]
"""What Python is about to do to which path, and checkpoints that are committed by then."""


def train_and_die_writing(config: ExperimentConfig, event: str, path: str) -> None:
    """Trains, and dies by SIGKILL in the writing of its second checkpoint."""
    times = 0

    def count(seen: str, arguments: tuple[object, ...]) -> None:
        nonlocal times
        if seen == event:
            times += re.search(path, str(arguments[0])) is not None
            if times == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train(config)


def train_and_die_after(config: ExperimentConfig, seen_samples: int) -> None:
    """Trains, and dies by SIGKILL at the end of the step that reaches `seen_samples`."""
    advance = History.advance

    def advance_or_die(history: History, seen: int, loss: float | None) -> None:
        advance(history, seen, loss)
        if seen == seen_samples:
            every = config.training.checkpoint_every
            while _seen(config) < (seen - 1) // every * every:
                time.sleep(0.01)  # the last checkpoint may still be on its way to the disk
            os.kill(os.getpid(), signal.SIGKILL)

    History.advance = advance_or_die
    train(config)


def train_and_be_told_to_stop(config: ExperimentConfig, seen_samples: int) -> None:
    """Trains, and gets SIGTERM at the end of the step that reaches `seen_samples`."""
    advance = History.advance

    def advance_and_signal(history: History, seen: int, loss: float | None) -> None:
        advance(history, seen, loss)
        if seen == seen_samples:
            os.kill(os.getpid(), signal.SIGTERM)

    History.advance = advance_and_signal
    loop.NOTICE_EVERY_S = 0.0  # asks after every step
    with pytest.raises(Stopped, match=r"asked to end after .* run the same command to go on"):
        train(config)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_first(trained: Path, alone: list[float]) -> None:
    config = recipe(trained, "told", **LONG)
    child = multiprocessing.get_context("spawn").Process(
        target=train_and_be_told_to_stop, args=(config, 64)
    )
    child.start()
    child.join(timeout=300)
    assert child.exitcode == 0
    assert _seen(config) == 72  # a step later, and no checkpoint was due
    points = read_history(train(config).history)
    assert [point["loss"] for point in points] == pytest.approx(alone, abs=1e-6)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_the_same(trained: Path) -> None:
    """Every other kill hits the writing of a checkpoint, the others all steps after one."""
    settings = {"max_seen_samples": 800, "checkpoint_every": 40, "keep_checkpoints": 2}
    unbroken = read_history(train(recipe(trained, "unbroken", **settings)).history)
    config = recipe(trained, "killed", **settings)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["raysynth.training.launch"])
    seen_samples = 0
    for pair, (event, path, committed) in enumerate(IN_WRITING, 1):
        for target, arguments, further in (
            (train_and_die_after, (config, seen_samples + 40 + 8 * pair), 40),
            (train_and_die_writing, (config, event, path), 40 * committed),
        ):
            process = processes.Process(target=target, args=arguments)
            process.start()
            process.join(timeout=300)
            ended = process.exitcode
            process.kill()
            assert ended == -signal.SIGKILL, (target, arguments)
            seen_samples += further
            assert _seen(config) == seen_samples, (target, arguments)
    again = read_history(train(config).history)
    assert [p["loss"] for p in again] == pytest.approx([p["loss"] for p in unbroken], abs=1e-6)


def _seen(config: ExperimentConfig) -> int:
    """Samples of the newest committed checkpoint."""
    pointer = config.work_dir / "checkpoints" / config.name / "latest"
    if not pointer.exists():
        return 0
    return int(pointer.read_text().removeprefix("seen-"))


def test_a_folder_that_a_worker_does_not_see_is_named(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "elsewhere", tmp_path, "fingerprint", "snapshot")
    with pytest.raises(InputError, match=r"1 of 1 workers do not see .*elsewhere"):
        _check_folder(RunPlan(files, "samples/x", None))
