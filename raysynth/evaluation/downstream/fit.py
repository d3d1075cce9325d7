"""The one training loop of the trial: so many steps, then whatever has been learned is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysynth.config.downstream import DownstreamConfig

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises; it falls to 0 as a cosine."""

MAX_GRAD_NORM = 5.0


def fit(
    network: nn.Module,
    count: int,
    loss_of: Callable[[NDArray[np.int64]], Tensor],
    config: DownstreamConfig,
    batch_size: int,
    seed: int,
) -> None:
    """Trains a network for `config.steps` optimizer steps, however many samples there are.

    No step is chosen by a look at test patients; the last one counts.

    Args:
        network: trained in place.
        count: training samples.
        loss_of: the mean loss of some of them, by their rows.
        config: steps and learning rate.
        batch_size: samples a step.
        seed: of their order.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=0.01, fused=True
    )
    batches = _batches(count, batch_size, np.random.default_rng(seed))
    network.train()
    for step in range(config.steps):
        rise = min(1.0, (step + 1) / (WARM_UP * config.steps + 1))
        fall = (1 + math.cos(math.pi * step / config.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rise * fall
        optimizer.zero_grad()
        loss_of(next(batches)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    network.eval()


def _batches(count: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Full batches for ever; a sample comes again when all others have come."""
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        yield waiting[:size]
        waiting = waiting[size:]
