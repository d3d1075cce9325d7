"""Jobs on the disk: there before they are acknowledged, and there after a restart."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raysynth.serving.schemas import State
from raysynth.training.checkpoints import sync_folder

JOB_ID = re.compile(r"[0-9a-f]{32}")
UNFINISHED: tuple[State, ...] = ("waiting", "drawing")


@dataclass(frozen=True)
class Job:
    """Samples that are drawn in the background.

    Attributes:
        id: random; nobody guesses another's.
        owner: whose token asked.
        number: of the job, in the order in which they came.
        kind: one sample, or a batch that lands in the store.
        body: the request as it came, with its seeds.
        state: how far it is.
        error: why it failed.
        key: the client's idempotency key.
        asked_at: when it came, in seconds since 1970; None: an earlier version took it.
    """

    id: str
    owner: str
    number: int
    kind: Literal["sample", "batch"]
    body: dict[str, Any]
    state: State = "waiting"
    error: str | None = None
    key: str | None = None
    asked_at: float | None = None

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Of its samples."""
        return list(self.body["requests"]) if self.kind == "batch" else [self.body]


class JobFolder:
    """Jobs as files, one each; what they have drawn beside them."""

    def __init__(self, path: Path, keep: int) -> None:
        """Reads what is there.

        Args:
            path: the folder; it is made.
            keep: jobs that are kept; the oldest finished ones go.
        """
        self.path, self.keep = path, keep
        self._lock = threading.Lock()  # of writers; readers copy the list first
        path.mkdir(parents=True, exist_ok=True)
        found = (json.loads(file.read_text()) for file in path.glob("*.json"))
        jobs = sorted((Job(**one) for one in found), key=lambda job: job.number)
        self.jobs = {job.id: job for job in jobs}

    def add(
        self,
        owner: str,
        kind: Literal["sample", "batch"],
        body: dict[str, Any],
        key: str | None = None,
    ) -> tuple[Job, bool]:
        """A new job, durable when this returns; or the one that came with the same key before.

        Returns:
            The job, and whether it is new.
        """
        with self._lock:
            if (known := self.with_key(owner, key)) is not None:
                return known, False
            number = max((job.number for job in self.jobs.values()), default=0) + 1
            job = Job(
                secrets.token_hex(16), owner, number, kind, body, key=key, asked_at=time.time()
            )
            self._write(job)
            self._make_room()
        return job, True

    def of(self, owner: str, job_id: str) -> Job | None:
        """An owner's job; None if there is none, or if it is another's."""
        job = self.jobs.get(job_id) if JOB_ID.fullmatch(job_id) else None
        return job if job is not None and job.owner == owner else None

    def with_key(self, owner: str, key: str | None) -> Job | None:
        """The job that an owner asked for under a key; without a key there is none."""
        if key is None:
            return None
        return next((job for job in self.all_of(owner) if job.key == key), None)

    def all_of(self, owner: str) -> list[Job]:
        """An owner's jobs, the newest first."""
        return [job for job in reversed(list(self.jobs.values())) if job.owner == owner]

    def unfinished(self) -> list[Job]:
        """Jobs that were accepted and are not done, the oldest first."""
        return [job for job in list(self.jobs.values()) if job.state in UNFINISHED]

    def change(self, job_id: str, state: State, error: str | None = None) -> Job:
        """Writes how far a job is; what has ended stays as it is."""
        with self._lock:
            job = self.jobs[job_id]
            if job.state in UNFINISHED:
                job = replace(job, state=state, error=error)
                self._write(job)
            return job

    def put_sample(self, job_id: str, row: int, packed: bytes) -> None:
        """Writes a sample of a job; durable when this returns."""
        path = self.sample_path(job_id, row)
        path.parent.mkdir(exist_ok=True)
        write_synced(path, packed)

    def sample_path(self, job_id: str, row: int) -> Path:
        """Where a sample of a job is, once it is drawn."""
        return self.path / job_id / f"{row:08d}.npz"

    def clear(self, job_id: str) -> None:
        """Forgets the samples of a job: they have landed elsewhere."""
        shutil.rmtree(self.path / job_id, ignore_errors=True)

    def _write(self, job: Job) -> None:
        write_synced(self.path / f"{job.id}.json", json.dumps(asdict(job)).encode())
        self.jobs[job.id] = job

    def _make_room(self) -> None:
        ended = [job for job in self.jobs.values() if job.state not in UNFINISHED]
        for job in ended[: max(0, len(self.jobs) - self.keep)]:
            del self.jobs[job.id]
            self.clear(job.id)
            (self.path / f"{job.id}.json").unlink()


def write_synced(path: Path, content: bytes) -> None:
    """Replaces a file in one step; it is on the disk when this returns."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)
