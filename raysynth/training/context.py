"""What a training worker knows about its group. The loop sees this and nothing of Ray."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Notice = Literal["leaving", "stop"]
"""A machine will go, and the supervisor then starts the group again; or nobody will."""


class WorkerContext(Protocol):
    """A worker's place in its group, and where it reports to."""

    @property
    def rank(self) -> int:
        """This worker's number; 0 writes files."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    def report(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Tells the group's supervisor about a checkpoint. Every rank calls it."""

    def notice(self) -> Notice | None:
        """Whether a worker's machine is about to be taken away. Every rank calls it, and waits."""


@dataclass(frozen=True)
class LocalContext:
    """A process without Ray: alone, or one of a group that `torchrun` started.

    Attributes:
        rank: its number.
        world_size: processes of the group.
        is_stopping: set when this process is asked to end.
    """

    rank: int = 0
    world_size: int = 1
    is_stopping: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def from_environment(cls) -> LocalContext:
        """The place that `torchrun` has put into RANK and WORLD_SIZE; alone without them."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def report(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Nobody supervises: the checkpoint folder and the history already tell everything."""

    def notice(self) -> Notice | None:
        """Whether this process was asked to end."""
        return "stop" if self.is_stopping.is_set() else None
