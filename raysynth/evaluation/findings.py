"""Files of what was found out: whoever reads one sees the old one or the new one, whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_findings(path: Path, found: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step; what is no number is refused."""
    replace_file(path, json.dumps(found, indent=1, allow_nan=False).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    scratch.write_bytes(data)
    scratch.replace(path)
