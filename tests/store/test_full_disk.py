"""A disk that takes no more: the run fails, readers see what was there, and it can go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from raysynth.store.reader import case_ids
from raysynth.store.repository import open_root
from raysynth.store.validate import validate

WRITER = """
import os, resource, signal, sys
import numpy as np
from raysynth.case import Case
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_volume, write_volume
from raysynth.volume import Volume

limit = int(sys.argv[2])
if limit:
    # No file may grow beyond it: writes fail as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
hu = np.random.default_rng(0).integers(-1000, 400, (32, 128, 128)).astype(np.int16)
case = Case("second" if len(sys.argv) > 3 else "first", "p", "train", Volume(hu, (1.0, 1.0, 1.0)),
            layout=np.full(hu.shape, 4, np.uint8))
with StoreRun(sys.argv[1], verb="ingest", fingerprint=case.case_id) as run:
    fork = run.fork()
    import zarr
    root = zarr.open_group(fork.store, mode="r+", zarr_format=3)
    write_volume(create_volume(root, case), case)
    run.commit([fork], [case.case_id], "one case")
    run.publish("one case")
os._exit(0)  # as commands do: threads of libraries can abort while the interpreter ends
"""


def write(url: Path, limit: int, *second: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WRITER, str(url), str(limit), *second]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_full_disk_leaves_what_was_published(tmp_path: Path) -> None:
    url = tmp_path / "store"
    assert write(url, 0).returncode == 0
    before = open_root(str(url)).attrs.asdict()
    failed = write(url, 50_000, "second")
    assert failed.returncode != 0
    last = failed.stderr.strip().splitlines()[-1]
    assert "File too large" in last
    assert str(url) in last
    assert open_root(str(url)).attrs.asdict() == before
    assert case_ids(open_root(str(url))) == ["first"]
    assert validate(url, full=True) == []
    again = write(url, 0, "second")
    assert again.returncode == 0, again.stderr
    assert case_ids(open_root(str(url))) == ["first", "second"]
    assert validate(url, full=True) == []
