"""A run's curve: JSON lines for programs, TensorBoard and a progress line for people."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysynth.progress import Progress

HISTORY_FILE = "history.jsonl"

Record = dict[str, float]


class History:
    """Written by one worker. A resumed run cuts it back to its checkpoint, then goes on."""

    def __init__(self, folder: Path, position: int, seen_samples: int, max_seen_samples: int):
        """Opens the files of a run that has seen `seen_samples`.

        Args:
            folder: holds both kinds of file.
            position: bytes of the JSON lines that are still true.
            seen_samples: later TensorBoard points are dropped.
            max_seen_samples: where the progress line ends.
        """
        # TensorBoard takes a second to import: only the worker that writes pays it.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / HISTORY_FILE, "ab")  # noqa: SIM115 - `close` closes it
        self._file.truncate(position)
        self._board: Any = SummaryWriter(str(folder), purge_step=seen_samples)
        self._progress = Progress("train", max_seen_samples, "samples")
        self._progress.resume(seen_samples)

    def advance(self, seen_samples: int, loss: float | None) -> None:
        """Moves the progress line; cheap enough for every step."""
        self._progress.update(seen_samples, **({} if loss is None else {"loss": loss}))

    def write(self, record: Record) -> None:
        """Appends one point; its `seen_samples` is the horizontal axis."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(f"train/{name}", value, record["seen_samples"])

    def show(self, picture: Tensor, seen_samples: int) -> None:
        """Adds a picture, (1, height, width) in [0, 1]."""
        self._board.add_image("train/preview", picture, seen_samples)

    def sync(self) -> int:
        """The length of the JSON lines in bytes, all on the disk when this returns."""
        self._board.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Closes the files and ends the line."""
        self._progress.close()
        self._board.close()
        self._file.close()


def read_history(path: Path) -> list[Record]:
    """All points of a history file; without one, or of a line still being written, none."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


class Meter:
    """Means of loss terms between two logged points, without a host sync at every step.

    Attributes:
        skipped_in_a_row: steps since the last one that counted.
    """

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self._names: list[str] = []
        self._step: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._grad_norms: list[float] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Takes the scalar terms of one micro batch."""
        self._names = list(terms)
        self._step.append(torch.stack([term.detach() for term in terms.values()]))

    def end_step(self, grad_norm: float) -> bool:
        """The step is over. If the norm is not finite it changed nothing, and does not count.

        Returns:
            Whether it counts.
        """
        applied = math.isfinite(grad_norm)
        if applied:
            self._kept += self._step
            self._grad_norms.append(grad_norm)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self._step = []
        return applied

    def read(self, mean_over_workers: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means by name, and a fresh start; nothing if no step counted."""
        kept, norms = self._kept, self._grad_norms
        self._kept, self._grad_norms = [], []
        if not kept:
            return {}
        means = mean_over_workers(torch.stack(kept).mean(dim=0)).tolist()
        # Workers share the gradient: its norm needs no mean over them.
        named = dict(zip(self._names, means, strict=True))
        return {**named, "grad_norm": sum(norms) / len(norms)}
