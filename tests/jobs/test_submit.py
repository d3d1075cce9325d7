"""The whole chain, job by job, as `ray job submit` runs it on a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.validate import validate
from tests.jobs.cluster_head import running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Submit = Callable[[str, str, Path], tuple[int, str]]

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


@pytest.fixture(scope="module")
def submit() -> Iterator[Submit]:
    """Submits a job to a cluster of its own and waits for its end."""
    with running(head_cpus=2) as head:

        def submit(verb: str, recipe: str, work_dir: Path) -> tuple[int, str]:
            command = ("python", "-m", f"jobs.{verb}", f"jobs/recipes/{recipe}.yaml")
            job = head.submit(*command, "--set", f"work_dir={work_dir}")
            said, _ = job.communicate(timeout=300)
            return job.returncode, said

        yield submit


def test_the_chain_ends_in_a_judged_data_set(submit: Submit, tmp_path: Path) -> None:
    for verb, recipe in CHAIN:
        ended, said = submit(verb, recipe, tmp_path)
        assert ended == 0, f"{verb} {recipe}:\n{said}"
    root = open_root(str(tmp_path / "store"))
    assert SampleSet(open_group(root, f"synthetic/{MODEL}")).count == 8
    assert validate(tmp_path / "store", full=True) == []
    judged = json.loads((tmp_path / "evaluation" / f"{MODEL}.json").read_text())
    assert judged["samples"]["synthetic"] == 8
    assert (tmp_path / "evaluation" / f"{MODEL}.html").stat().st_size > 10_000


def test_a_refused_job_ends_with_its_reason(submit: Submit, tmp_path: Path) -> None:
    ended, said = submit("shard", MODEL, tmp_path / "nowhere")
    assert ended == 1
    assert "raysynth: " in said
    assert "nowhere" in said
