"""Who may ask: bearer tokens, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from raysynth.errors import InputError

FOLDER, TOKENS_FILE = "serving", "tokens.json"
"""Below a recipe's work_dir; the file within it."""


def load_tokens(folder: Path) -> dict[str, str]:
    """Owner -> SHA-256 of the token, in hex.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / TOKENS_FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(
            isinstance(one, str) for pair in found.items() for one in pair
        ):
            raise ValueError
    except ValueError as error:
        raise InputError(f"{path}: no list of owners and hashes; delete it for new ones") from error
    return found


def add_token(folder: Path, owner: str) -> str:
    """Makes a token for an owner, whose old one ends; it is told this once."""
    token = secrets.token_urlsafe(32)
    tokens = load_tokens(folder) | {owner: _hash(token)}
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{TOKENS_FILE}"
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(tokens, file, indent=1)
    scratch.replace(folder / TOKENS_FILE)
    return token


def owner_of(tokens: dict[str, str], token: str) -> str | None:
    """Whose token this is; None: nobody's.

    Every hash is compared, in constant time: nobody learns from how long that takes.
    """
    hashed, found = _hash(token), None
    for owner, known in tokens.items():
        if hmac.compare_digest(hashed, known):
            found = owner
    return found


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
