"""The training loop: one function, read from top to bottom, the same for every objective."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from raysynth.config import TrainingConfig
from raysynth.errors import Diverged, Stopped, UnfitCheckpoint
from raysynth.training.checkpoints import CheckpointFolder
from raysynth.training.context import WorkerContext
from raysynth.training.ema import Ema
from raysynth.training.engines import Engine, open_engine
from raysynth.training.history import History, Meter
from raysynth.training.memory import EngineChoice
from raysynth.training.objectives import Batch, Objective
from raysynth.training.saving import Saved, Saver

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10

NOTICE_EVERY_S = 2.0
"""So often workers ask whether one of them must go. They wait for each other then."""


class Stream(Protocol):
    """Where batches come from (`raysynth.data.stream.SampleStream`)."""

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        """This worker's share of each global batch, from a place in the global order on."""


@dataclass(frozen=True)
class RunFiles:
    """What a run is, and where it keeps its files (on storage that all workers see).

    Attributes:
        checkpoints: folder of its checkpoints.
        log: folder of its history.
        fingerprint: of everything the weights follow from; a checkpoint of another is refused.
        snapshot: of the store that the samples are read from.
    """

    checkpoints: Path
    log: Path
    fingerprint: str
    snapshot: str


@dataclass
class Standing:
    """How far a run has come: the part of a checkpoint that is not tensors.

    Attributes:
        seen_samples: samples over all workers; the place in the global order.
        step: optimizer steps.
        seconds: of training, over all attempts.
        loss: the last logged one.
        skipped_steps: steps that changed nothing because a gradient was not finite.
        history_bytes: length of the history.
    """

    seen_samples: int = 0
    step: int = 0
    seconds: float = 0.0
    loss: float | None = None
    skipped_steps: int = 0
    history_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        weights: the EMA of the trained parameters, and the buffers, by name, on the CPU.
        now: how far it came.
        samples_per_s: of this attempt, over all workers.
        engine: that took the steps.
    """

    weights: dict[str, Tensor]
    now: Standing
    samples_per_s: float
    engine: EngineChoice


class Stride:
    """When workers ask for notices: every few steps, the same on all of them."""

    def __init__(self) -> None:
        """Begins with every step."""
        self.steps, self.done = 1, 0

    def is_due(self, engine: Engine, seconds: float) -> bool:
        """After a step: whether to ask now.

        Args:
            engine: agrees on the stride when it is due.
            seconds: of all steps of this attempt.
        """
        self.done += 1
        if self.done % self.steps:
            return False
        self.steps = engine.agree(max(1, round(NOTICE_EVERY_S * self.done / max(seconds, 1e-9))))
        return True


def fit(
    objective: Objective,
    stream: Stream,
    config: TrainingConfig,
    context: WorkerContext,
    files: RunFiles,
) -> Outcome:
    """Trains `objective.module` until enough samples are seen or the time is up.

    Raises:
        UnfitCheckpoint: the newest checkpoint belongs to another recipe.
        Diverged: too many steps in a row had a gradient that is not finite.
        Stopped: this process was asked to end; a checkpoint holds how far it came.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(objective.module, config, context))
        ema = Ema(engine.owned(), config.ema_decay)

        # Go on from the newest checkpoint that is whole, or start.
        checkpoints = CheckpointFolder(files.checkpoints, config.keep_checkpoints)
        saver = Saver(checkpoints, engine.rank, engine.world_size)
        now = _resume(engine, ema, checkpoints, files)
        first, earlier_s, started = now.seen_samples, now.seconds, time.monotonic()
        history = stack.enter_context(_open_history(context, config, files, now))
        batches = stack.enter_context(closing(stream.batches(first)))
        meter, finished = Meter(), _finished(engine, config, now)
        stride, notice = Stride(), None

        while not finished:
            # Forward and backward, one micro batch at a time.
            batch = next(batches)
            for micro_batch in _split(batch, engine.num_micro_batches):
                with engine.micro_batch():
                    terms = objective.loss(engine.module, micro_batch, engine.device)
                    engine.backward(terms["loss"])
                meter.add(terms)

            # Clip, update and average; a gradient that is not finite changes nothing.
            learning_rate = _learning_rate(config, now.seen_samples)
            saver.settle()
            applied = meter.end_step(engine.step(learning_rate))
            now.step += 1
            if applied:
                ema.update(now.step)
            else:
                now.skipped_steps += 1
                _stop_if_lost(meter, now, files)

            # See how far we are.
            before = now.seen_samples
            now.seen_samples += config.global_batch_size
            now.seconds = earlier_s + time.monotonic() - started
            finished = _finished(engine, config, now)

            # Before a machine is taken away, save: once, at once.
            leaving = False
            if notice is None and stride.is_due(engine, now.seconds - earlier_s):
                notice = context.notice()
                leaving = notice is not None

            # Log the means since the last point. A checkpoint ends an interval: so the history of a
            # resumed run is that of one which was never interrupted.
            saving = finished or leaving
            saving = saving or _crosses(before, now.seen_samples, config.checkpoint_every)
            if saving or _crosses(before, now.seen_samples, config.log_every):
                means = meter.read(engine.mean)
                now.loss = means.get("loss", now.loss)
                if history:
                    rate = (now.seen_samples - first) / (time.monotonic() - started)
                    pace = {"learning_rate": learning_rate, "samples_per_s": rate}
                    history.write({**_counters(now), **means, **pace})
            if history:
                history.advance(now.seen_samples, now.loss)

            # Write a picture and a checkpoint, which goes to disk while training goes on.
            if saving:
                _show(objective, engine, batch, history, now)
                _save(engine, ema, saver, now, files)
                context.report(_counters(now), checkpoints.path(now.seen_samples))
            if leaving:
                saver.wait()
                logger.warning("a machine is about to go: saved after %d samples", now.seen_samples)
            if notice == "stop" and not finished:
                raise Stopped(
                    f"asked to end after {now.seen_samples} samples, which a checkpoint holds: run "
                    "the same command to go on"
                )

        saver.wait()
        rate = (now.seen_samples - first) / max(time.monotonic() - started, 1e-9)
        return Outcome(_average_weights(engine, ema), now, rate, engine.choice)


