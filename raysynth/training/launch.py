"""Starts training: in this process, or as a group of Ray Train workers."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from raysynth.config import ExperimentConfig
from raysynth.errors import Diverged, InputError, RaysynthError, UnfitCheckpoint
from raysynth.progress import progress
from raysynth.session import check_resources
from raysynth.training.context import LocalContext, Notice
from raysynth.training.history import HISTORY_FILE, read_history
from raysynth.training.worker import RunPlan, TrainSummary, finished_run, plan_run, train_and_bundle

logger = logging.getLogger(__name__)


def train(config: ExperimentConfig) -> TrainSummary:
    """Fits the recipe's model and leaves a bundle.

    The same command again goes on from the newest checkpoint, or does nothing if the run has ended.
    One CPU worker trains in this process (a group of one takes 10 s to start); any other runs
    under Ray Train, which needs an open session and restarts a group that lost a worker.

    Raises:
        InputError: something is missing that another verb makes, the cluster is too small, another
            process trains the same recipe, or the checkpoints belong to another recipe.
        RaysynthError: training diverged, or failed too often.
    """
    if config.bundle is not None:
        raise InputError(
            f"{config.name} draws with the bundle {config.bundle}: nothing is left to train; "
            "leave `bundle` out to train one"
        )
    plan = plan_run(config)
    done = finished_run(config, plan)
    if done is not None:
        # The user asked for work and gets none: said louder than the rest.
        logger.warning("%s is trained already: bundle %s stays", config.name, config.bundle_path)
        return done
    with _only_one(plan):
        if _fits_this_process(config):
            summary = _in_this_process(config, plan)
        else:
            summary = _on_ray(config, plan)
    logger.info("%s: loss %s, bundle %s", config.name, summary.final_loss, summary.bundle)
    return summary


def _fits_this_process(config: ExperimentConfig) -> bool:
    training = config.training
    return training.num_workers == 1 and not training.use_gpu and training.engine != "deepspeed"


def _in_this_process(config: ExperimentConfig, plan: RunPlan) -> TrainSummary:
    threads = torch.get_num_threads()
    try:
        with _heed_termination() as is_stopping:
            summary = train_and_bundle(config, plan, LocalContext(is_stopping=is_stopping))
    finally:
        torch.set_num_threads(threads)
    assert summary is not None
    return summary


@contextmanager
def _heed_termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: batch systems send it some time before they kill."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # nobody else hears signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_ray(config: ExperimentConfig, plan: RunPlan) -> TrainSummary:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    training = config.training
    check_resources(training.fewest_workers, _resources(config), "training")
    # A report waits for the controller to look: every checkpoint would stand still for 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    count: Any = training.num_workers
    if training.min_workers is not None:  # elastic
        count = training.min_workers, training.num_workers
    trainer = TorchTrainer(
        _ray_worker,  # type: ignore[arg-type]
        train_loop_config={"config": config, "plan": plan},
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=training.use_gpu,
            resources_per_worker=_resources(config),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # its annotations are Ray Train V1's
            # Ray keeps its own notes of the run here; the state to resume from is in checkpoints.
            name=f"{config.name}-{uuid4().hex[:8]}",
            storage_path=str(config.work_dir / "ray"),
            failure_config=FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": _environment(config)},
        ),
    )
    try:
        with _watch(plan.files.log / HISTORY_FILE, training.max_seen_samples):
            result = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        raise RaysynthError(
            f"training failed {training.max_failures + 1} times: {' '.join(str(error).split())}; "
            "run the same command to go on from the last checkpoint"
        ) from error
    if isinstance(result, RaysynthError):
        raise result
    assert isinstance(result, TrainSummary)
    return result


def _ray_worker(settings: dict[str, Any]) -> TrainSummary | RaysynthError | None:
    try:
        return train_and_bundle(settings["config"], settings["plan"], RayTrainContext())
    except (Diverged, InputError, UnfitCheckpoint) as error:
        # All ranks meet these together; raised, they would make Ray start the group again, in vain.
        return error


class RayTrainContext:
    """A worker of a Ray Train (V2) group."""

    def __init__(self) -> None:
        import ray.train

        place = ray.train.get_context()
        self.rank: int = place.get_world_rank()
        self.world_size: int = place.get_world_size()

    def report(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Gives Ray the metrics, and a note of where the checkpoint is; Ray copies no weights."""
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            note = None
            if self.rank == 0:
                text = json.dumps({"checkpoint": str(checkpoint)})
                (Path(folder) / "checkpoint.json").write_text(text)
                note = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=note)

    def notice(self) -> Notice | None:
        """Whether Ray was told that a node of the group will go."""
        import ray.train

        return "leaving" if ray.train.get_preemption_info() is not None else None


def _environment(config: ExperimentConfig) -> dict[str, str]:
    """Of the workers. Without a GPU of their own, torch and DeepSpeed must not find one either."""
    threads = {"OMP_NUM_THREADS": str(config.training.threads_per_worker)}
    return threads | (
        {} if config.training.use_gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    )


def _resources(config: ExperimentConfig) -> dict[str, float]:
    gpus = {"GPU": 1.0} if config.training.use_gpu else {}
    return {"CPU": float(config.training.threads_per_worker), **gpus}


@contextmanager
def _only_one(plan: RunPlan) -> Iterator[None]:
    """Two processes that train one recipe would write into each other's files."""
    plan.files.checkpoints.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.files.checkpoints / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another process trains into {plan.files.checkpoints}: wait for it, or give this "
            "recipe another name"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _seen(history: Sequence[Mapping[str, float]]) -> int:
    return int(history[-1]["seen_samples"]) if history else 0


@contextmanager
def _watch(history: Path, max_seen_samples: int) -> Iterator[None]:
    """Shows the progress of workers, whose own output stays in their log files."""
    ended = threading.Event()

    def follow() -> None:
        with progress("train", max_seen_samples) as view:
            points = read_history(history)
            view.resume(_seen(points))
            while not ended.wait(0.5):
                points = read_history(history)
                if _seen(points) != view.done:
                    view.update(_seen(points), loss=points[-1].get("loss", float("nan")))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
