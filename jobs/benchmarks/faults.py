"""Kills, failing disks and flipped bits: what a store survives (rules R1 to R5).

python -m jobs.benchmarks.faults [--full] [--only R3] [--studies 8] [--kills 2] [--crashes 20]
                                 [--disks 10] [--flips 60]

R1  SIGKILL of a busy ingest worker at a random time.
R2  SIGKILL of the ingest driver at a random time; then the same command again.
R3  SIGKILL at file operation k of a run that adds a case (a write dies half done); then again.
    `--crashes` are spread evenly over all k.
R4  From file operation k on the disk is full, broken or forbidden; or no file may grow; or every
    operation takes 5 ms; then again on a sound disk.
R5  One flipped bit in a shard, manifest or snapshot.

After each, what readers see is compared with a run that nobody disturbed: cases that are lost,
duplicated (or committed twice) and torn (other content, or `validate` finds a fault), and damage
that nothing told of. `broken` counts other promises: a rerun that fails, more work begun again than
the workers had in hand, an error that does not name the store. `--full` does what a release asks
for: 50 kills each among 40 studies, every k, 40 disks, 1,000 flips. File operations are counted and
failed by a small library, so a C compiler is needed. Exits 1 unless every count is 0.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr

from jobs.benchmarks.ingest import recipe, write_scans
from raysynth.case import Case, Label
from raysynth.data import ingest as ingest_stage
from raysynth.errors import RaysynthError
from raysynth.session import connect
from raysynth.store.history import history
from raysynth.store.reader import case_ids, checked_attributes, open_group, read_case
from raysynth.store.repository import open_repository, open_root
from raysynth.store.run import StoreRun
from raysynth.store.validate import validate
from raysynth.store.writer import create_volume, write_volume
from raysynth.volume import Volume

FEW = {"studies": 8, "kills": 2, "crashes": 20, "disks": 10, "flips": 60}
FULL = {"studies": 40, "kills": 50, "crashes": 10**9, "disks": 40, "flips": 1000}
COLUMNS = ("runs", "lost", "duplicated", "torn", "silent", "broken")
WORKERS = 2

Content = dict[str, str]


@dataclass
class Outcome:
    """What the runs of a rule did to the store."""

    rule: str
    runs: int = 0
    lost: int = 0
    duplicated: int = 0
    torn: int = 0
    silent: int = 0
    broken: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there were runs, and every other count is 0."""
        return self.runs > 0 and not any(getattr(self, name) for name in COLUMNS[1:])

    def judge(self, url: Path, expected: Content) -> None:
        """Compares what readers see, without any error, with what they should."""
        found, commits = content(url), committed(url)
        lost = len(expected.keys() - found.keys())
        twice = len(found.keys() - expected.keys()) + commits.total() - len(commits)
        torn = sum(found[name] != expected[name] for name in found.keys() & expected.keys())
        torn += len(validate(url, full=True))
        self.lost, self.duplicated, self.torn = (
            self.lost + lost,
            self.duplicated + twice,
            self.torn + torn,
        )
        self.silent += (lost + twice + torn) > 0

    def promise(self, kept: bool, why: str) -> None:
        """Counts a broken promise, and keeps one reason."""
        if not kept:
            self.broken += 1
            self.notes["broken"] = why.strip()[-300:]


def content(url: Path, snapshot: str | None = None) -> Content:
    """Case -> digest of its attributes and voxels; nothing where there is no store yet."""
    if not url.exists():
        return {}
    root, digests = open_root(url, snapshot), {}
    for case_id in case_ids(root):
        case = read_case(root, case_id)
        attributes = checked_attributes(open_group(root, f"volumes/{case_id}"))
        digest = hashlib.sha256(json.dumps(attributes, sort_keys=True).encode())
        digest.update(case.volume.hu.tobytes())
        digest.update(b"" if case.layout is None else case.layout.tobytes())
        digests[case_id] = digest.hexdigest()
    return digests


def committed(url: Path) -> Counter[str]:
    """How often each case was committed on the way to main."""
    past = history(open_repository(url))
    return Counter(key for _, commit in past for key in commit.keys)


