"""Checkpoints that survive a kill at any moment and a flipped bit anywhere.

A checkpoint is written and synced under a temporary name, summed up in a manifest (the SHA-256 of
every file), renamed, and only then named by the pointer `latest`. Reading verifies every byte and
falls back to the newest older one that is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysynth.seeding import fingerprint

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
POINTER = "latest"
STAGING_PREFIX = ".writing-"

State = dict[str, Any]
"""JSON values that say where a run is: counters, the recipe's fingerprint, the data snapshot."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: a folder with the engine's files, and the state beside them."""

    path: Path
    state: State


class CheckpointFolder:
    """The checkpoints of one run, on storage that all its workers see."""

    def __init__(self, root: Path, keep: int) -> None:
        """Names the folder; makes nothing yet.

        Args:
            root: holds one sub-folder a checkpoint.
            keep: newest checkpoints that stay.
        """
        self.root, self.keep = root, keep

    def path(self, seen_samples: int) -> Path:
        """Where the checkpoint after so many samples is, once committed."""
        return self.root / _name(seen_samples)

    def staging(self, seen_samples: int) -> Path:
        """The temporary folder for a checkpoint after so many samples; the same on every rank."""
        return self.root / f"{STAGING_PREFIX}{_name(seen_samples)}"

    def stage(self, seen_samples: int) -> None:
        """Makes that folder, empty: what a killed writer left behind goes (rank 0)."""
        for leftover in self.root.glob(f"{STAGING_PREFIX}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:  # the pointer's temporary file
                leftover.unlink()
        self.staging(seen_samples).mkdir(parents=True)

    def commit(self, seen_samples: int, state: State, files: Mapping[str, str]) -> None:
        """Turns the staged folder into the newest checkpoint (rank 0).

        Args:
            seen_samples: names it.
            state: of the run.
            files: in the folder, written and synced, and the SHA-256 of each.
        """
        staged, path = self.staging(seen_samples), self.path(seen_samples)
        manifest: dict[str, Any] = {"state": state, "files": dict(files)}
        manifest["digest"] = fingerprint(manifest)
        write_synced(staged / MANIFEST, json.dumps(manifest, indent=1))
        sync_folder(staged)
        if path.exists():  # a run that fell back behind a damaged checkpoint reaches it again
            shutil.rmtree(path)
        staged.rename(path)
        sync_folder(self.root)
        pointer = self.root / f"{STAGING_PREFIX}{POINTER}"
        write_synced(pointer, path.name)
        pointer.rename(self.root / POINTER)
        sync_folder(self.root)
        # Later ones were damaged, or this run would have started from them.
        later = [other for other in self._newest_first() if other.name > path.name]
        for old in [*later, *self._newest_first()[len(later) :][self.keep :]]:
            shutil.rmtree(old)

    def newest_valid(self) -> Checkpoint | None:
        """The checkpoint that `latest` names or, if it is damaged, the newest that is whole.

        What is damaged is logged and left where it is.
        """
        candidates = self._newest_first()
        candidates.sort(key=lambda path: path.name != self._pointed_at())
        for path in candidates:
            try:
                return Checkpoint(path, _verify(path))
            except (OSError, ValueError) as error:
                logger.warning("checkpoint %s is damaged (%s): trying an older one", path, error)
        return None

    def _pointed_at(self) -> str | None:
        try:
            return (self.root / POINTER).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.root.glob("seen-*"), reverse=True)


def _name(seen_samples: int) -> str:
    return f"seen-{seen_samples:012d}"


def _verify(path: Path) -> State:
    """The state of a checkpoint whose every byte is as it was written.

    Raises:
        ValueError: something differs.
        OSError: something cannot be read.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != fingerprint(manifest):
        raise ValueError(f"{MANIFEST} does not match its digest")
    # Only what lies in the folder is opened, whatever the manifest names.
    if {*manifest["files"], MANIFEST} != set(_files(path)):
        raise ValueError("there are other files than when it was written")
    for name, digest in manifest["files"].items():
        with open(path / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{name} does not match its SHA-256")
    state: State = manifest["state"]
    return state


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def write_synced(path: Path, text: str) -> None:
    """Writes a file, and returns when it is on the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
