"""A checkpoint's tensors: written beside training, and read by any engine on any number of workers.

Every worker writes what it owns, runs of flattened tensors, into one safetensors file. Who reads
asks for the runs it needs, whoever wrote them, so a run goes on under another engine, ZeRO stage or
number of workers without any conversion.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from raysynth.errors import RaysynthError, UnfitCheckpoint
from raysynth.training.checkpoints import CheckpointFolder, State, write_synced

ALIGNMENT = 64
BLOCK_BYTES = 2**24
"""Written and summed up at once, while it is in the cache."""

PATIENCE_S = 1800.0
"""For files of other workers; a disk that takes longer is broken."""

POLL_S = 0.02

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors calls them."""


class Key(NamedTuple):
    """Which run it is.

    Attributes:
        kind: `weight`, `average`, `exp_avg`, `exp_avg_sq` or `buffer`.
        name: of the parameter or buffer in its module.
        start: of the run in the flattened tensor.
    """

    kind: str
    name: str
    start: int


Runs = Mapping[Key, Tensor]
"""Flat tensors."""


class Saver:
    """Writes checkpoints of one worker, one at a time, while training goes on."""

    def __init__(self, checkpoints: CheckpointFolder, rank: int, world_size: int) -> None:
        """Writes nothing yet; rank 0 will commit what all workers wrote."""
        self.checkpoints, self.rank, self.world_size = checkpoints, rank, world_size
        self._copy = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()

    def save(self, seen_samples: int, runs: Runs, state: State) -> None:
        """Lets a thread copy the runs and write them. The folder must be staged.

        Args:
            seen_samples: name the checkpoint.
            runs: what this worker owns. Buffers may change at once, all else after `settle`.
            state: of the run; rank 0's is kept.
        """
        assert self._thread is None, "wait for the last one first"
        runs = dict(sorted(runs.items(), key=lambda run: -run[1].element_size()))  # all aligned
        header, places = _header(runs)
        end = max((place.stop for place in places), default=0)
        if self._copy.numel() != end:
            # Kept between checkpoints: new memory would cost as much as the copy.
            on_gpu = any(run.is_cuda for run in runs.values())
            self._copy = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        copies = {
            key: (self._copy[place].view(run.dtype), run)
            for place, (key, run) in zip(places, runs.items(), strict=True)
        }
        _copy_all([pair for key, pair in copies.items() if key.kind == "buffer"])
        large = [pair for key, pair in copies.items() if key.kind != "buffer"]
        self._is_copied.clear()
        self._thread = threading.Thread(
            target=self._write, args=(seen_samples, large, header, state), daemon=True
        )
        self._thread.start()

    def settle(self) -> None:
        """Until all runs are copied: they must not change before.

        Forward and backward passes change none, so the copy hides behind them.
        """
        self._is_copied.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on disk and, on rank 0, committed.

        Raises:
            OSError: it could not be written.
            RaysynthError: another worker did not write its part.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error

    def _write(
        self,
        seen_samples: int,
        copies: Sequence[tuple[Tensor, Tensor]],
        header: bytes,
        state: State,
    ) -> None:
        try:
            try:
                _copy_all(copies)
            finally:
                self._is_copied.set()
            staged = self.checkpoints.staging(seen_samples)
            digest = _write_summed(staged / file_name(self.rank), header, self._copy)
            write_synced(staged / _sum_name(self.rank), digest)
            if self.rank == 0:
                files = {file_name(rank): self._sum(staged, rank) for rank in self._ranks()}
                for rank in self._ranks():
                    (staged / _sum_name(rank)).unlink()
                self.checkpoints.commit(seen_samples, state, files)
        except BaseException as error:  # told by `wait`
            self._error = error

    def _ranks(self) -> range:
        return range(self.world_size)

    def _sum(self, staged: Path, rank: int) -> str:
        """The digest of a worker's file, as soon as it is written."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                found = (staged / _sum_name(rank)).read_text()
            except FileNotFoundError:
                found = ""
            if len(found) == hashlib.sha256().digest_size * 2:
                return found
            time.sleep(POLL_S)
        raise RaysynthError(
            f"worker {rank} did not write its part of {staged} within {PATIENCE_S:.0f} s: is it on "
            "storage that all workers see?"
        )


class Saved:
    """The tensors of a committed checkpoint, read run by run."""

    def __init__(self, path: Path) -> None:
        """Lists what its files hold.

        Args:
            path: a verified checkpoint.
        """
        self.path = path
        self._files = ExitStack()
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in sorted(path.glob(file_name("*"))):
            opened = self._files.enter_context(safe_open(file, "pt"))
            for key in opened.keys():  # noqa: SIM118  # it is no mapping
                kind, start, name = key.split(":", 2)
                (size,) = opened.get_slice(key).get_shape()
                run = int(start), int(start) + size, opened, key
                self._runs.setdefault((kind, name), []).append(run)

    def __enter__(self) -> Saved:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()

    def check(self, kind: str, sizes: Mapping[str, int]) -> None:
        """Compares what there is of a kind with what is wanted, elements by name.

        Raises:
            UnfitCheckpoint: they differ.
        """
        own = {
            name: sum(stop - start for start, stop, *_ in runs)
            for (of_kind, name), runs in self._runs.items()
            if of_kind == kind
        }
        unfit = [name for name in {**own, **sizes} if own.get(name) != sizes.get(name)]
        if unfit:
            first = unfit[0]
            raise UnfitCheckpoint(
                f"checkpoint {self.path} is of another architecture: {len(unfit)} parameters "
                f"differ, first {first} with {own.get(first, 0)} elements, in this network "
                f"{sizes.get(first, 0)}; train under another name"
            )

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, on the CPU.

        Raises:
            UnfitCheckpoint: the checkpoint does not hold all of them.
        """
        parts, here = [], start
        for first, last, file, key in sorted(self._runs.get((kind, name), []), key=lambda r: r[0]):
            if first <= here < min(last, stop):
                until = min(last, stop)
                parts.append(file.get_slice(key)[here - first : until - first])
                here = until
        if here != stop:
            raise UnfitCheckpoint(
                f"checkpoint {self.path} lacks elements {here} to {stop} of {kind} {name}: train "
                "under another name"
            )
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def file_name(rank: int | str) -> str:
    """Of a worker's tensors."""
    return f"rank-{rank:05d}.safetensors" if isinstance(rank, int) else f"rank-{rank}.safetensors"


