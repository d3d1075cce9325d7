"""A step of the training loop against a bare PyTorch loop: same network, data, noise and optimizer.

python -m jobs.benchmarks.train_step [STEPS] [--workers 2]

The bare loop does forward, backward, clipping and AdamW, with all noise drawn beforehand; it has no
average of the weights, no log, no resumable order, and no check for numbers that are not finite.
Whenever our loop asks for a batch, the bare loop takes its own step on that batch first: so steps
alternate, and every pair meets the same load. Losses are compared first. Both use one thread;
processor seconds are what an idle machine would take. With two workers, of as many samples each,
the bare loop is torch's DistributedDataParallel over the same connection, and seconds are the wall
clock's: workers wait for each other. Prints the medians and the median paired
ratio with a 95 % bootstrap interval; exits 1 if the losses differ or the ratio is above target.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from raysynth.config import TrainingConfig
from raysynth.config.model import AutoencoderKLConfig, LatentDiffusionConfig
from raysynth.diffusion.schedule import q_sample
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.conditioner import ConditionBatch
from raysynth.models.denoiser import build_denoiser
from raysynth.models.space import LatentSpace
from raysynth.training.context import LocalContext
from raysynth.training.history import HISTORY_FILE, read_history
from raysynth.training.loop import RunFiles, fit
from raysynth.training.objectives import Batch, DiffusionObjective, condition_of, draw

TARGET, TARGET_TOGETHER = 1.03, 1 / 0.98
LATENT_SHAPE, SAMPLE_SIZE, BATCH_SIZE, WARM_UP = (4, 16, 16), 64, 16, 5
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


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("steps", type=int, nargs="?", default=150)
    parser.add_argument("--workers", type=int, default=1, choices=[1, 2])
    options = parser.parse_args(arguments)
    if options.workers == 1:
        return _compare(options.steps)
    with closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (options.workers, port, options.steps), options.workers)
    return 0


def _worker(rank: int, world_size: int, port: int, steps: int) -> None:
    """One of several: ends with exit code 1 where the target is missed."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    torch.distributed.init_process_group("gloo")
    code = _compare(steps)
    torch.distributed.destroy_process_group()
    sys.exit(code)


def _compare(steps: int) -> int:
    """Losses, then times; returns the exit code."""
    torch.set_num_threads(1)
    context = LocalContext.from_environment()
    if context.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one of them speaks
    millions = sum(p.numel() for p in _objective().module.parameters()) / 1e6
    print(
        f"{context.world_size} workers, {millions:.2f} M parameters, "
        f"batch {BATCH_SIZE}, torch {torch.__version__}, 1 thread of {os.cpu_count()}, "
        f"load {os.getloadavg()[0]:.2f}"
    )
    _, ours, bare = _both(context, 12, log_every=BATCH_SIZE)
    worst = max(abs(a - b) for a, b in zip(ours, bare, strict=True)) if ours else 0.0
    print(f"largest difference of {len(bare)} losses: {worst:.1e}")
    if worst > 1e-6:
        print("not comparable")
        return 1
    seconds, _, _ = _both(context, steps + WARM_UP, TRAINING.log_every)
    return _report(seconds[WARM_UP:], context)


def _both(
    context: LocalContext, steps: int, log_every: int
) -> tuple[NDArray[np.float64], list[float], list[float]]:
    """Seconds of every step, ours and bare (steps, 2), and the losses of both."""
    stream = AlternatingStream(steps, context)
    together = BATCH_SIZE * context.world_size
    changes = {
        "max_seen_samples": steps * together,
        "log_every": log_every * context.world_size,
        "global_batch_size": together,
        "num_workers": context.world_size,
    }
    with tempfile.TemporaryDirectory() as folder:
        files = RunFiles(Path(folder) / "checkpoints", Path(folder), "benchmark", "none")
        config = TRAINING.model_copy(update=changes)
        if context.world_size > 1:  # all write into one folder
            box = [files]
            torch.distributed.broadcast_object_list(box, src=0)
            (files,) = box
        fit(_objective(), stream, config, context, files)
        if context.world_size > 1:
            torch.distributed.barrier()
        losses = []
        if context.rank == 0:
            losses = [point["loss"] for point in read_history(files.log / HISTORY_FILE)]
    # The last step of ours is followed by a checkpoint, and no batch is asked for after it.
    return np.array([stream.ours, stream.bare[:-1]]).T, losses, stream.losses


