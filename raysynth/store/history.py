"""What a store's commits say. Icechunk keeps no checksum of that, so each carries its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import icechunk

from raysynth.errors import DamagedStore
from raysynth.seeding import fingerprint
from raysynth.store.shards import REMEDY

INITIAL_SNAPSHOT = "1CECHNKREP0F1RSTCMT0"
"""Where every Icechunk repository starts: no group yet."""


@dataclass(frozen=True)
class Commit:
    """One commit of a run, or the one that made the store.

    Attributes:
        message: one line.
        parent: snapshot that it was made on.
        written_at: UTC, ISO 8601.
        run: branch of the run; empty: the making of the store.
        keys: units that are complete with it.
        published: whether it ended its run.
    """

    message: str
    parent: str
    written_at: str
    run: str = ""
    keys: Sequence[str] = ()
    published: bool = False


def commit(
    session: icechunk.Session,
    message: str,
    run: str = "",
    keys: Sequence[str] = (),
    published: bool = False,
) -> str:
    """Commits a session with what `Commit` tells; returns the snapshot's id.

    Raises:
        icechunk.ConflictError: the branch has moved.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    told = asdict(Commit(message, session.snapshot_id, now, run, list(keys), published))
    metadata: dict[str, Any] = {name: told[name] for name in told if name != "message"}
    return session.commit(message, metadata=metadata | {"checksum": fingerprint(told)})


def history(
    repository: icechunk.Repository, tip: str | None = None
) -> Iterator[tuple[str, Commit]]:
    """Snapshots and what their commits say, from the newest of ours to the oldest.

    Args:
        repository: of a store.
        tip: snapshot to begin with; None: what main points to.

    Raises:
        DamagedStore: a checksum does not fit, or commits do not follow each other.
    """
    expected = tip or repository.lookup_branch("main")
    for past in _ancestry(repository, expected):
        told = {"message": past.message, **past.metadata}
        checksum = told.pop("checksum", None)
        if past.id == expected == INITIAL_SNAPSHOT:
            return
        if past.id != expected or checksum != fingerprint(told):
            raise DamagedStore(
                f"what commit {expected} says is damaged, its checksum does not fit: {REMEDY}"
            )
        expected = told["parent"]
        yield past.id, Commit(**told)


def is_icechunks(error: BaseException | None) -> bool:
    """Whether Icechunk raised it. It panics at some damage, by a class that nobody can import."""
    return isinstance(error, icechunk.IcechunkError) or type(error).__name__ == "RustPanic"


def _ancestry(repository: icechunk.Repository, tip: str) -> list[icechunk.SnapshotInfo]:
    try:
        return list(repository.ancestry(snapshot_id=tip))
    except Exception as error:
        if is_icechunks(error):
            reason = str(error).splitlines()[0]
            raise DamagedStore(f"the history cannot be read: {reason}; {REMEDY}") from error
        raise
