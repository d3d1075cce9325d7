"""Who may ask, for what and how much: bearer tokens, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raysynth.errors import InputError

FOLDER, TOKENS_FILE = "serving", "tokens.json"
"""Below a recipe's work_dir; the file within it."""

Scope = Literal["draw", "batch", "metrics", "store", "study"]
"""Samples, jobs and uploads; runs that land in the store; running metrics; what the store holds;
reader studies, which show real samples of the store to whoever has a reader's link."""

SCOPES: tuple[Scope, ...] = ("draw", "batch", "metrics", "store", "study")


class Grant(BaseModel):
    """What the owner of a token may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hash: str = ""
    """SHA-256 of the token, in hex."""
    scopes: tuple[Scope, ...] = SCOPES
    requests_per_minute: int = Field(6000, ge=1)
    max_unfinished: int = Field(256, ge=1)
    """Samples that are being drawn or wait, jobs and batches included."""
    voxels_per_hour: int = Field(100_000_000_000, ge=1)


_GRANTS = TypeAdapter(dict[str, Grant])


def load_tokens(folder: Path) -> dict[str, Grant]:
    """Owners, and what each may do.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / TOKENS_FILE
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    return _grants_in(path, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=8)
def _grants_in(path: Path, changed_ns: int, file_number: int) -> dict[str, Grant]:
    """Read again when another file has taken the place of the one that was read."""
    try:
        return _GRANTS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: no list of owners and hashes; delete it for new ones") from error


def add_token(folder: Path, owner: str, grant: Grant | None = None) -> str:
    """Makes a token for an owner, whose old one ends; it is told this once.

    Args:
        folder: of the service.
        owner: whose it is.
        grant: what they may do; None: everything, within the usual quotas.
    """
    token = secrets.token_urlsafe(32)
    granted = (grant or Grant()).model_copy(update={"hash": hashed(token)})
    tokens = load_tokens(folder) | {owner: granted}
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{TOKENS_FILE}"
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({name: one.model_dump() for name, one in tokens.items()}, file, indent=1)
    scratch.replace(folder / TOKENS_FILE)
    return token


def owner_of(tokens: dict[str, Grant], token: str) -> str | None:
    """Whose token this is; None: nobody's.

    Every hash is compared, in constant time: nobody learns from how long that takes.
    """
    mark, found = hashed(token), None
    for owner, known in tokens.items():
        if hmac.compare_digest(mark, known.hash):
            found = owner
    return found


def hashed(token: str) -> str:
    """What is kept of a token: SHA-256, in hex. Tokens are random and long: no salt is needed."""
    return hashlib.sha256(token.encode()).hexdigest()
