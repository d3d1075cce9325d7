"""A step of the training loop against other loops: same network, data, noise and optimizer.

python -m jobs.benchmarks.train_step [--steps N] [--only WORD]

Whenever our loop asks for a batch, every other loop takes its own step on that batch first, in
rotating order: so steps alternate, and each meets the same load. All use one thread.

- bare torch: forward, backward, clipping, AdamW; no average of the weights, no log, no resumable
  order, no check for numbers that are not finite.
- accelerate: the loop of diffusers' training example, with its EMA and its learning-rate schedule.
- MONAI: the loop of its diffusion tutorials, through its inferer.
- bare DeepSpeed at a stage: its engine's backward and step, against ours on the same stage.

Others are given what careful users would choose: AdamW in one fused pass, an EMA in one pass over
all tensors, clipping as ours does it; and all their noise and timesteps are drawn beforehand, which
our loop does inside its step. Nothing is reported unless the losses of the first steps agree.
Prints a table and a line of JSON; exits 1 where losses differ or a target is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.benchmarks.ratios import (
    Row,
    Seconds,
    facts_of_run,
    median_row,
    paired_ratio,
    report,
)
from raysynth.config import TrainingConfig
from raysynth.config.model import AutoencoderKLConfig, LatentDiffusionConfig
from raysynth.diffusion.schedule import build_schedule, q_sample
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.conditioner import ConditionBatch
from raysynth.models.denoiser import Denoiser, build_denoiser
from raysynth.models.space import LatentSpace
from raysynth.training.context import LocalContext
from raysynth.training.engines import deepspeed_config
from raysynth.training.history import HISTORY_FILE, read_history
from raysynth.training.loop import RunFiles, fit
from raysynth.training.objectives import Batch, DiffusionObjective, condition_of, draw

LATENT_SHAPE, SAMPLE_SIZE, BATCH_SIZE = (4, 16, 16), 64, 16
COMPARED, WARM_UP, TOLERANCE = 12, 5, 1e-6
MODEL = LatentDiffusionConfig(
    autoencoder=Path("none"),
    channels=(32, 64, 80),
    attention_levels=(False, True, True),
    num_res_blocks=1,
    num_head_channels=16,
    norm_num_groups=16,
)
AUTOENCODER = AutoencoderKLConfig(channels=(8, 8, 8), num_res_blocks=1, norm_num_groups=8)
TRAINING = TrainingConfig(
    global_batch_size=BATCH_SIZE,
    checkpoint_every=10**9,
    log_every=10 * BATCH_SIZE,
    ema_decay=0.999,
)


@dataclass(frozen=True)
class Drawn:
    """A batch with all that is random about its step."""

    x_0: Tensor
    noise: Tensor
    timestep: Tensor
    condition: ConditionBatch


Step = Callable[[Drawn], float]
"""One step of another loop; returns its loss."""


@dataclass(frozen=True)
class Comparison:
    """Our loop with one engine, and the loops beside it.

    Attributes:
        changes: of `TRAINING`.
        others: makes each, in the process that runs it.
        at_most: our share of their time.
    """

    changes: dict[str, Any]
    others: dict[str, Callable[[], Step]]
    at_most: dict[str, float]


@dataclass(frozen=True)
class Run:
    """Losses and times of every step by loop; the last step of ours is not timed."""

    losses: dict[str, list[float]]
    spent: dict[str, list[Seconds]]


OURS = "raysynth"


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default="", help="comparisons whose title holds this word")
    options = parser.parse_args(arguments)
    facts = facts_of_run("torch", "accelerate", "deepspeed", "diffusers", "monai")
    facts |= {"parameters": sum(p.numel() for p in _denoiser().parameters()), "batch": BATCH_SIZE}
    tables, differences = {}, {}
    for title in COMPARISONS:
        if options.only not in title:
            continue
        # Engines leave traces in their process: each run has its own.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
            differences[title] = fresh.submit(_largest_difference, title).result()
            if differences[title] <= TOLERANCE:
                tables[title] = fresh.submit(_table, title, options.steps).result()
    facts["largest_difference_of_losses"] = differences
    failed = report(facts, tables, of="raysynth / this")
    for title, difference in differences.items():
        if difference > TOLERANCE:
            print(f"{title}: losses differ by {difference:.1e}: not comparable")
            failed = 1
    return failed


def _largest_difference(title: str) -> float:
    """Of a loss of any other loop from ours, over the first steps."""
    losses = _run(title, COMPARED, log_every=BATCH_SIZE).losses
    return max(
        abs(a - b) for other in losses.values() for a, b in zip(other, losses[OURS], strict=True)
    )


def _table(title: str, steps: int) -> list[Row]:
    spent = _run(title, steps + WARM_UP + 1, TRAINING.log_every).spent
    timed = {name: seconds[WARM_UP:] for name, seconds in spent.items()}
    rows = [median_row(OURS, timed[OURS])]
    for name in COMPARISONS[title].others:
        ratio = paired_ratio(timed[OURS], timed[name])
        row = median_row(name, timed[name])
        at_most = COMPARISONS[title].at_most.get(name)
        rows.append(Row(name, row.cpu_ms, row.wall_ms, *ratio, at_most=at_most))
    return rows


def _run(title: str, steps: int, log_every: int) -> Run:
    torch.set_num_threads(1)
    comparison = COMPARISONS[title]
    if comparison.changes:
        _alone_in_group()
    stream = AlternatingStream(steps, {name: make() for name, make in comparison.others.items()})
    changes = {"max_seen_samples": steps * BATCH_SIZE, "log_every": log_every}
    config = TRAINING.model_copy(update=changes | comparison.changes)
    space = LatentSpace(build_autoencoder(AUTOENCODER).eval(), 1.0)
    objective = DiffusionObjective(_denoiser(), space, config=MODEL, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        files = RunFiles(Path(folder) / "checkpoints", Path(folder), "benchmark", "none")
        fit(objective, stream, config, LocalContext(), files)
        ours = [point["loss"] for point in read_history(files.log / HISTORY_FILE)]
    return Run({OURS: ours} | stream.losses, stream.spent)


class AlternatingStream:
    """Invented batches; before each is handed out, the other loops take their step on it."""

    def __init__(self, steps: int, others: dict[str, Step]) -> None:
        self.steps, self.others = steps, others
        self.losses: dict[str, list[float]] = {name: [] for name in others}
        self.spent: dict[str, list[Seconds]] = {name: [] for name in (OURS, *others)}

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        """One batch a step; notes what each loop takes."""
        names = list(self.others)
        for step in range(self.steps):
            batch = _batch(step)
            drawn = _drawn(batch)
            shift = step % len(names)
            taken = {}
            for name in names[shift:] + names[:shift]:
                started = Seconds.now()
                self.losses[name].append(self.others[name](drawn))
                taken[name] = started.elapsed()
            started = Seconds.now()
            yield batch
            # The last step is followed by a checkpoint, and nobody comes back here.
            for name, seconds in (taken | {OURS: started.elapsed()}).items():
                self.spent[name].append(seconds)


# The other loops.


def _bare_torch() -> Step:
    schedule, denoiser = build_schedule(MODEL.schedule), _denoiser()
    parameters, optimizer = list(denoiser.parameters()), _adamw(denoiser)

    def step(drawn: Drawn) -> float:
        x_t = q_sample(schedule, drawn.x_0, drawn.noise, drawn.timestep)
        prediction = denoiser(x_t, drawn.timestep, drawn.condition)
        loss = functional.mse_loss(prediction, drawn.noise)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, TRAINING.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _accelerate() -> Step:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True)
    scheduler: Any = DDPMScheduler(  # type: ignore[no-untyped-call]
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    denoiser = _denoiser()
    ema: Any = EMAModel(denoiser.parameters(), TRAINING.ema_decay, foreach=True)
    optimizer = _adamw(denoiser)
    model, optimizer, lr_scheduler = accelerator.prepare(
        denoiser, optimizer, get_scheduler("constant", optimizer)
    )

    def step(drawn: Drawn) -> float:
        with accelerator.accumulate(model):
            x_t = scheduler.add_noise(drawn.x_0, drawn.noise, drawn.timestep)
            prediction = model(x_t, drawn.timestep, drawn.condition)
            loss = functional.mse_loss(prediction.float(), drawn.noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), TRAINING.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
        return float(loss.detach().item())

    return step


class _AsMonaiCalls(nn.Module):
    """The network under the names that MONAI's inferer gives its arguments."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timesteps: Tensor, context: ConditionBatch) -> Any:
        return self.denoiser(x, timesteps, context)