def main(arguments: list[str]) -> int:
    """Runs the rules, or as a child one ingest; returns the exit code."""
    parser = argparse.ArgumentParser()
    for name, count in FEW.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--full", action="store_true", help="the counts of a release")
    parser.add_argument("--only", help="rules to run, for example R1,R3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ingest", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.ingest:
        with connect():
            run_ingest(*options.ingest)
        return 0
    if options.full:
        vars(options).update(FULL)
    rules = (options.only or "R1,R2,R3,R4,R5").split(",")
    chance, started, outcomes = random.Random(options.seed), time.perf_counter(), []
    # Ray prints every worker that died.
    with (
        tempfile.TemporaryDirectory(prefix="raysynth-faults-") as folder,
        redirect_stdout(sys.stderr),
    ):
        work = Path(folder)
        if {"R1", "R2"} & set(rules):
            outcomes += kill_ingests(work, rules, options.studies, options.kills, chance)
        if {"R3", "R4"} & set(rules):
            outcomes += fail_disks(work, rules, options.crashes, options.disks, chance)
        if "R5" in rules:
            outcomes.append(flip_bits(work, options.flips, chance))
    return _report(outcomes, {"seed": options.seed, "seconds": time.perf_counter() - started})


def _report(outcomes: list[Outcome], facts: dict[str, Any]) -> int:
    print(f"{'rule':26}" + "".join(f"{name:>11}" for name in COLUMNS) + "  notes")
    for outcome in outcomes:
        counts = "".join(f"{getattr(outcome, name):11}" for name in COLUMNS)
        notes = ", ".join(f"{name} {value}" for name, value in outcome.notes.items())
        print(f"{outcome.rule:26}{counts}  {' '.join(notes.split())}")
    passed = all(outcome.passed for outcome in outcomes)
    print(json.dumps({**facts, "passed": passed, "rules": [asdict(one) for one in outcomes]}))
    return int(not passed)


# R1 and R2: ingests on Ray


@dataclass(frozen=True)
class Undisturbed:
    """An ingest of `scans` into `folder`, and how long another one takes."""

    scans: Path
    folder: Path
    expected: Content
    seconds: float

    def again(self, out: Path) -> Path:
        """A new folder with the same pseudonym key: cases get the same names there."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        shutil.copy(self.folder / "pseudonym.key", out)
        return out


def kill_ingests(
    work: Path, rules: list[str], studies: int, kills: int, chance: random.Random
) -> list[Outcome]:
    """Kills workers, then drivers, all in one Ray session."""
    write_scans(work / "scans", studies, slices=16, side=128)
    with connect(num_cpus=WORKERS):
        import ray

        clean = work / "clean"
        for out in (work / "warm-up", clean):
            started = time.perf_counter()
            run_ingest(work / "scans", out, out / "notes")
        seconds = time.perf_counter() - started
        usual = Undisturbed(work / "scans", clean, content(clean / "store"), seconds)
        assert len(usual.expected) == studies, f"{len(usual.expected)} of {studies} are stored"
        outcomes = []
        if "R1" in rules:
            outcomes.append(_kill_workers(usual, work / "killed", kills, chance))
        if "R2" in rules:
            address = ray.get_runtime_context().gcs_address
            outcomes.append(_kill_drivers(usual, work / "driven", kills, address, chance))
    return outcomes


def run_ingest(scans: Path, out: Path, notes: Path) -> None:
    """Ingests the scans; every case that a worker begins leaves a file in `notes`."""
    notes.mkdir(parents=True, exist_ok=True)
    write = ingest_stage._write_case

    # Ray ships a function inside a function as it is: its workers need not import this module.
    def note(root: zarr.Group, ref: Any) -> Any:
        (notes / f"{ref.case_id}-{uuid.uuid4().hex}").touch()
        return write(root, ref)

    ingest_stage._write_case = note
    try:
        ingest_stage.ingest(recipe(scans, out))
    finally:
        ingest_stage._write_case = write


def _kill_workers(usual: Undisturbed, out: Path, kills: int, chance: random.Random) -> Outcome:
    outcome, again = Outcome("R1 ingest worker killed"), []
    for _ in range(3 * kills):
        if outcome.runs == kills:
            break
        usual.again(out)
        ended, killed = threading.Event(), list[int]()
        delay_s = chance.uniform(0, usual.seconds)
        killer = threading.Thread(target=_kill_busy_worker, args=(delay_s, ended, killed))
        killer.start()
        try:
            run_ingest(usual.scans, out, out / "notes")
        except Exception as error:
            outcome.promise(False, repr(error))
        ended.set()
        killer.join()
        if killed:  # else it came too late
            outcome.runs += 1
            outcome.judge(out / "store", usual.expected)
            again.append(len(list((out / "notes").iterdir())) - len(usual.expected))
    outcome.notes |= {"studies a run": len(usual.expected), "begun again": _spread(again)}
    return outcome


def _kill_busy_worker(delay_s: float, ended: threading.Event, killed: list[int]) -> None:
    ended.wait(delay_s)
    while not ended.wait(0.002):
        for process in psutil.Process().children(recursive=True):
            try:
                if "_write_unit" in process.cmdline()[0]:
                    process.kill()
                    killed.append(process.pid)
                    return
            except (psutil.Error, IndexError):
                continue


def _kill_drivers(
    usual: Undisturbed, out: Path, kills: int, address: str, chance: random.Random
) -> Outcome:
    outcome, again, published = Outcome("R2 ingest driver killed"), [], 0
    environment = {**os.environ, "RAY_ADDRESS": address}
    command = [sys.executable, "-m", "jobs.benchmarks.faults", "--ingest"]
    command += [str(path) for path in (usual.scans, out, out / "notes")]
    for _ in range(3 * kills):
        if outcome.runs == kills:
            break
        usual.again(out)
        driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        _wait_for_the_run(driver, out / "store.lock")
        time.sleep(chance.uniform(0, 1.5 * usual.seconds))  # it has more to load
        driver.kill()
        if driver.wait() != -signal.SIGKILL:
            continue  # it came too late
        outcome.runs += 1
        if (out / "store").exists():  # all of it was published, or nothing
            seen = bool(content(out / "store"))
            outcome.judge(out / "store", usual.expected if seen else {})
            published += seen
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        outcome.promise(ended.returncode == 0, ended.stderr)
        outcome.judge(out / "store", usual.expected)
        again.append(len(list((out / "notes").iterdir())) - len(usual.expected))
        outcome.promise(again[-1] <= WORKERS, f"{again[-1]} studies were begun again")
    outcome.notes |= {"studies a run": len(usual.expected), "begun again": _spread(again)}
    outcome.notes["killed after publishing"] = published
    return outcome


def _wait_for_the_run(driver: subprocess.Popen[bytes], lock: Path) -> None:
    """Until the driver holds the store's lock, or ends."""
    while driver.poll() is None:
        if lock.exists() and f"(process {driver.pid} on" in lock.read_text():
            return
        time.sleep(0.01)


def _spread(counts: list[int]) -> str:
    return f"{min(counts)}-{max(counts)}" if counts else "never"


# R3 and R4: one process that adds a case, and dies or meets a disk that fails

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
static char root[4096], watched[65536];
static long at, seen;
static int fault, delay_us;
void arm(const char *folder, long first, int error, int delay)
{ strncpy(root, folder, sizeof root - 1); at = first; fault = error; delay_us = delay; }
long operations(void) { return seen; }
static int below(const char *path) { return *root && !strncmp(path, root, strlen(root)); }
static int struck(void) {
  if (delay_us) usleep(delay_us);
  long now = __sync_add_and_fetch(&seen, 1);
  return at && now >= at;
}
static int fail(void) { if (!fault) kill(getpid(), SIGKILL); errno = fault; return -1; }
#define ON(path, name, args, call) \
  int name args { return below(path) && struck() ? fail() : REAL(name) call; }
ON(new, rename, (const char *old, const char *new), (old, new))
ON(new, link, (const char *old, const char *new), (old, new))
ON(new, linkat, (int a, const char *old, int b, const char *new, int c), (a, old, b, new, c))
ON(path, unlink, (const char *path), (path))
ON(path, unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
ON(path, mkdir, (const char *path, mode_t mode), (path, mode))
#define OPEN(name) int name(const char *path, int flags, ...) { \
  va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
  int writes = below(path) && flags & (O_WRONLY | O_RDWR | O_CREAT); \
  if (writes && struck()) return fail(); \
  int file = REAL(name)(path, flags, mode); \
  if (file >= 0 && file < 65536) watched[file] = writes; \
  return file; }
OPEN(open)
OPEN(open64)
ssize_t write(int file, const void *bytes, size_t count) {
  if (file < 0 || file >= 65536 || !watched[file] || !struck())
    return REAL(write)(file, bytes, count);
  REAL(write)(file, bytes, count / 2);
  return fail();
}
int close(int file) {
  if (file >= 0 && file < 65536) watched[file] = 0;
  return REAL(close)(file);
}
"""
"""Counts what a process does to files below a folder. From operation `at` on all fail with `fault`,
or the process dies (0); every one is delayed."""

KILL, LIMIT = 0, -1
FAULTS = {"full": errno.ENOSPC, "broken": errno.EIO, "forbidden": errno.EACCES}


@dataclass(frozen=True)
class Added:
    """How a process ended that should add a case: what it told, or why it failed."""

    exitcode: int | None
    told: str
    seconds: float


@dataclass(frozen=True)
class Trial:
    """Adds the case `new` to a copy of the store in `start`, until it holds `after`."""

    add: Callable[..., Added]
    start: Path
    place: Path
    after: Content
    operations: int

    def run(self, outcome: Outcome, fault: int, at: int = 0, delay_us: int = 0) -> Added:
        """Adds it under a fault and looks; adds it again without, and looks again."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.start, self.place)
        url = self.place / "store"
        ended = self.add(self.place, "new", fault, at, delay_us)
        if url.exists():
            before = {name: digest for name, digest in self.after.items() if name != "new"}
            done = ended.exitcode == 0 or "new" in content(url)
            outcome.judge(url, self.after if done else before)
        again = self.add(self.place, "new")
        outcome.promise(again.exitcode == 0, again.told)
        outcome.judge(url, self.after)
        return ended


def fail_disks(
    work: Path, rules: list[str], crashes: int, disks: int, chance: random.Random
) -> list[Outcome]:
    """Adds the first and the second case of a store while the process or its disk dies."""
    outcomes = []
    with _fork_server(work) as add:
        for title in ("first case", "second case"):
            start, usual = work / title, work / "usual"
            start.mkdir()
            if title == "second case":
                assert add(start, "old").exitcode == 0
            shutil.rmtree(usual, ignore_errors=True)
            shutil.copytree(start, usual)
            operations = int(add(usual, "new").told)
            trial = Trial(add, start, work / "place", content(usual / "store"), operations)
            if "R3" in rules:
                outcomes.append(_crash(trial, f"R3 crash, {title}", crashes))
        if "R4" in rules:
            outcomes.append(_break_disk(trial, disks, chance))
    return outcomes


def _crash(trial: Trial, rule: str, crashes: int) -> Outcome:
    outcome = Outcome(rule, notes={"file operations": trial.operations})
    count = min(crashes, trial.operations)
    for at in np.unique(np.linspace(1, trial.operations, count).astype(int)).tolist():
        ended = trial.run(outcome, KILL, at)
        outcome.promise(ended.exitcode in (0, -signal.SIGKILL), ended.told)
        outcome.runs += ended.exitcode == -signal.SIGKILL
    return outcome


def _break_disk(trial: Trial, count: int, chance: random.Random) -> Outcome:
    outcome, refused = Outcome("R4 disk fails"), Counter[str]()
    for number in range(count):
        kind = ("full", "broken", "forbidden", "limit", "slow")[number % 5]
        if kind == "slow":
            ended = trial.run(outcome, KILL, delay_us=5_000)
            outcome.promise(ended.exitcode == 0, ended.told)
        elif kind == "limit":
            ended = trial.run(outcome, LIMIT)
        else:
            ended = trial.run(outcome, FAULTS[kind], chance.randint(1, trial.operations))
        outcome.runs += 1
        refused[kind] += ended.exitcode == 1
        outcome.promise(ended.exitcode in (0, 1), ended.told)
        if ended.exitcode == 1:
            first_line = ended.told.strip().splitlines()[0]  # all that the command line prints
            outcome.promise(str(trial.place) in first_line, f"does not name it: {first_line}")
    outcome.notes["refused"] = dict(refused)
    return outcome


@contextmanager
def _fork_server(work: Path) -> Iterator[Callable[..., Added]]:
    """Processes that start at once, with the library that counts and fails file operations."""
    source, library, told = work / "shim.c", work / "shim.so", work / "told"
    source.write_text(SHIM)
    options = ["-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(["cc", *options], check=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.benchmarks.ingest", "raysynth.data.ingest"])
    os.environ["LD_PRELOAD"] = str(library)
    # A killed process leaves the lock of its blosc behind.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"

    def add(place: Path, case_id: str, *fault: int) -> Added:
        told.write_text("nothing told")
        started = time.perf_counter()
        child = context.Process(target=_add_case, args=(place, told, case_id, *fault))
        child.start()
        child.join(120)
        if child.is_alive():
            child.kill()
            child.join()
            return Added(None, "it hung", 120)
        return Added(child.exitcode, told.read_text(), time.perf_counter() - started)

    try:
        yield add
    finally:
        del os.environ["LD_PRELOAD"], os.environ["PYTHONWARNINGS"]


