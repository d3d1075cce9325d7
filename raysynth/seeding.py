"""Seeds and pseudonyms: everything random or hidden follows from an identity, never from order."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import string
from pathlib import Path

from raysynth.errors import InputError

KEY_BYTES = 32

SPLIT_SALT = "raysynth-split-1"
"""Public, and never changed: the same patient falls in the same split in every store."""


def seed_of(*identity: str | int) -> int:
    """A 63-bit seed that depends on the given identity alone, on every machine."""
    text = json.dumps(identity, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def unit_interval(*identity: str | int) -> float:
    """A number in [0, 1) that depends on the given identity alone."""
    return (seed_of(*identity) >> 10) / 2**53


def fingerprint(value: object) -> str:
    """Twelve hex digits naming a JSON-serialisable value (keys sorted)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def pseudonym(key: bytes, kind: str, identifier: str) -> str:
    """A keyed hash (HMAC-SHA-256, 16 hex digits) that stands for a patient or series.

    Nobody without `key` can test whether a known identifier is in a store.
    """
    # Names of files may be any bytes, which Python keeps as halves of surrogate pairs.
    text = f"{kind}:{identifier}".encode("utf-8", "surrogateescape")
    digest = hmac.new(key, text, hashlib.sha256)
    return digest.hexdigest()[:16]


def load_key(path: Path) -> bytes:
    """Reads the pseudonym key, or makes one (32 random bytes, readable by its owner alone).

    Raises:
        InputError: the file holds no such key.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        # Written whole before it gets its name; whoever comes second uses the first one's.
        scratch = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, path)
        except FileExistsError:
            pass
        except OSError:  # no hard links there: a second process may not start at the same moment
            scratch.rename(path)
        finally:
            scratch.unlink(missing_ok=True)
    text = path.read_text().strip()
    if len(text) != 2 * KEY_BYTES or set(text) - set(string.hexdigits):
        raise InputError(
            f"pseudonym key {path}: expected {2 * KEY_BYTES} hex digits; restore it from a copy, "
            "or delete it and ingest into a new store"
        )
    return bytes.fromhex(text)
