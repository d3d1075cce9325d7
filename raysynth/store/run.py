"""One run that writes to a store: on its own branch, resumable, published in one step."""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import icechunk
import zarr
from filelock import FileLock, Timeout

from raysynth.errors import InputError, StoreConflict, StoreFailed
from raysynth.store.history import commit, history, is_icechunks
from raysynth.store.repository import local_path, open_repository, reason_of

logger = logging.getLogger(__name__)

Build = Callable[[zarr.Group], None]
Place = tuple[str, tuple[int, ...]]
"""A stored object: path of its array and position in the shard grid; () is the node itself."""


class StoreRun:
    """Writes to a store so that nobody sees half of it, and goes on where a killed run stopped.

    All commits go to the branch `run-<verb>-<fingerprint>`; `publish` moves main there. Every
    commit records the keys of the units that it completed, so a run that is started again with the
    same verb and fingerprint knows what is done. What was published before is not remembered: the
    published groups say what exists.

    Use as a context manager: it holds the lock of a local store, which has one writer at a time.

    Attributes:
        url: the store.
        branch: the run's branch.
    """

    def __init__(self, url: str | Path, verb: str, fingerprint: str) -> None:
        """Names the run; nothing happens before `with`.

        Args:
            url: local path or s3:// URL; the store is made if it is missing.
            verb: what is done, for example `shard`.
            fingerprint: of everything that decides the result; the same run has the same one.
        """
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", verb + fingerprint), (verb, fingerprint)
        self.url, self.verb, self.fingerprint = str(url), verb, fingerprint
        # Icechunk allows no slash in the name of a branch.
        self.branch = f"run-{verb}-{fingerprint}"
        self._lock: FileLock | None = None
        self._start = self._tip = ""
        self._completed: set[str] = set()
        self._unrecorded: list[str] = []
        self._written: set[Place] = set()

    def __enter__(self) -> StoreRun:
        self._lock = _acquire_lock(self.url, self.branch)
        try:
            self._repository = open_repository(self.url, create=True)
            self._open_branch()
        except BaseException as error:
            self._release()
            self._name_the_store(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What is committed stays on the branch for the next start; what is not never happened.
        self._release()
        self._name_the_store(error)

    def _name_the_store(self, error: BaseException | None) -> None:
        """Icechunk's errors, workers' included, tell what failed and not where."""
        # Ray hands on what a task raised inside an error of its own.
        cause = getattr(error, "cause", error)
        if isinstance(cause, Exception) and is_icechunks(cause):
            raise StoreFailed(
                f"store {self.url}: {reason_of(cause)}; what was committed is kept: put that "
                "right and run the command again"
            ) from error

    @property
    def is_new(self) -> bool:
        """Whether nothing has been committed on the branch yet."""
        return self._tip == self._start

    @property
    def completed(self) -> frozenset[str]:
        """Keys of the units that this run, or the one it resumes, has committed."""
        return frozenset(self._completed)

    @property
    def root(self) -> zarr.Group:
        """The root group as of the run's last commit, read-only."""
        session = self._repository.readonly_session(snapshot_id=self._tip)
        return zarr.open_group(session.store, mode="r", zarr_format=3)

    def declare(self, build: Build, message: str, keys: Sequence[str] = ()) -> None:
        """Commits what the driver itself writes: groups, empty arrays at full size, the index.

        Args:
            build: gets the writable root group.
            message: of the commit.
            keys: units that are complete with it.
        """
        self.commit((), keys, message, build)

    def fork(self) -> icechunk.ForkSession:
        """A picklable session for workers: they write shards through `fork.store` and return it."""
        return self._session().fork()

    def commit(
        self,
        forks: Iterable[icechunk.ForkSession],
        keys: Sequence[str],
        message: str,
        build: Build | None = None,
    ) -> None:
        """Merges what workers wrote and commits it, with the keys of the units now complete.

        Args:
            forks: as the workers returned them.
            keys: units that are complete now; each has one owner and comes once.
            message: of the commit.
            build: changes by the driver in the same commit; gets the writable root group.

        Raises:
            StoreConflict: a key or a stored object has a second owner, a worker changed what it
                does not own, or another process commits on the branch.
        """
        forks = list(forks)
        self._check_keys(keys)
        self._check_owners(forks)
        session = self._session()
        if forks:
            session.merge(*forks)
        if build is not None:
            build(zarr.open_group(session.store, mode="r+", zarr_format=3))
        self._unrecorded += keys
        # If the units needed nothing, their keys go into the next commit.
        if session.has_uncommitted_changes:
            places = _places(session.status())
            self._tip = self._commit(session, message)
            self._written |= places
            self._unrecorded = []
        self._completed.update(keys)

    def publish(self, message: str) -> str:
        """Moves main to the end of the branch, in one step, and deletes the branch.

        Args:
            message: one line on the run; the store's history shows it.

        Returns:
            The id of the snapshot that main points to now.

        Raises:
            StoreConflict: main is no longer where this run started; the branch keeps the work.
        """
        if not self.is_new:
            self._record(message)
            try:
                self._repository.reset_branch("main", self._tip, from_snapshot_id=self._start)
            except icechunk.IcechunkError as error:
                if self._repository.lookup_branch("main") == self._start:
                    raise
                raise self._main_moved() from error
            logger.info("%s: %s", self.branch, message)
        self._repository.delete_branch(self.branch)
        self._start = self._tip = self._repository.lookup_branch("main")
        return self._tip

    def _open_branch(self) -> None:
        main = self._repository.lookup_branch("main")
        self._start = self._tip = main
        if self.branch in self._repository.list_branches():
            tip = self._repository.lookup_branch(self.branch)
            if not _is_in_history(self._repository, tip):
                self._resume(tip, main)
                return
            # Published (killed before this line was reached), or never got to its first commit.
            self._repository.delete_branch(self.branch)
        self._repository.create_branch(self.branch, main)

    def _resume(self, tip: str, main: str) -> None:
        self._tip = tip
        for snapshot, past in history(self._repository, tip):
            # An earlier, published run may have had the same name.
            if snapshot == main or past.run != self.branch:
                self._start = snapshot
                break
            self._completed.update(past.keys)
        if self._start != main:
            raise self._main_moved()
        changes = self._repository.diff(from_snapshot_id=self._start, to_snapshot_id=tip)
        self._written = _places(changes)
        logger.info("%s resumes: %d units are done", self.branch, len(self._completed))

    def _session(self) -> icechunk.Session:
        session = self._repository.writable_session(self.branch)
        if session.snapshot_id != self._tip:
            raise StoreConflict(
                f"another process works on branch {self.branch} of store {self.url}: "
                f"stop one of the two and run the command again"
            )
        return session

    def _commit(self, session: icechunk.Session, message: str, published: bool = False) -> str:
        try:
            return commit(session, message, self.branch, self._unrecorded, published)
        except icechunk.ConflictError as error:
            raise StoreConflict(
                f"another process committed on branch {self.branch} of store {self.url}: "
                f"stop one of the two and run the command again"
            ) from error

    def _record(self, message: str) -> None:
        """Notes the run in the root's attributes, so that the history has one line a run."""
        main = self._repository.readonly_session(snapshot_id=self._start)
        attributes: dict[str, Any] = zarr.open_group(main.store, mode="r").attrs.asdict()
        number = attributes.get("last_run", {}).get("number", 0) + 1
        session = self._session()
        zarr.open_group(session.store, mode="r+", zarr_format=3).attrs["last_run"] = {
            "number": number,
            "verb": self.verb,
            "fingerprint": self.fingerprint,
            "message": message,
        }
        if session.has_uncommitted_changes:
            self._tip = self._commit(session, message, published=True)

    def _check_keys(self, keys: Sequence[str]) -> None:
        twice = sorted(
            {key for key in keys if keys.count(key) > 1} | self._completed.intersection(keys)
        )
        if twice:
            raise StoreConflict(f"{self.branch}: unit {twice[0]} would be committed twice")

    def _check_owners(self, forks: Sequence[icechunk.ForkSession]) -> None:
        # Merging detects no conflict: the last fork would win in silence.
        written: set[Place] = set()
        for fork in forks:
            changes = fork.status()
            touched = (
                changes.updated_groups
                | changes.updated_arrays
                | changes.deleted_groups
                | changes.deleted_arrays
            )
            if touched:
                raise StoreConflict(
                    f"{self.branch}: a worker changed {min(touched)}, which only the driver may"
                )
            places = _places(changes)
            again = places & (written | self._written)
            if again:
                path, position = min(again)
                raise StoreConflict(
                    f"{self.branch}: shard {list(position)} of {path} has two owners"
                )
            written |= places

    def _main_moved(self) -> StoreConflict:
        return StoreConflict(
            f"another run published to store {self.url} after {self.branch} started, so this one "
            f"cannot be published; its work stays on branch {self.branch}. To do it again on what "
            f"is there now, discard it: {_discard_command(self.url, self.branch)}"
        )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def discard_run(url: str | Path, branch: str) -> None:
    """Gives up the unpublished work of a run, so that the next start begins anew.

    Raises:
        InputError: no such branch, or another process is writing to the store.
    """
    lock = _acquire_lock(str(url), branch)
    try:
        repository = open_repository(url)
        runs = sorted(name for name in repository.list_branches() if name.startswith("run-"))
        if branch not in runs:
            raise InputError(
                f"store {url} has no run {branch!r}; unpublished runs: {', '.join(runs) or 'none'}"
            )
        repository.delete_branch(branch)
    finally:
        if lock is not None:
            lock.release()


def _discard_command(url: str, branch: str) -> str:
    code = f"from raysynth.store.run import discard_run; discard_run({url!r}, {branch!r})"
    return f"python -c {shlex.quote(code)}"


def _acquire_lock(url: str, branch: str) -> FileLock | None:
    """The lock beside a local store, taken at once or not at all; None for an object store."""
    path = local_path(url)
    if path is None:
        return None
    file = path.absolute().with_name(path.absolute().name + ".lock")
    lock = FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"{branch} (process {os.getpid()} on {socket.gethostname()})")
    except Timeout:
        raise StoreConflict(
            f"store {url} is being written by {_read_holder(file)}: wait until it ends, or stop it"
        ) from None
    except OSError as error:
        raise InputError(f"store {url} cannot be written: {reason_of(error)}: {file}") from error
    return lock


def _read_holder(file: Path) -> str:
    try:
        return file.read_text() or "another process"
    except OSError:
        return "another process"


def _is_in_history(repository: icechunk.Repository, snapshot_id: str) -> bool:
    return any(past.id == snapshot_id for past in repository.ancestry(branch="main"))


def _places(changes: icechunk.Diff) -> set[Place]:
    chunks = {
        (path, tuple(position))
        for path, positions in changes.updated_chunks.items()
        for position in positions
    }
    return chunks | {(path, ()) for path in changes.new_groups | changes.new_arrays}
