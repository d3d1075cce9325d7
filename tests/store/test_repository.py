"""What is no store is refused in one line, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import icechunk
import pytest
import zarr

from raysynth.errors import InputError
from raysynth.store.repository import main_snapshot, open_repository, open_root
from raysynth.store.run import StoreRun
from tests.store.conftest import make_store


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no store at") as error:
        open_root(tmp_path / "none")
    assert str(tmp_path / "none") in one_line(error)
    assert not (tmp_path / "none").exists()


def _foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "scan.dcm").write_bytes(b"DICM")


def _zarr_v2(path: Path) -> None:
    zarr.create_group(str(path), zarr_format=2).create_array("hu", shape=(4,), dtype="int16")


def _file(path: Path) -> None:
    path.write_text("x")


def _other_repository(path: Path) -> None:
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(path)))
    session = repository.writable_session("main")
    zarr.create_group(session.store).create_array("hu", shape=(4,), dtype="int16")
    session.commit("not ours")


@pytest.mark.parametrize("make", [_foreign_folder, _zarr_v2, _file, _other_repository])
@pytest.mark.parametrize("create", [False, True])
def test_something_else(tmp_path: Path, make: object, create: bool) -> None:
    make(tmp_path / "thing")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"not a (raysynth )?store") as error:
        open_repository(tmp_path / "thing", create=create)
    one_line(error)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_become_a_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a store"):
        open_root(tmp_path)
    (tmp_path / "empty").mkdir()
    open_repository(tmp_path / "empty", create=True)
    assert open_root(tmp_path / "empty").attrs["schema_version"] == "1.0"


def test_another_schema_version(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "make", "1") as run:
        run.declare(lambda root: root.attrs.update(schema_version="2.0"), "From the future")
        run.publish("made")
    with pytest.raises(
        InputError, match=r"schema version '2.0', this raysynth reads '1.0'"
    ) as error:
        open_root(url)
    one_line(error)


def test_a_damaged_repository(tmp_path: Path) -> None:
    url = tmp_path / "store"
    make_store(str(url))
    for file in (url / "snapshots").iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be opened") as error:
        open_root(url)
    one_line(error)


def test_snapshots_stay(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "first", "1") as run:
        first = run.publish("empty")
    make_store(url)
    assert first != main_snapshot(url)
    assert "slices" not in open_root(url, first)["samples"]
    assert "slices" in open_root(url)["samples"]
    with pytest.raises(InputError, match="has no snapshot 'x'"):
        open_root(url, "x")


@pytest.mark.parametrize("url", ["gs://bucket/store", "s3://bucket", "s3:///store"])
def test_addresses_that_cannot_be(url: str) -> None:
    with pytest.raises(InputError, match="s3://bucket/prefix"):
        open_root(url)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        StoreRun(str(tmp_path / "file" / "store"), "make", "1").__enter__()