@contextmanager
def _open_history(
    context: WorkerContext, config: TrainingConfig, files: RunFiles, now: Standing
) -> Iterator[History | None]:
    """Rank 0 writes the history; the others have none."""
    if context.rank != 0:
        yield None
        return
    with closing(
        History(files.log, now.history_bytes, now.seen_samples, config.max_seen_samples)
    ) as history:
        yield history


def _resume(engine: Engine, ema: Ema, checkpoints: CheckpointFolder, files: RunFiles) -> Standing:
    """Loads the newest valid checkpoint, which rank 0 chooses; a new run stands at 0."""
    checkpoint = engine.agree(checkpoints.newest_valid() if engine.rank == 0 else None)
    if checkpoint is None:
        return Standing()
    if checkpoint.state["fingerprint"] != files.fingerprint:
        raise UnfitCheckpoint(
            f"checkpoint {checkpoint.path} is of another recipe (fingerprint "
            f"{checkpoint.state['fingerprint']}, this one has {files.fingerprint}): give the "
            "recipe another name, or delete that folder"
        )
    with Saved(checkpoint.path) as saved:
        engine.restore(saved, ema.average, checkpoint.state["num_updates"])
    standing = Standing(**checkpoint.state["standing"])
    logger.info("going on from %s", checkpoint.path)
    return standing


def _save(engine: Engine, ema: Ema, saver: Saver, now: Standing, files: RunFiles) -> None:
    """Begins to write a checkpoint, after the last one is written. All ranks call it."""
    saver.wait()
    if engine.rank == 0:
        saver.checkpoints.stage(now.seen_samples)
    engine.barrier()
    state = {
        "standing": asdict(now),
        "num_updates": engine.num_updates(),
        "fingerprint": files.fingerprint,
        "snapshot": files.snapshot,
    }
    saver.save(now.seen_samples, engine.runs(ema.average), state)


def _show(
    objective: Objective, engine: Engine, batch: Batch, history: History | None, now: Standing
) -> None:
    """Adds a picture to the history; all ranks compute it, as ZeRO-3 wants."""
    module = engine.bare_module
    module.eval()
    with torch.no_grad():
        picture = objective.preview(module, batch, engine.device)
    module.train()
    if history:
        history.show(picture, now.seen_samples)
        now.history_bytes = history.sync()


def _average_weights(engine: Engine, ema: Ema) -> dict[str, Tensor]:
    """The EMA under the names of the parameters that are trained, beside the module's buffers."""
    module = engine.bare_module
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    average = dict(zip(names, engine.whole(ema.average), strict=True))
    weights = {**dict(module.named_buffers()), **average}
    return {name: tensor.detach().cpu() for name, tensor in weights.items()}


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    size = len(batch["position"]) // parts
    for start in range(0, size * parts, size):
        yield {name: column[start : start + size] for name, column in batch.items()}


def _learning_rate(config: TrainingConfig, seen_samples: int) -> float:
    """Of the step whose batch ends at `seen_samples` + global_batch_size: a linear warm-up."""
    seen = seen_samples + config.global_batch_size
    return config.learning_rate * min(1.0, seen / max(config.warmup_samples, 1))


def _crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every


def _counters(now: Standing) -> dict[str, float]:
    return {
        "seen_samples": now.seen_samples,
        "step": now.step,
        "seconds": now.seconds,
        "skipped_steps": now.skipped_steps,
    }


def _finished(engine: Engine, config: TrainingConfig, now: Standing) -> bool:
    """Whether enough samples are seen, or the time is up by rank 0's clock."""
    if now.seen_samples >= config.max_seen_samples:
        return True
    return config.max_seconds is not None and engine.agree(now.seconds >= config.max_seconds)


def _stop_if_lost(meter: Meter, now: Standing, files: RunFiles) -> None:
    if meter.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    raise Diverged(
        f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite, the "
        f"last after {now.seen_samples} samples: lower training.learning_rate or raise "
        f"training.warmup_samples (the curve is in {files.log}), and train under another name"
    )