def _monai() -> Step:
    import raysynth.models.monai  # noqa: F401, I001  # imports MONAI without what nobody needs
    from monai.inferers.inferer import DiffusionInferer
    from monai.networks.schedulers.ddpm import DDPMScheduler

    scheduler: Any = DDPMScheduler(
        schedule="scaled_linear_beta", beta_start=0.00085, beta_end=0.012
    )
    inferer, network = DiffusionInferer(scheduler), _AsMonaiCalls(_denoiser())
    parameters, optimizer = list(network.parameters()), _adamw(network)

    def step(drawn: Drawn) -> float:
        optimizer.zero_grad(set_to_none=True)
        network.train()
        condition: Any = drawn.condition
        prediction = inferer(
            inputs=drawn.x_0,
            diffusion_model=network,  # type: ignore[arg-type]
            noise=drawn.noise,
            timesteps=drawn.timestep,
            condition=condition,
        )
        loss = functional.mse_loss(prediction.float(), drawn.noise.float())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, TRAINING.max_grad_norm, foreach=True)
        optimizer.step()
        return loss.item()

    return step


def _bare_deepspeed(stage: int) -> Step:
    import deepspeed

    # As our engine does it on CPUs: else DeepSpeed compiles its own exchange for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    config = deepspeed_config(TRAINING.model_copy(update=_deepspeed(stage)))
    schedule, denoiser = build_schedule(MODEL.schedule), _denoiser()
    engine, *_ = deepspeed.initialize(
        model=denoiser, optimizer=_adamw(denoiser), config=config, dist_init_required=False
    )

    def step(drawn: Drawn) -> float:
        x_t = q_sample(schedule, drawn.x_0, drawn.noise, drawn.timestep)
        prediction = engine(x_t, drawn.timestep, drawn.condition)
        loss = functional.mse_loss(prediction, drawn.noise)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def _deepspeed(stage: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage}


