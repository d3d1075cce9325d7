"""What commits say cannot change unseen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from raysynth.errors import DamagedStore, RaysynthError
from raysynth.store.history import Commit, history
from raysynth.store.repository import open_repository
from raysynth.store.run import StoreRun
from raysynth.store.validate import summary, validate


def mark(root: zarr.Group) -> None:
    root["quarantine"].attrs["entries"] = [
        {"source": "a", "rule": "b", "reason": "c", "when": "2026-01-01T00:00:00+00:00"}
    ]


def told(url: Path) -> list[tuple[str, Commit]]:
    return list(history(open_repository(url)))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("history") / "store"
    with StoreRun(url, "ingest", "f") as run:
        run.declare(mark, "one unit", ["unit-1", "unit-2"])
        run.publish("all units")
    return url


def test_commits_tell_what_was_done(url: Path) -> None:
    (_, last), (_, first), (_, made) = told(url)
    assert (last.message, last.published, list(last.keys)) == ("all units", True, [])
    assert (first.message, first.published) == ("one unit", False)
    assert list(first.keys) == ["unit-1", "unit-2"]
    assert first.run == last.run == "run-ingest-f"
    assert (made.message, made.run) == ("Empty store", "")
    assert [one.message for one in summary(url).publications] == ["all units", "Empty store"]
    assert validate(url) == []


def test_no_flipped_bit_changes_them_in_silence(url: Path) -> None:
    truth = told(url)
    rng = np.random.default_rng(0)
    seen = 0
    for file in sorted((url / "snapshots").iterdir()):
        whole = file.read_bytes()
        for bit in rng.choice(8 * len(whole), 150, replace=False).tolist():
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            try:
                assert told(url) == truth
            except RaysynthError:
                seen += 1
        file.write_bytes(whole)
    assert seen > 100
    assert told(url) == truth


def test_a_commit_that_somebody_changed_is_damaged(url: Path, tmp_path: Path) -> None:
    other = tmp_path / "store"
    with StoreRun(other, "ingest", "f") as run:
        run.declare(mark, "one unit")
        run.publish("all units")
    session = open_repository(other).writable_session("main")
    zarr.open_group(session.store, mode="r+", zarr_format=3).attrs["created_by"] = "another"
    session.commit("by another program", metadata={"run": "x", "checksum": "0" * 12})
    with pytest.raises(DamagedStore, match=r"what commit .* says is damaged"):
        told(other)
    assert any("its checksum does not fit" in problem.what for problem in validate(other))
