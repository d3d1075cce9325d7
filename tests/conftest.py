"""Fixtures that many tests share, and the rule that unmarked tests start no cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("raysynth", deadline=None)
hypothesis.settings.load_profile("raysynth")


@pytest.fixture(autouse=True)
def _no_cluster_by_accident(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("ray") is None:

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("this test starts Ray: mark it `ray`")

        monkeypatch.setattr("ray.init", refuse)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local cluster of two CPUs, shared by the session's `ray` tests."""
    from raysynth.session import connect

    with connect(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans; tests that need it are skipped where there is none."""
    path = os.environ.get("RAYSYNTH_REAL_DATA")
    if not path:
        pytest.skip("RAYSYNTH_REAL_DATA is not set: no real scans here")
    return Path(path)


@pytest.fixture(scope="session")
def lidc_dicom(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real LIDC-IDRI patients, unpacked."""
    import tarfile

    folder = tmp_path_factory.mktemp("lidc")
    for archive in sorted((real_data / "lidc-dicom").glob("*.tar.xz")):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fresh S3 server (moto's: a real endpoint, on this machine) with a bucket `bucket`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                bucket = urllib.request.Request(f"{address}/bucket", method="PUT")
                urllib.request.urlopen(bucket).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        else:
            pytest.fail("moto's server does not start")
        yield address
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Where a store can be made; the environment has what is needed to get there."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/{os.getpid()}"
