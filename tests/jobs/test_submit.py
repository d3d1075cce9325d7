"""The whole chain, job by job, as `ray job submit` runs it on a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.validate import validate

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Submit = Callable[[str, str, Path], subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parents[2]
AUTOENCODER, MODEL = "lidc_vq_tiny", "lidc_attributes_ldm_4_tiny"
CHAIN = (
    ("ingest", AUTOENCODER),
    ("shard", AUTOENCODER),
    ("train", AUTOENCODER),
    ("encode", MODEL),
    ("train", MODEL),
    ("synthesize", MODEL),
    ("evaluate", MODEL),
)


# The agent that starts jobs does without a port that another cluster of this machine has taken.
HEAD = """
import socket
from ray.cluster_utils import Cluster
with socket.socket() as free:
    free.bind(("", 0))
    port = free.getsockname()[1]
options = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0}
options["dashboard_agent_listen_port"] = port
cluster = Cluster(initialize_head=True, head_node_args=options)
print(cluster.head_node.webui_url, flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def submit() -> Iterator[Submit]:
    """Submits a job to a cluster of its own, which nobody enters without the token."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        # `python` of a job is the cluster's, as on any node.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    # In a process of its own: Ray reads its authentication mode once, when it is imported.
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdin
    assert head.stdout
    address = f"http://{head.stdout.readline().strip()}"

    def run(*job: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *job],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def submit(verb: str, recipe: str, work_dir: Path) -> subprocess.CompletedProcess[str]:
        command = ("python", "-m", f"jobs.{verb}", f"jobs/recipes/{recipe}.yaml")
        return run(*command, "--set", f"work_dir={work_dir}")

    # The agent that takes jobs starts some seconds after the head has told its address.
    try:
        for _ in range(12):
            probe = run("true")
            if probe.returncode == 0:
                break
            time.sleep(5)
        else:
            pytest.fail(f"the cluster takes no jobs:\n{probe.stdout}\n{probe.stderr}")
        yield submit
    finally:
        head.communicate("\n", timeout=60)


def test_the_chain_ends_in_a_judged_data_set(submit: Submit, tmp_path: Path) -> None:
    for verb, recipe in CHAIN:
        job = submit(verb, recipe, tmp_path)
        assert job.returncode == 0, f"{verb} {recipe}:\n{job.stdout}\n{job.stderr}"
    root = open_root(str(tmp_path / "store"))
    assert SampleSet(open_group(root, f"synthetic/{MODEL}")).count == 8
    assert validate(tmp_path / "store", full=True) == []
    judged = json.loads((tmp_path / "evaluation" / f"{MODEL}.json").read_text())
    assert judged["samples"]["synthetic"] == 8
    assert (tmp_path / "evaluation" / f"{MODEL}.html").stat().st_size > 10_000


def test_a_refused_job_ends_with_its_reason(submit: Submit, tmp_path: Path) -> None:
    job = submit("shard", MODEL, tmp_path / "nowhere")
    assert job.returncode == 1
    assert "raysynth: " in job.stdout
    assert "nowhere" in job.stdout
