"""The schema as JSON is the schema; shards follow their rule; the README's example runs."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import storage_schema
from storage_schema import v1
from tests.store.conftest import COUNT, SIZE, invented_index, invented_samples, make_store

FOLDER = Path(storage_schema.__file__).parent


def test_golden_json_equals_the_code() -> None:
    """The README says how to write it anew."""
    golden = json.loads((FOLDER / "v1.json").read_text())
    assert golden == json.loads(json.dumps(v1.as_json(), allow_nan=False))


def test_only_the_standard_library_is_needed() -> None:
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names | {"storage_schema"}, f"{file.name}: {name}"


@pytest.mark.parametrize(
    ("item", "rows"),
    [
        ((256, 256), 64),
        ((512, 512), 64),
        ((64, 64, 64), 64),
        ((128, 128, 128), 64),
        ((256, 256, 256), 8),
        ((512, 512, 512), 1),
        ((1024, 1024, 1024), 1),
    ],
)
def test_a_shard_is_64_samples_or_2_to_28_bytes(item: tuple[int, ...], rows: int) -> None:
    spec = v1.sample_set(1000, item)
    assert {array.shard[0] for array in spec.arrays} == {rows}
    hu = next(array for array in spec.arrays if array.name == "hu")
    assert hu.chunk == (1, *item)


@pytest.mark.parametrize(
    ("shape", "chunk", "shard"),
    [
        ((300, 512, 512), (8, 128, 128), (32, 512, 512)),
        ((300, 514, 768), (8, 128, 128), (32, 512, 512)),
        ((20, 186, 257), (8, 128, 128), (24, 256, 384)),
        ((5, 64, 64), (5, 64, 64), (5, 64, 64)),
    ],
)
def test_a_volume_has_shards_of_at_most_64_chunks(
    shape: tuple[int, ...], chunk: tuple[int, ...], shard: tuple[int, ...]
) -> None:
    for array in v1.volume(shape).arrays:
        assert (array.chunk, array.shard) == (chunk, shard)
        assert math.prod(array.shard) // math.prod(array.chunk) <= 64


def test_the_readme_names_everything() -> None:
    text = (FOLDER / "README.md").read_text()
    groups = json.loads((FOLDER / "v1.json").read_text())["groups"]
    for group in groups:
        assert f"`/{group['path']}`" in text, group["path"]
        for thing in group["arrays"] + group["attributes"]:
            assert f"`{thing['name'].removeprefix('index/')}`" in text, thing["name"]
    for value, name in v1.LABELS.items():
        assert f"| {value} | {name} |" in text


def test_the_readme_example_reads_a_store_without_raysynth(tmp_path: Path) -> None:
    make_store(str(tmp_path / "store"))
    [example] = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert "raysynth" not in example
    code = example + (
        "import sys\nassert 'raysynth' not in sys.modules\n"
        "print(hu.shape, int(hu.astype(int).sum()), layout.shape, box[0].tolist(), spacing_mm)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    total = int(invented_samples()["hu"][:64].astype(int).sum())
    box = invented_index()["box"][0].tolist()
    shape = (64, SIZE, SIZE)
    assert COUNT > 64
    assert done.stdout.strip().endswith(f"{shape} {total} {shape} {box} [2.5, 0.7, 0.7]")
