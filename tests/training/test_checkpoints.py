from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from raysynth.seeding import fingerprint
from raysynth.training.checkpoints import CheckpointFolder
from raysynth.training.saving import Key, Saver

FILES = ("rank-00000.safetensors", "rank-00001.safetensors")


def write(folder: CheckpointFolder, seen_samples: int) -> Path:
    """As two workers would, one after the other."""
    folder.stage(seen_samples)
    for rank in (1, 0):
        values = torch.randn(60, generator=torch.Generator().manual_seed(seen_samples + rank))
        saver = Saver(folder, rank, 2)
        saver.save(seen_samples, {Key("weight", "w", 60 * rank): values}, {"seen": seen_samples})
        saver.wait()
    return folder.path(seen_samples)


def newest(folder: CheckpointFolder) -> int | None:
    checkpoint = folder.newest_valid()
    return None if checkpoint is None else checkpoint.state["seen"]


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run", keep=2)
    assert newest(folder) is None
    for seen in (10, 20, 30):
        write(folder, seen)
        assert newest(folder) == seen
    kept = sorted(path.name for path in folder.root.glob("seen-*"))
    assert kept == ["seen-000000000020", "seen-000000000030"]
    assert (folder.root / "latest").read_text() == "seen-000000000030"


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    write(folder, 10)
    path = write(folder, 20)
    files = [file for file in path.rglob("*") if file.is_file()]
    chance = random.Random(0)
    for trial in range(200):
        file = chance.choice(files)
        whole = file.read_bytes()
        bit = chance.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        # A manifest may lose a blank or gain a new line and still say the same.
        if file.name == "manifest.json" and same_json(bytes(flipped), whole):
            continue
        assert newest(folder) == 10, (trial, file, bit)
        file.write_bytes(whole)
        assert newest(folder) == 20


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_what_a_killed_writer_leaves_behind_does_no_harm(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    write(folder, 10)
    folder.stage(20)  # killed while it wrote its files
    (folder.staging(20) / FILES[0]).write_bytes(b"half")
    assert newest(folder) == 10
    path = write(folder, 20)
    assert newest(folder) == 20
    assert [file.name for file in tmp_path.glob(".writing-*")] == []

    (tmp_path / "latest").write_text("seen-000000000010")  # killed before the pointer moved
    assert newest(folder) == 10
    write(folder, 20)
    assert newest(folder) == 20
    shutil.rmtree(path)  # a pointer to nothing
    assert newest(folder) == 10


def killed_at(folder: CheckpointFolder, seen_samples: int, operation: int) -> bool:
    """Writes a checkpoint in a child that dies at its n-th file operation; False if it ended."""
    child = os.fork()
    if child == 0:
        operations = 0

        def count(event: str, _: object) -> None:
            nonlocal operations
            if event == "open" or event.startswith(("os.", "shutil.")):
                operations += 1
                if operations == operation:
                    os._exit(9)

        try:
            sys.addaudithook(count)
            write(folder, seen_samples)
            os._exit(0)
        finally:  # an error must not go on as a second pytest
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, 9), f"the child that should die at operation {operation} failed"
    return ended == 9


def test_a_kill_at_any_file_operation_costs_at_most_that_checkpoint(tmp_path: Path) -> None:
    operation = 1
    while True:
        folder = CheckpointFolder(tmp_path / str(operation), keep=1)
        write(folder, 10)
        killed = killed_at(folder, 20, operation)
        assert newest(folder) in ((10, 20) if killed else (20,)), operation
        write(folder, 20)
        assert newest(folder) == 20
        assert [file.name for file in folder.root.glob(".writing-*")] == []
        if not killed:
            break
        operation += 1
    assert operation > 20


def test_a_run_that_fell_back_drops_the_damaged_future(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    write(folder, 10)
    folder.keep = 2
    (write(folder, 30) / FILES[1]).unlink()
    assert newest(folder) == 10
    folder.keep = 1
    write(folder, 20)
    assert [path.name for path in tmp_path.glob("seen-*")] == ["seen-000000000020"]


def test_nothing_outside_a_checkpoint_is_opened(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run", keep=3)
    write(folder, 10)
    path = write(folder, 20)
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    for name in (str(secret), "../../secret"):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = hashlib.sha256(b"x").hexdigest()
        del manifest["digest"]
        manifest["digest"] = fingerprint(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        assert newest(folder) == 10
    # Nor is what somebody added.
    again = write(folder, 30)
    (again / "extra.pt").write_bytes(b"x")
    assert newest(folder) == 10


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"{", b"\xff\xfe"])
def test_a_manifest_that_is_none_counts_as_damage(tmp_path: Path, content: bytes) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    write(folder, 10)
    (write(folder, 20) / "manifest.json").write_bytes(content)
    assert newest(folder) == 10
