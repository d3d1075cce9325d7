"""Opens the repository behind a store: a folder, or an s3:// URL."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import icechunk
import zarr

from raysynth import __version__
from raysynth.errors import InputError, StoreFailed
from raysynth.store.history import INITIAL_SNAPSHOT, commit, is_icechunks
from storage_schema.v1 import SCHEMA_VERSION

# Icechunk warns at every opening that a folder is not safe for concurrent commits (`StoreRun` holds
# a lock for that reason), and logs errors that it raises as well.
icechunk.set_logs_filter("off")

TOP_GROUPS = ("volumes", "samples", "latents", "synthetic", "audits", "quarantine")

LATER_GROUPS = ("audits",)
"""Stores that are older lack them until the first run that needs one."""


def open_repository(url: str | Path, create: bool = False) -> icechunk.Repository:
    """Opens a store's repository and checks that this version can read it.

    Args:
        url: local path or s3://bucket/prefix. S3 takes endpoint, region and credentials from the
            environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID...).
        create: make an empty store where there is none. Only who holds the store's lock may.

    Raises:
        InputError: no store there, something else there, or a store of another schema version.
        StoreFailed: it is damaged, or its disk or bucket fails.
    """
    url = str(url)
    path = local_path(url)
    if path is not None:
        _check_folder(path, create)
    try:
        if path is not None and create and not (path / "refs").is_dir():
            _create_folder(path)
        storage = _s3_storage(url) if path is None else _folder_storage(path)
        if path is None and create and not icechunk.Repository.exists(storage):
            _write_root(icechunk.Repository.create(storage))
        repository = icechunk.Repository.open(storage)
    except (icechunk.IcechunkError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"store {url} cannot be opened: {reason_of(error)}; give the path or URL of a store"
        ) from error
    try:
        _check_version(repository, url, create)
    except Exception as error:
        if is_icechunks(error):
            raise StoreFailed(f"store {url} cannot be read: {reason_of(error)}") from error
        raise
    return repository


def open_root(url: str | Path, snapshot: str | None = None) -> zarr.Group:
    """The root group of the published store, read-only.

    Args:
        url: local path or s3:// URL of the store.
        snapshot: read this snapshot; None: what main points to now. Either stays as it is,
            whatever is written meanwhile.

    Raises:
        InputError: as `open_repository`, or no such snapshot.
    """
    repository = open_repository(url)
    if snapshot is None:
        session = repository.readonly_session("main")
    else:
        try:
            session = repository.readonly_session(snapshot_id=snapshot)
        except (icechunk.IcechunkError, ValueError) as error:
            raise InputError(
                f"store {url} has no snapshot {snapshot!r}: `raysynth inspect` lists them"
            ) from error
    return zarr.open_group(session.store, mode="r", zarr_format=3)


def main_snapshot(url: str | Path) -> str:
    """Id of the snapshot that main points to."""
    return open_repository(url).lookup_branch("main")


def local_path(url: str | Path) -> Path | None:
    """The store's folder, or None if it is in an object store."""
    text = str(url)
    if "://" not in text:
        return Path(text)
    if text.startswith("s3://"):
        return None
    raise InputError(f"store {text}: give a local path or s3://bucket/prefix")


def reason_of(error: Exception) -> str:
    """What Icechunk says, in one line without its traceback."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    lines = str(error).splitlines()
    return " ".join(lines[0].strip().removeprefix("x ").split()) if lines else repr(error)


def _check_folder(path: Path, create: bool) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a store: give a store's folder")
    # Icechunk would make a missing folder and then say that it is empty.
    if not path.is_dir() and not create:
        raise InputError(f"there is no store at {path}: run ingest first, or give another path")
    if path.is_dir() and not (path / "refs").is_dir() and (any(path.iterdir()) or not create):
        raise InputError(f"{path} is not a store: give a store's folder, or a new one")


def _create_folder(path: Path) -> None:
    """Makes the store beside its place and moves it there: a crash leaves no half of one."""
    draft = path.with_name(f".{path.name}.raysynth-draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    _write_root(icechunk.Repository.create(_folder_storage(draft)))
    draft.rename(path)


def _folder_storage(path: Path) -> icechunk.Storage:
    return icechunk.local_filesystem_storage(str(path.absolute()))


def _s3_storage(url: str) -> icechunk.Storage:
    parts = urlsplit(url)
    if not parts.netloc or not parts.path.strip("/"):
        raise InputError(f"store {url}: give s3://bucket/prefix")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return icechunk.s3_storage(
        bucket=parts.netloc,
        prefix=parts.path.strip("/"),
        region=os.environ.get("AWS_REGION", "us-east-1"),
        endpoint_url=endpoint,
        allow_http=bool(endpoint and endpoint.startswith("http://")),
        # Servers other than Amazon's seldom know buckets as host names.
        force_path_style=endpoint is not None,
        from_env=True,
    )


def _write_root(repository: icechunk.Repository) -> None:
    """Commits the root and the top groups."""
    session = repository.writable_session("main")
    root = zarr.create_group(
        session.store,
        zarr_format=3,
        attributes={
            "schema_version": SCHEMA_VERSION,
            "created_by": "raysynth",
            "software_version": __version__,
        },
    )
    for name in TOP_GROUPS:
        root.create_group(name)
    root["quarantine"].attrs["entries"] = []
    commit(session, "Empty store")


def _check_version(repository: icechunk.Repository, url: str, create: bool) -> None:
    session = repository.readonly_session("main")
    if create and session.snapshot_id == INITIAL_SNAPSHOT:
        # In an object store, a crash may fall between making the repository and its root.
        _write_root(repository)
        session = repository.readonly_session("main")
    try:
        version = zarr.open_group(session.store, mode="r", zarr_format=3).attrs.get(
            "schema_version"
        )
    except FileNotFoundError:
        version = None
        _raise_if_damaged(repository, session.snapshot_id, url)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"store {url} is damaged: restore it from a copy") from error
    if version is None:
        raise InputError(
            f"store {url} is not a raysynth store: its root has no schema_version; "
            f"give the path or URL of a store"
        )
    if version != SCHEMA_VERSION:
        raise InputError(
            f"store {url} has schema version {version!r}, this raysynth reads {SCHEMA_VERSION!r}: "
            f"use the raysynth that wrote it, or ingest again into a new store"
        )


def _raise_if_damaged(repository: icechunk.Repository, snapshot: str, url: str) -> None:
    """Icechunk takes what it cannot read for missing; asked for the snapshot, it says why."""
    try:
        repository.lookup_snapshot(snapshot)
    except icechunk.IcechunkError as error:
        raise InputError(
            f"store {url} cannot be opened: snapshot {snapshot}, {reason_of(error)}; "
            f"restore it from a copy"
        ) from error
