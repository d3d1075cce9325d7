"""The smallest recipe that shows everything, and what a store of it holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from raysynth.config import ExperimentConfig
from raysynth.store.repository import open_root

TINY_SOURCE: dict[str, Any] = {
    "kind": "phantom",
    "num_patients": 4,
    "spacing_mm": (8.0, 5.0, 5.0),
}


def tiny_config(work_dir: Path, **data: Any) -> ExperimentConfig:
    """The recipe in `work_dir`, with other sections of `data` if given."""
    samples = {"size": 32, "spacing_mm": 4.0, "nodule_free_every": 2}
    values = {
        "name": "tiny",
        "work_dir": work_dir,
        "data": {"source": TINY_SOURCE, "samples": samples} | data,
        "model": {"family": "autoencoder_kl", "channels": (8, 8, 8), "norm_num_groups": 4},
    }
    return ExperimentConfig.model_validate(values)


def content(url: str) -> dict[str, str]:
    """Path -> digest of every group's attributes and every array's values.

    Left out is what differs between two stores of the same content: snapshot ids (and the checksum
    of attributes that hold one) and times.
    """
    root = open_root(url)
    digests = {"": _digest(_lasting(root.attrs.asdict()))}
    for path, node in sorted(root.members(max_depth=None)):
        values = node[:].tobytes() if isinstance(node, zarr.Array) else b""
        digests[path] = _digest(_lasting(node.attrs.asdict()), values)
    return digests


def _lasting(attributes: dict[str, Any]) -> dict[str, Any]:
    entries = [{**entry, "when": ""} for entry in attributes.get("entries", [])]
    ids = ("parent_snapshot", "checksum")
    kept = {key: value for key, value in attributes.items() if key not in ids}
    return kept | ({"entries": entries} if entries else {})


def _digest(attributes: dict[str, Any], values: bytes = b"") -> str:
    text = json.dumps(attributes, sort_keys=True, default=np.ndarray.tolist)
    return hashlib.sha256(text.encode() + values).hexdigest()
