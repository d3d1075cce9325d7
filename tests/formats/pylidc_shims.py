"""Makes the real pylidc 0.2.3 importable beside current numpy and setuptools, to compare with."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def import_pylidc(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """pylidc itself; what it needs put in place is gone again after the test."""
    resources = ModuleType("pkg_resources")
    resources.resource_filename = lambda package, name: str(  # type: ignore[attr-defined]
        Path(find_spec(package).origin).with_name(name)
    )
    monkeypatch.setitem(sys.modules, "pkg_resources", resources)
    for name, builtin in (("int", int), ("float", float)):
        monkeypatch.setattr(np, name, builtin, raising=False)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pylidc
        import pylidc.utils
    return pylidc
