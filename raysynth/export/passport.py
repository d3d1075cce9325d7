"""What a synthetic sample says of itself, and a seal that shows whether anything was changed.

A passport is JSON: the bundle's digest, recipe, seed, request, layout, data snapshot, the share of
copied voxels, and the audit's scores. In a file it also holds the hash of the file's own voxels and
a seal over all of it. Whoever changes both file and seal is not found out: a seal is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Passport = dict[str, Any]

Content = Literal["image", "labels", "preview", "text", "set"]
"""What a file holds: HU, a label map, an 8-bit picture, words alone, or what is said of a whole
folder."""

SEAL, VOXELS, GEOMETRY, CONTENT = "seal", "voxels", "geometry", "content"

TOLERANCE_MM = 1e-3
"""Formats round sizes and places."""

MAX_BYTES = 1_000_000
"""Of a passport that is read."""


def voxel_hash(values: NDArray[Any]) -> str:
    """SHA-256 over type, shape and little-endian bytes, last axis fastest.

    Axes of one voxel do not count: a slice is a volume of one plane.

    Args:
        values: whole numbers.
    """
    kept = np.squeeze(values)
    little = np.ascontiguousarray(kept, kept.dtype.newbyteorder("<"))
    name = f"{little.dtype.kind}{little.dtype.itemsize} {'x'.join(map(str, little.shape))} "
    return hashlib.sha256(name.encode() + little.tobytes()).hexdigest()


def sealed(
    passport: Passport,
    content: Content,
    values: NDArray[Any] | None = None,
    geometry: Sequence[float] | None = None,
) -> Passport:
    """The passport as it goes into one file.

    Args:
        passport: of the sample.
        content: what the file holds.
        values: its voxels; None: it has none.
        geometry: millimetres that say where they lie, as the format has them; None: it does not.
    """
    own = passport | {"synthetic": True, CONTENT: content}
    if values is not None:
        own[VOXELS] = voxel_hash(values)
    if geometry is not None:
        own[GEOMETRY] = list(geometry)
    return own | {SEAL: _seal(own)}


def flaw(
    passport: Passport,
    values: NDArray[Any] | None = None,
    geometry: Sequence[float] | None = None,
) -> str | None:
    """What was altered since it was sealed; None: nothing.

    Args:
        passport: as it was found.
        values: the voxels of its file.
        geometry: likewise.
    """
    own = {name: value for name, value in passport.items() if name != SEAL}
    if passport.get(SEAL) != _seal(own):
        return "its passport"
    if own.get("synthetic") is not True:
        return "its mark"
    if (VOXELS in own, GEOMETRY in own) != (values is not None, geometry is not None):
        return "what it holds"
    if geometry is not None:
        told = own[GEOMETRY]
        is_like = isinstance(told, list) and len(told) == len(geometry)
        if not is_like or not np.allclose(told, geometry, 0, TOLERANCE_MM):
            return "its geometry"
    if values is not None and own[VOXELS] != voxel_hash(values):
        return "its voxels"
    return None


def packed(passport: Passport) -> bytes:
    """As bytes that are always the same."""
    return json.dumps(passport, sort_keys=True, allow_nan=False).encode()


def unpacked(content: bytes | str) -> Passport | None:
    """A passport out of bytes; None: these are not one."""
    if len(content) > MAX_BYTES:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and SEAL in found else None


def _seal(own: Passport) -> str:
    try:
        return hashlib.sha256(packed(own)).hexdigest()
    except ValueError:  # not a number: nobody sealed that
        return ""