def _sum_name(rank: int) -> str:
    return f"rank-{rank:05d}.sha256"


def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies each second tensor into the first; from a GPU beside what else it does."""
    if not pairs:
        return
    targets, sources = map(list, zip(*pairs, strict=True))
    device = sources[0].device
    with torch.no_grad():
        if device.type != "cuda":
            torch._foreach_copy_(targets, sources)
            return
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(beside):
            torch._foreach_copy_(targets, sources, non_blocking=True)
        beside.synchronize()


def _header(runs: Runs) -> tuple[bytes, list[slice]]:
    """What a safetensors file of these begins with, and where their bytes lie behind it."""
    entries, places, here = {}, [], 0
    for (kind, name, start), run in runs.items():
        size = run.numel() * run.element_size()
        entries[f"{kind}:{start}:{name}"] = {
            "dtype": DTYPES[run.dtype],
            "shape": [run.numel()],
            "data_offsets": [here, here + size],
        }
        places.append(slice(here, here + size))
        here += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places


def _write_summed(path: Path, header: bytes, data: Tensor) -> str:
    """Writes and syncs a file; returns its SHA-256 in hex."""
    digest, content = hashlib.sha256(header), data.numpy()
    with path.open("wb") as file:
        file.write(header)
        for start in range(0, len(content), BLOCK_BYTES):
            block = content[start : start + BLOCK_BYTES].data
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