def _add_case(
    place: Path, told: Path, case_id: str, fault: int = KILL, at: int = 0, delay_us: int = 0
) -> None:
    """Adds an invented case to the store in `place`, as a stage does, or goes on with that."""
    library = ctypes.CDLL(None)
    if fault == LIMIT:  # no file may grow beyond it: writes fail as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    library.arm(f"{place}/".encode(), ctypes.c_long(at), max(fault, 0), delay_us)
    try:
        with StoreRun(place / "store", "ingest", case_id) as run:
            if case_id not in case_ids(run.root):
                fork = run.fork()
                fill(zarr.open_group(fork.store, mode="r+", zarr_format=3), case_id)
                run.commit([fork], [case_id], "one case")
            run.publish("one case")
    except BaseException as error:
        told.write_text(f"{type(error).__name__}: {str(error).strip()}")
        os._exit(1)
    told.write_text(str(library.operations()))


def fill(root: zarr.Group, case_id: str) -> None:
    """Writes a case of noise, half lung and half body."""
    noise = np.random.default_rng(list(case_id.encode()))
    hu = noise.integers(-1000, 400, (32, 64, 64)).astype(np.int16)
    layout = np.full(hu.shape, Label.BODY, np.uint8)
    layout[:, :, :32] = Label.LEFT_LUNG
    volume = Volume(hu, (2.0, 1.0, 1.0))
    case = Case(case_id, f"patient-{case_id}", "train", volume, layout=layout)
    write_volume(create_volume(root, case), case)


