"""One of two `torchrun` workers: trains the tiny autoencoder with every engine, and resumes it.

python -m torch.distributed.run --nproc-per-node 2 -m tests.training.two_workers FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from raysynth.training.context import LocalContext
from raysynth.training.loop import fit
from raysynth.training.objectives import Batch
from tests.training.tiny import ArrayStream, files_in, tiny_config, tiny_objective

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "ddp micro": {"engine": "ddp", "micro_batch_size": 2},
    "zero2 micro": {"engine": "deepspeed", "zero_stage": 2, "micro_batch_size": 2},
    "zero3 bf16": {"engine": "deepspeed", "zero_stage": 3, "precision": "bf16"},
}


class SharedStream(ArrayStream):
    """This worker's share of the batches."""

    def __init__(self, context: LocalContext) -> None:
        super().__init__(8)
        self.context = context

    def batches(self, seen_samples: int = 0) -> Generator[Batch]:
        for batch in super().batches(seen_samples):
            mine = batch["position"] % self.context.world_size == self.context.rank
            yield {name: column[mine] for name, column in batch.items()}


CHAIN = ("ddp", "zero3", "zero1", "zero0", "zero2", "ddp")
"""Engines that go on from each other's checkpoints, 8 samples each."""

FIRST, LAST = 16, 16 + 8 * len(CHAIN)
"""Samples seen before and after the chain: one worker alone begins, and may go on."""


def main(folder: Path) -> None:
    """Leaves losses and a checksum of the averaged weights of every engine in results.json."""
    context = LocalContext.from_environment()
    results = {}
    for number, name in enumerate(CHAIN, start=1):
        config = tiny_config(
            num_workers=2, open_shards=2, max_seen_samples=FIRST + 8 * number, **ENGINES[name]
        )
        fit(tiny_objective(), SharedStream(context), config, context, files_in(folder / "chain"))
    for name, settings in ENGINES.items():
        for max_seen_samples in (32, 64):  # the second goes on from the first
            config = tiny_config(
                num_workers=2, open_shards=2, max_seen_samples=max_seen_samples, **settings
            )
            files = files_in(folder / name.replace(" ", "_"))
            outcome = fit(tiny_objective(), SharedStream(context), config, context, files)
        total = sum(float(tensor.double().abs().sum()) for tensor in outcome.weights.values())
        results[name] = (outcome.now.loss, total)
    if context.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
