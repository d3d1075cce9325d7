"""A run is published whole or not at all, and goes on after a kill at any point."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import zarr

from raysynth.errors import InputError, StoreConflict
from raysynth.store.reader import SampleSet
from raysynth.store.repository import main_snapshot, open_repository, open_root
from raysynth.store.run import StoreRun, discard_run
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import sample_set
from tests.store.conftest import SET_ATTRIBUTES, declare_samples, invented_samples

PATH = "samples/slices"


def fill(fork: object, first_row: int, value: int | None = None) -> object:
    """What a worker does: one shard through its own copy of the fork."""
    fork = pickle.loads(pickle.dumps(fork))
    group = zarr.open_group(fork.store, mode="r+")[PATH]
    rows = {name: values[first_row : first_row + 64] for name, values in invented_samples().items()}
    if value is not None:
        rows["hu"] = np.full_like(rows["hu"], value)
    write_rows(group, first_row, rows)
    return pickle.loads(pickle.dumps(fork))


def steps(run: StoreRun) -> Iterator[str]:
    """A verb as drivers write it, with a pause wherever it may be killed."""
    yield "opened"
    if run.is_new:
        run.declare(declare_samples, "Declare")
        yield "declared"
    for first_row in (0, 64, 128):
        key = f"rows-{first_row}"
        if key in run.completed:
            continue
        fork = run.fork()
        yield f"{key} forked"
        returned = fill(fork, first_row)
        yield f"{key} filled"
        run.commit([returned], [key], f"Rows {first_row}")
        yield f"{key} committed"
    run.publish("Three shards")
    yield "published"


STEPS = 12


def assert_samples(url: str) -> None:
    samples = SampleSet(open_root(url)[PATH])
    for name, values in invented_samples().items():
        np.testing.assert_array_equal(samples.read(name), values)


def assert_complete(url: str) -> None:
    assert_samples(url)
    assert open_repository(url).list_branches() == {"main"}


def test_an_uninterrupted_run(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "store")
    with StoreRun(url, "shard", "abc") as run:
        assert len(list(steps(run))) == STEPS
        assert run.completed == {"rows-0", "rows-64", "rows-128"}
        # The run may still look at what it has published.
        assert SampleSet(run.root[PATH]).count == 130
    assert_complete(url)
    assert open_root(url).attrs["last_run"]["message"] == "Three shards"


def test_a_second_run_of_the_same_name_resumes_too(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    for name in ("first", "second"):
        with StoreRun(url, "ingest", "abc") as run:
            run.declare(lambda root, name=name: root.create_group(name), f"{name} half", [name])
        with StoreRun(url, "ingest", "abc") as run:
            assert run.completed == {name}
            run.publish(name)
    assert {"first", "second"} <= set(open_root(url).group_keys())


@pytest.mark.parametrize("kill_after", range(1, STEPS))
def test_resumes_wherever_it_was_stopped(tmp_path: Path, kill_after: int) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "shard", "abc") as run:
        before = main_snapshot(url)
        for _, step in zip(range(kill_after), steps(run), strict=False):
            if step != "published":
                assert main_snapshot(url) == before
        done = run.completed
    assert PATH not in open_root(url) or kill_after == STEPS
    with StoreRun(url, "shard", "abc") as run:
        assert run.completed == done
        list(steps(run))
    assert_complete(url)


def test_resumes_between_moving_main_and_deleting_the_branch(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "shard", "abc") as run:
        list(steps(run))
    repository = open_repository(url)
    repository.create_branch("run-shard-abc", repository.lookup_branch("main"))
    with StoreRun(url, "shard", "abc") as run:
        assert run.is_new
        assert run.publish("nothing to do") == main_snapshot(url)
    assert_complete(url)


def test_survives_a_kill(tmp_path: Path) -> None:
    """The operating system's kind of kill: no exception, no exit handler, the lock left behind."""
    url = str(tmp_path / "store")
    code = (
        "import os\n"
        "from raysynth.store.run import StoreRun\n"
        "from tests.store.test_run import steps\n"
        f"with StoreRun({url!r}, 'shard', 'abc') as run:\n"
        "    for step in steps(run):\n"
        "        if step == 'rows-64 filled':\n"
        "            os._exit(137)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 137
    assert PATH not in open_root(url)
    with StoreRun(url, "shard", "abc") as run:
        assert run.completed == {"rows-0"}
        list(steps(run))
    assert_complete(url)


def test_a_kill_while_the_store_is_made(tmp_path: Path) -> None:
    (tmp_path / ".store.raysynth-draft" / "snapshots").mkdir(parents=True)
    with StoreRun(str(tmp_path / "store"), "shard", "abc") as run:
        list(steps(run))
    assert_complete(str(tmp_path / "store"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock"]


def files_in(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time stamp and content of each file, by its path inside."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_readers_see_old_or_new_whatever_files_of_a_commit_exist(tmp_path: Path) -> None:
    """Cuts a whole run off after each file that it wrote, in the order of writing."""
    url = tmp_path / "store"
    with StoreRun(str(url), "first", "1") as run:
        run.publish("empty")
    old = files_in(url)
    states = [{path: data for path, (_, data) in old.items()}]
    with StoreRun(str(url), "shard", "abc") as run:
        for _ in steps(run):
            new = files_in(url)
            written = [path for path in new if new[path] != old.get(path)]
            written.sort(key=lambda path: new[path][0])
            # Nobody knows the order of files with one time stamp: they come together.
            for _, group in groupby(written, key=lambda path: new[path][0]):
                states.append(states[-1] | {path: new[path][1] for path in group})
            states += [{path: states[-1][path] for path in new}] * bool(old.keys() - new.keys())
            old = new
    assert len(states) > STEPS
    seen = []
    for number, files in enumerate(states):
        cut = tmp_path / str(number)
        for path, data in files.items():
            (cut / path).parent.mkdir(parents=True, exist_ok=True)
            (cut / path).write_bytes(data)
        seen.append(PATH in open_root(cut))
        if seen[-1]:
            assert_samples(str(cut))
    # With its last file the run moves main; then its branch goes.
    assert seen == [False] * (len(states) - 2) + [True] * 2
    assert_complete(str(cut))


def test_a_run_with_nothing_to_do(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "ingest", "1") as run:
        first = run.publish("nothing")
    with StoreRun(url, "ingest", "1") as run:
        run.commit([], ["refused-case"], "Nothing of it is kept")
        assert run.completed == {"refused-case"}
        assert run.publish("nothing") == first == main_snapshot(url)


def test_the_driver_can_add_to_a_commit(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "shard", "abc") as run:
        run.declare(declare_samples, "Declare", keys=["declared"])
        run.commit(
            [fill(run.fork(), 0)],
            ["rows-0"],
            "Rows 0",
            build=lambda root: set_index(root[PATH], {"split": np.full(64, 2)}),
        )
        assert SampleSet(run.root[PATH]).index["split"].tolist() == [2] * 64 + [0] * 66
    with StoreRun(url, "shard", "abc") as run:
        assert run.completed == {"declared", "rows-0"}


def test_the_loser_of_a_race_is_told_and_keeps_its_work(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "shard", "slow") as run:
        for step in steps(run):
            if step == "rows-0 committed":
                break
    with StoreRun(url, "shard", "fast") as run:
        list(steps(run))
    with pytest.raises(StoreConflict, match=r"branch run-shard-slow.*discard_run\("):
        StoreRun(url, "shard", "slow").__enter__()
    repository = open_repository(url)
    kept = repository.readonly_session("run-shard-slow").store
    samples = SampleSet(zarr.open_group(kept, mode="r")[PATH])
    np.testing.assert_array_equal(samples.read("hu", 0, 64), invented_samples()["hu"][:64])
    assert SampleSet(open_root(url)[PATH]).count == 130
    discard_run(url, "run-shard-slow")
    with StoreRun(url, "shard", "slow") as run:
        assert run.is_new
    with pytest.raises(InputError, match="unpublished runs: run-shard-slow"):
        discard_run(url, "run-shard-other")


def test_main_moves_while_a_run_is_at_work(tmp_path: Path) -> None:
    """Only an object store allows it: there is no lock there."""
    url = str(tmp_path / "store")
    with StoreRun(url, "shard", "abc") as run:
        run.declare(declare_samples, "Declare")
        session = open_repository(url).writable_session("main")
        zarr.open_group(session.store).attrs["somebody"] = "else"
        moved = session.commit("Somebody else")
        with pytest.raises(StoreConflict, match="branch run-shard-abc"):
            run.publish("too late")
        assert main_snapshot(url) == moved


def test_two_processes_on_one_branch(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, "shard", "abc") as run:
        run.declare(declare_samples, "Declare")
        session = open_repository(url).writable_session("run-shard-abc")
        zarr.open_group(session.store).attrs["somebody"] = "else"
        session.commit("Somebody else")
        with pytest.raises(StoreConflict, match="another process works on branch run-shard-abc"):
            run.commit([], ["a"], "", build=lambda root: root.attrs.update(mine=1))


def test_a_store_has_one_writer(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with (
        StoreRun(url, "shard", "abc"),
        pytest.raises(StoreConflict, match=r"written by run-shard-abc \(process \d+ on .*\): wait"),
        StoreRun(url, "ingest", "1"),
    ):
        pass
    with StoreRun(url, "ingest", "1"):
        pass


@pytest.fixture
def declared(tmp_path: Path) -> Iterator[StoreRun]:
    with StoreRun(str(tmp_path / "store"), "shard", "abc") as run:
        run.declare(declare_samples, "Declare")
        yield run


def test_a_unit_has_one_owner(declared: StoreRun) -> None:
    declared.commit([fill(declared.fork(), 0)], ["a"], "")
    with pytest.raises(StoreConflict, match="unit a would be committed twice"):
        declared.commit([], ["a"], "")
    with pytest.raises(StoreConflict, match="unit b would be committed twice"):
        declared.commit([], ["b", "b"], "")


def test_a_shard_has_one_owner(declared: StoreRun) -> None:
    first, second = (fill(declared.fork(), 64, value) for value in (1, 2))
    with pytest.raises(StoreConflict, match=r"shard \[1, 0, 0\] of /samples/slices/\w+ has two"):
        declared.commit([first, second], ["a", "b"], "")
    declared.commit([first], ["a"], "")
    with pytest.raises(StoreConflict, match=r"shard \[1, 0, 0\] .* has two owners"):
        declared.commit([second], ["b"], "")
    with StoreRunOf(declared) as resumed, pytest.raises(StoreConflict, match="two owners"):
        resumed.commit([second], ["b"], "")


class StoreRunOf:
    """The same run, stopped and started again."""

    def __init__(self, run: StoreRun) -> None:
        self._run = run

    def __enter__(self) -> StoreRun:
        self._run.__exit__(None, None, None)
        return StoreRun(self._run.url, self._run.verb, self._run.fingerprint).__enter__()

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "misdeed",
    [
        lambda root: root[PATH]["hu"].resize((5, 24, 24)),
        lambda root: root[PATH].attrs.update(pixel_mm=2),
        lambda root: root["quarantine"].attrs.update(entries=[1]),
        lambda root: root[PATH]["index"].__delitem__("box"),
    ],
    ids=["resize", "attributes", "quarantine", "delete"],
)
def test_workers_change_nothing_but_their_shards(declared: StoreRun, misdeed: object) -> None:
    fork = declared.fork()
    misdeed(zarr.open_group(fork.store, mode="r+"))
    with pytest.raises(StoreConflict, match="which only the driver may"):
        declared.commit([fork], ["a"], "")


def test_workers_may_make_groups_of_their_own(declared: StoreRun) -> None:
    forks = [declared.fork(), declared.fork(), declared.fork()]
    for fork, name in zip(forks, ("a", "b", "b"), strict=True):
        root = zarr.open_group(fork.store, mode="r+")
        attributes = {**SET_ATTRIBUTES, "cases": []}
        create_sample_set(root, f"samples/{name}", sample_set(3, (4, 4)), attributes)
    declared.commit(forks[:2], ["a", "b"], "")
    assert {"a", "b"} <= set(declared.root["samples"])
    with pytest.raises(StoreConflict, match="two owners"):
        declared.commit(forks[2:], ["c"], "")
