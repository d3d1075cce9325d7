"""A cluster of several nodes, one of which dies in the middle of every job: nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysynth import stages
from raysynth.config import ExperimentConfig, load_recipe
from raysynth.store.reader import SampleSet, case_ids, open_group, read_case
from raysynth.store.repository import open_root
from raysynth.store.validate import validate
from raysynth.training.history import HISTORY_FILE, read_history
from tests.jobs.cluster_head import Head, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECIPE = "jobs/recipes/luna16_semantic_tiny.yaml"
SETTINGS = (
    "data.source.num_patients=6",
    "training.max_seen_samples=480",
    "training.checkpoint_every=80",
    "training.open_shards=2",
    "sampling.num_samples=192",
    "evaluation.controls=false",
    "evaluation.num_pairs=0",
    "evaluation.num_bootstrap=10",
)
TWO_NODES = ("training.num_workers=2", "training.min_workers=1", "sampling.num_actors=2")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head that does no work itself, and two nodes of one core."""
    with running(head_cpus=0, nodes=2) as head:
        yield head


def run_and_kill(head: Head, verb: str, work_dir: Path, after: int) -> None:
    """Submits a job and takes a node away when so much is done; another one takes its place."""
    settings = [f"--set={one}" for one in (*SETTINGS, *TWO_NODES, f"work_dir={work_dir}")]
    job = head.submit("python", "-m", f"jobs.{verb}", RECIPE, *settings)
    assert job.stdout
    said, is_killed = [], False
    for line in job.stdout:
        said.append(line)
        if not is_killed and _done(line) >= after:
            head.tell("kill")
            head.tell("add")
            is_killed = True
    assert job.wait() == 0, "".join(said)
    assert is_killed, "".join(said)


def _done(line: str) -> int:
    """How much is done, if a line says so."""
    if not line.startswith('{"stage"'):
        return 0
    return int(json.loads(line)["done"])


def test_a_node_dies_in_every_job_and_nothing_is_lost(head: Head, tmp_path: Path) -> None:
    alone, work_dir = tmp_path / "alone", tmp_path / "cluster"
    config = load_recipe(RECIPE, [*SETTINGS, f"work_dir={alone}"])
    for stage in (stages.ingest, stages.shard, stages.train):
        stage(config)

    run_and_kill(head, "ingest", work_dir, after=2)
    assert _volumes(work_dir) == _volumes(alone)
    assert validate(work_dir / "store", full=True) == []

    submit(head, "shard", work_dir)
    run_and_kill(head, "train", work_dir, after=160)
    curves = [
        [point["loss"] for point in read_history(one / "logs" / config.name / HISTORY_FILE)]
        for one in (work_dir, alone)
    ]
    assert len(curves[0]) == 480 // config.training.log_every
    # Rounding differs with the number of workers, and grows; another order of samples shows.
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)

    run_and_kill(head, "synthesize", work_dir, after=1)
    shutil.rmtree(alone / "bundles")
    shutil.copytree(work_dir / "bundles", alone / "bundles")
    stages.synthesize(config)
    drawn, undisturbed = (_samples(one, config) for one in (work_dir, alone))
    assert drawn.count == 192
    assert np.array_equal(drawn.read("hu"), undisturbed.read("hu"))
    assert validate(work_dir / "store", full=True) == []

    submit(head, "evaluate", work_dir)
    judged = json.loads((work_dir / "evaluation" / f"{config.name}.json").read_text())
    assert judged["samples"]["synthetic"] == 192
    assert (work_dir / "evaluation" / f"{config.name}.html").stat().st_size > 10_000


def test_a_refused_job_ends_with_its_reason(head: Head, tmp_path: Path) -> None:
    job = head.submit("python", "-m", "jobs.shard", RECIPE, f"--set=work_dir={tmp_path}/nowhere")
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 1
    assert "raysynth: " in said
    assert "nowhere" in said


def submit(head: Head, verb: str, work_dir: Path) -> None:
    """A job that nothing happens to."""
    settings = [f"--set={one}" for one in (*SETTINGS, f"work_dir={work_dir}")]
    job = head.submit("python", "-m", f"jobs.{verb}", RECIPE, *settings)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said


def _volumes(work_dir: Path) -> dict[str, int]:
    """A checksum of each case."""
    root = open_root(str(work_dir / "store"))
    return {case: hash(read_case(root, case).volume.hu.tobytes()) for case in case_ids(root)}


def _samples(work_dir: Path, config: ExperimentConfig) -> SampleSet:
    root = open_root(str(work_dir / "store"))
    return SampleSet(open_group(root, f"synthetic/{config.name}"))