# R5: damaged files


def flip_bits(work: Path, count: int, chance: random.Random) -> Outcome:
    """Flips one bit at a time, reads all that main ever pointed to, and puts it right again."""
    url = work / "flipped"
    for case_id in ("one", "two"):
        with StoreRun(url, "ingest", case_id) as run:
            run.declare(lambda root, name=case_id: fill(root, name), "one case", [case_id])
            run.publish("one case")
    ids = [past.id for past in open_repository(url).ancestry(branch="main")]
    snapshots = ids[:-1]  # the first one has no group yet
    truth, outcome, found = read_history(url, snapshots), Outcome("R5 flipped bit"), Counter[str]()
    for number in range(count):
        kind = ("chunks", "manifests", "snapshots")[number % 3]
        file = chance.choice(sorted((url / kind).iterdir()))
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        seen = _look(url, snapshots, truth)
        file.write_bytes(whole)
        found[f"{kind} {seen}"] += 1
        outcome.runs += 1
        outcome.silent += seen.startswith("silent")
        outcome.promise(not seen.startswith("crash"), seen)
    assert read_history(url, snapshots) == truth
    outcome.notes |= dict(sorted(found.items()))
    return outcome


def read_history(url: Path, snapshots: list[str]) -> Any:
    """What every snapshot holds, and what the history says."""
    told = list(history(open_repository(url)))
    return told, [content(url, snapshot) for snapshot in snapshots]


def _look(url: Path, snapshots: list[str], truth: Any) -> str:
    """`seen`; `harmless` if all that can be read is as it was; else what is `silent` about it."""
    try:
        told, held = read_history(url, snapshots)
        if validate(url, full=True):
            return "seen"
        if held != truth[1]:
            return "silent in cases"
        return "harmless" if told == truth[0] else "silent in history"
    except RaysynthError:
        return "seen"
    except Exception as error:
        # zarr-python and Icechunk have words of their own for what they cannot read.
        if type(error).__module__.startswith("icechunk"):
            return "seen"
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(frame.f_globals.get("__name__", "").startswith("zarr.") for frame in frames):
            return "seen"
        return f"crash {type(error).__name__} in {frames[-1].f_code.co_qualname}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
