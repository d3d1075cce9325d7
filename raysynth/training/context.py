"""What a training worker knows about its group. The loop sees this and nothing of Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class WorkerContext(Protocol):
    """A worker's place in its group, and where it reports to."""

    @property
    def rank(self) -> int:
        """This worker's number; 0 writes files."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    def report(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Tells the group's supervisor about a committed checkpoint. Every rank calls it."""


@dataclass(frozen=True)
class LocalContext:
    """A process without Ray: alone, or one of a group that `torchrun` started."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> LocalContext:
        """The place that `torchrun` has put into RANK and WORLD_SIZE; alone without them."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def report(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Nobody supervises: the checkpoint folder and the history already tell everything."""