COMPARISONS = {
    "one process": Comparison(
        {},
        {"bare torch": _bare_torch, "accelerate alone": _accelerate, "MONAI tutorial": _monai},
        {"bare torch": 1.03, "accelerate alone": 1.0},
    ),
    "DeepSpeed stage 0": Comparison(
        _deepspeed(0),
        {"bare DeepSpeed 0": lambda: _bare_deepspeed(0), "bare torch": _bare_torch},
        {"bare DeepSpeed 0": 1.02},
    ),
    "DeepSpeed stage 2": Comparison(
        _deepspeed(2),
        {"bare DeepSpeed 2": lambda: _bare_deepspeed(2), "bare torch": _bare_torch},
        {"bare DeepSpeed 2": 1.02},
    ),
}


# What all loops share.


def _denoiser() -> Denoiser:
    torch.manual_seed(0)
    return build_denoiser(MODEL, LATENT_SHAPE[0], LATENT_SHAPE[1])


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    rate = TRAINING.learning_rate
    return torch.optim.AdamW(module.parameters(), rate, weight_decay=0.0, fused=True)


def _alone_in_group() -> None:
    """Tells DeepSpeed that this process is its whole group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (group | {"MASTER_PORT": port}).items():
        os.environ.setdefault(name, value)


def _batch(step: int) -> Batch:
    random = np.random.default_rng(step)
    return {
        "position": np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE),
        "latents": random.normal(size=(BATCH_SIZE, *LATENT_SHAPE)).astype(np.float16),
        "layout": random.integers(0, 6, (BATCH_SIZE, *[SAMPLE_SIZE] * 2)).astype(np.uint8),
        "box": np.tile(np.array([8, 9, 30, 31], np.int16), (BATCH_SIZE, 1)),
        "ratings": random.integers(1, 6, (BATCH_SIZE, 4, 9)).astype(np.uint8),
    }


def _drawn(batch: Batch) -> Drawn:
    """What our objective draws for a batch."""
    draws = draw(0, batch["position"], 3, LATENT_SHAPE)
    reader, dropped, time_of = draws.uniform.unbind(1)
    condition = condition_of(batch, reader.numpy()).drop(dropped < MODEL.condition_drop)
    timestep = (time_of * MODEL.num_train_timesteps).long()
    x_0 = torch.from_numpy(batch["latents"]).float()
    return Drawn(x_0, draws.noise, timestep, condition)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
