"""What imports what, and how light the first import is."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["raysynth", "raysynth.config", "raysynth.cli"])
def test_light_modules_load_neither_torch_nor_ray(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'ray', 'monai') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "[]"


def test_the_command_line_imports_typer_alone() -> None:
    code = "import sys, raysynth.cli; print([m for m in ('numpy', 'pydantic') if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "[]"


def test_networks_load_without_the_large_packages_they_do_not_need() -> None:
    code = (
        "import sys, raysynth.models.bundle\n"
        "print([m for m in ('torchvision', 'transformers') if m in sys.modules])\n"
        "import torchvision"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "[]"