class AlternatingStream:
    """Invented batches; before each is handed out, the bare loop takes its step on it."""

    def __init__(self, steps: int, context: LocalContext) -> None:
        objective = _objective()
        self.steps, self.context = steps, context
        self.schedule, self.denoiser = objective.schedule, objective.module
        self.clock = time.process_time
        if context.world_size > 1:
            self.clock = time.perf_counter
            self.denoiser = DistributedDataParallel(self.denoiser, gradient_as_bucket_view=True)
        self.parameters = list(self.denoiser.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, TRAINING.learning_rate, weight_decay=0.0, fused=True
        )
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.losses: list[float] = []

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        """One batch a step; notes the processor time of both loops."""
        for step in range(self.steps):
            batch = _batch(step * self.context.world_size + self.context.rank)
            drawn = _drawn(batch)
            started = self.clock()
            self._bare_step(*drawn)
            self.bare.append(self.clock() - started)
            started = self.clock()
            yield batch
            self.ours.append(self.clock() - started)

    def _bare_step(
        self, x_0: Tensor, noise: Tensor, timestep: Tensor, condition: ConditionBatch
    ) -> None:
        x_t = q_sample(self.schedule, x_0, noise, timestep)
        loss = functional.mse_loss(self.denoiser(x_t, timestep, condition), noise)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, TRAINING.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.detach()
        if self.context.world_size > 1:
            torch.distributed.all_reduce(value)
        self.losses.append(value.item() / self.context.world_size)


def _objective() -> DiffusionObjective:
    torch.manual_seed(0)
    denoiser = build_denoiser(MODEL, LATENT_SHAPE[0], LATENT_SHAPE[1])
    space = LatentSpace(build_autoencoder(AUTOENCODER).eval(), 1.0, AUTOENCODER.window_hu)
    return DiffusionObjective(denoiser, space, config=MODEL, seed=0)


def _batch(step: int) -> Batch:
    random = np.random.default_rng(step)
    return {
        "position": np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE),
        "latents": random.normal(size=(BATCH_SIZE, *LATENT_SHAPE)).astype(np.float16),
        "layout": random.integers(0, 6, (BATCH_SIZE, *[SAMPLE_SIZE] * 2)).astype(np.uint8),
        "box": np.tile(np.array([8, 9, 30, 31], np.int16), (BATCH_SIZE, 1)),
        "ratings": random.integers(1, 6, (BATCH_SIZE, 4, 9)).astype(np.uint8),
    }


def _drawn(batch: Batch) -> tuple[Tensor, Tensor, Tensor, ConditionBatch]:
    """What our objective draws for a batch."""
    draws = draw(0, batch["position"], 3, LATENT_SHAPE)
    reader, dropped, time_of = draws.uniform.unbind(1)
    condition = condition_of(batch, reader.numpy()).drop(dropped < MODEL.condition_drop)
    timestep = (time_of * MODEL.num_train_timesteps).long()
    return torch.from_numpy(batch["latents"]).float(), draws.noise, timestep, condition


def _report(seconds: NDArray[np.float64], context: LocalContext) -> int:
    ratios = seconds[:, 0] / seconds[:, 1]
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    ours, bare = 1e3 * np.median(seconds, axis=0)
    ratio = float(np.median(ratios))
    target = TARGET if context.world_size == 1 else TARGET_TOGETHER
    clock = "processor" if context.world_size == 1 else "wall"
    print(f"{len(ratios)} steps: raysynth {ours:.2f} ms, bare {bare:.2f} ms of {clock} time")
    print(f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}], target <= {target:.3f}")
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    return int(ratio > target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
