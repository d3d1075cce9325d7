"""What the doctor finds: by its rules, and on real clusters that are sound, open or apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysynth.doctor import NodeFacts, check_clocks, check_tokens, compare_versions
from tests.jobs.cluster_head import ENVIRONMENT, ROOT, running

RECIPE = "jobs/recipes/lidc_vq_tiny.yaml"


def test_a_version_that_differs_is_told_with_its_nodes() -> None:
    same = {"python": "3.12.1", "torch": "2.15.0"}
    assert compare_versions([same, same], ["a", "b"]).is_fine
    found = compare_versions(
        [same, same | {"torch": "2.14.0"}, {"python": "3.12.1"}], ["a", "b", "c"]
    )
    assert not found.is_fine
    assert found.found == "torch: 2.14.0 on b; 2.15.0 on a; missing on c"
    assert "one image" in found.advice


def test_a_clock_is_off_only_if_it_surely_is() -> None:
    assert check_clocks({"a": (0.0, 0.01), "b": (0.3, 0.01), "c": (-5.0, 4.9)}).is_fine
    found = check_clocks({"a": (0.0, 0.01), "b": (-2.0, 0.01)})
    assert not found.is_fine
    assert "b by -2.0 s" in found.found


def _facts(name: str, auth_mode: str = "token", token_mode: int | None = 0o600) -> NodeFacts:
    return NodeFacts(name, {}, 0.0, 0, None, token_mode, auth_mode, None, None, None)


def test_tokens_are_on_everywhere_and_private() -> None:
    assert check_tokens([_facts("a"), _facts("b", token_mode=None)]).is_fine
    found = check_tokens([_facts("a"), _facts("b", auth_mode="")])
    assert not found.is_fine
    assert "not token on b" in found.found
    found = check_tokens([_facts("a", token_mode=0o644)])
    assert not found.is_fine
    assert "chmod 600" in found.advice


def examined(gcs: str, work_dir: Path, environment: dict[str, str]) -> tuple[int, dict[str, dict]]:
    """Exit code and findings by check."""
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "raysynth", "doctor", RECIPE, "--address", gcs, "--json"),
            *("--set", f"work_dir={work_dir}"),
        ],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout, ran.stderr
    findings = json.loads(ran.stdout.splitlines()[-1])["findings"]
    return ran.returncode, {one["check"]: one for one in findings}


@pytest.mark.slow
@pytest.mark.ray
def test_a_sound_cluster_is_fine_until_a_node_sees_another_folder(tmp_path: Path) -> None:
    work_dir = tmp_path / "shared"
    with running(head_cpus=0, nodes=1) as head:
        code, found = examined(head.gcs, work_dir, ENVIRONMENT)
        assert [check for check, one in found.items() if not one["is_fine"]] == []
        assert code == 0
        assert found["nodes"]["found"].startswith("2 with 1 CPU")
        assert list(work_dir.iterdir()) == []  # nothing is left behind
        if os.geteuid() != 0 or not shutil.which("unshare"):
            pytest.skip("a node with a folder of its own takes root")
        # A node on whose machine the path is another disk.
        script = f"mount -t tmpfs none {work_dir} && exec ray start --address {head.gcs} --block"
        apart = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f"{script} --num-cpus 1"],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(10)  # it is cheaper to wait for it than to examine in vain
            for _ in range(5):
                code, found = examined(head.gcs, work_dir, ENVIRONMENT)
                if found["nodes"]["found"].startswith("3 "):
                    break
            assert code == 1
            assert not found["work_dir"]["is_fine"]
            assert "another folder" in found["work_dir"]["found"]
            assert "all nodes share" in found["work_dir"]["advice"]
        finally:
            apart.terminate()
            apart.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.ray
def test_an_open_cluster_is_not(tmp_path: Path) -> None:
    environment = {"RAY_AUTH_MODE": "disabled", "PATH": ENVIRONMENT["PATH"]}
    with running(head_cpus=1, environment=environment) as head:
        code, found = examined(head.gcs, tmp_path, environment)
    assert code == 1
    for check in ("tokens", "strangers"):
        assert not found[check]["is_fine"], check
    assert "let in who has no token" in found["strangers"]["found"]
    assert "the dashboard" in found["strangers"]["found"]
