"""Batch synthesis: what is recorded, what repeats bit by bit, and what survives being killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raysynth.case import Label
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.sampling.batch import synthesize
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.planner import plan_samples
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_repository, open_root
from raysynth.store.validate import validate
from tests.data.tiny import content
from tests.sampling.crashing_run import drawing_config

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]

CRASHES = [
    ("before-commit", 1),
    ("after-commit", 1),
    ("before-merge", 1),
    ("before-merge", 2),
    ("after-commit", 2),
    ("before-commit", 2),
    ("after-commit", 1),
    ("before-publish", 1),
    ("before-publish", 1),
    ("before-branch-is-deleted", 1),
]
FEW_CRASHES = [("before-merge", 2), ("before-publish", 1)]


def _set(config: ExperimentConfig, path: str) -> SampleSet:
    return SampleSet(open_group(open_root(config.store_url), path))


@pytest.fixture(scope="module")
def drawn(drawing: ExperimentConfig) -> ExperimentConfig:
    summary = synthesize(drawing)
    assert summary.drawn == 3 * 70
    return drawing


def test_every_sample_carries_its_request(drawn: ExperimentConfig) -> None:
    samples = _set(drawn, "samples/slices")
    run = _set(drawn, "synthetic/tiny")
    plan = plan_samples(drawn, samples)
    assert run.count == len(plan) == 70
    for column, values in {
        "seed": [one.seed for one in plan],
        "box": [one.condition.box or (-1,) * 4 for one in plan],
        "attributes": [one.condition.attributes or (0,) * 5 for one in plan],
        "has_nodule": [one.condition.box is not None for one in plan],
        "source_sample": [one.source_sample for one in plan],
    }.items():
        assert np.array_equal(run.index[column], np.array(values, run.index[column].dtype)), column
    assert (run.index["batch_shape"] == drawn.sampling.batch_size).all()
    assert (run.index["copied_fraction"] == 0).all()
    assert (run.index["source_case"] == samples.index["case"][run.index["source_sample"]]).all()
    assert (samples.index["split"][run.index["source_sample"]] == 0).all()
    shows_nodule = (run.read("layout") == Label.NODULE).any(axis=(1, 2))
    assert np.array_equal(shows_nodule, run.index["has_nodule"] == 1)
    assert np.count_nonzero(~shows_nodule) == 7
    assert run.index["accepted"][~shows_nodule].all()
    assert not run.index["found"][~shows_nodule].any()
    assert (run.index["draws"] == 1).all()
    outlined = (run.read("measured") == Label.NODULE).any(axis=(1, 2))
    assert np.array_equal(outlined, run.index["found"] == 1)
    assert run.attrs["passport"]["synthetic"] is True
    assert validate(drawn.store_url, full=True) == []


def test_controls_are_recorded_as_asked_and_drawn_otherwise(drawn: ExperimentConfig) -> None:
    run = _set(drawn, "synthetic/tiny")
    for control in ("untrained", "shuffled"):
        other = _set(drawn, f"synthetic/tiny_{control}")
        assert np.array_equal(other.read("layout"), run.read("layout"))
        assert np.array_equal(other.index["seed"], run.index["seed"])
        assert (other.read("hu") != run.read("hu")).any(axis=(1, 2)).all()
        assert other.attrs["passport"]["control"] == control


def test_a_sample_drawn_alone_has_the_same_bits(drawn: ExperimentConfig) -> None:
    plan = plan_samples(drawn, _set(drawn, "samples/slices"))
    sampler = BundleSampler(drawn.bundle_path, drawn.sampling, drawn.seed)
    alone = sampler.draw([plan[66], plan[3]])
    assert np.array_equal(alone, _set(drawn, "synthetic/tiny").read("hu")[[66, 3]])


def test_what_is_not_found_is_drawn_again_from_another_seed(drawn: ExperimentConfig) -> None:
    """Random weights draw no nodule: each sample that shall have one uses up its draws."""
    sampling = drawn.sampling.model_copy(update={"max_draws": 3})
    plan = plan_samples(drawn, _set(drawn, "samples/slices"))
    free = next(one for one in plan if one.condition.box is None)
    planned = [plan[0], free, plan[1]]
    sampler = BundleSampler(drawn.bundle_path, sampling, drawn.seed)
    hu, measured, draws = sampler.draw_until_found(planned)
    assert not any(one.found for one in measured)
    assert draws.tolist() == [3, 1, 3]
    last = [plan[0].redrawn(3), free, plan[1].redrawn(3)]
    assert np.array_equal(hu, sampler.draw(last))
    assert len({plan[0].seed, plan[0].redrawn(2).seed, plan[0].redrawn(3).seed}) == 3


def test_the_same_command_again_draws_nothing(drawn: ExperimentConfig) -> None:
    assert synthesize(drawn).drawn == 0


def test_scales_that_are_asked_for_later_are_drawn_from_the_same_noise(
    drawn: ExperimentConfig,
) -> None:
    evaluation = drawn.evaluation.model_copy(update={"guidance_scales": (1.0, 3.0)})
    swept = drawn.model_copy(update={"evaluation": evaluation})
    assert synthesize(swept).drawn == 2 * 70
    assert synthesize(swept).drawn == 0
    own = _set(drawn, "synthetic/tiny")
    plain, guided = (_set(drawn, f"synthetic/tiny_scale_{scale}") for scale in (1, 3))
    for column in ("box", "attributes", "source_sample"):
        asked = own.index[column][:35]
        for scale in (plain, guided):
            assert np.array_equal(scale.index[column][::2], asked), column
            assert np.array_equal(scale.index[column][1::2], asked), column
    assert np.array_equal(plain.index["seed"], guided.index["seed"])
    assert len(np.unique(plain.index["seed"])) == 70
    # The recipe's own scale is 1: the first of each two is the recipe's own sample.
    assert np.array_equal(plain.read("hu")[::2], own.read("hu")[:35])
    assert (plain.read("hu")[::2] != plain.read("hu")[1::2]).any(axis=(1, 2)).all()
    assert (plain.read("hu") != guided.read("hu")).any(axis=(1, 2)).all()
    for run, scale, shape in ((plain, 1.0, 8), (guided, 3.0, 16)):
        assert run.attrs["passport"]["sampling"]["guidance_scale"] == scale
        assert run.attrs["passport"]["control"] == "swept"
        assert (run.index["batch_shape"] == shape).all()
    assert validate(drawn.store_url) == []


def test_pairs_that_are_asked_for_later_are_drawn_as_the_run_was(drawn: ExperimentConfig) -> None:
    evaluation = drawn.evaluation.model_copy(update={"num_pairs": 3})
    assert synthesize(drawn.model_copy(update={"evaluation": evaluation})).drawn == 6
    own, pairs = (_set(drawn, f"synthetic/tiny{ending}") for ending in ("", "_pairs"))
    assert np.array_equal(pairs.read("hu")[::2], own.read("hu")[:3])
    assert (pairs.read("hu")[::2] != pairs.read("hu")[1::2]).any(axis=(1, 2)).all()
    assert np.array_equal(pairs.index["box"][1::2], own.index["box"][:3])
    assert pairs.attrs["passport"]["control"] == "pairs"
    assert validate(drawn.store_url) == []


def test_another_plan_under_the_same_name_is_refused(drawn: ExperimentConfig) -> None:
    other = drawing_config(drawn.work_dir, num_inference_steps=5)
    with pytest.raises(InputError, match="drawn by another bundle or plan"):
        synthesize(other)


def test_a_set_that_the_bundle_does_not_fit_is_refused(drawn: ExperimentConfig) -> None:
    facts = drawn.bundle_path / "bundle.json"
    whole = facts.read_text()
    try:
        facts.write_text(whole.replace('"field_of_view_mm": 360.0', '"field_of_view_mm": 180.0'))
        with pytest.raises(InputError, match=r"pixels of mm 5\.625, but .* has 11\.25"):
            synthesize(drawn)
    finally:
        facts.write_text(whole)


@pytest.mark.slow
def test_a_killed_run_ends_the_same(drawn: ExperimentConfig, tmp_path: Path) -> None:
    """It is killed twice, or ten times with RAYSYNTH_ALL_FAULTS=1 (7 minutes)."""
    crashes = CRASHES if os.environ.get("RAYSYNTH_ALL_FAULTS") else FEW_CRASHES
    work_dir = tmp_path / "killed"
    shutil.copytree(drawn.bundle_path, drawing_config(work_dir).bundle_path)
    # The store as it was before anything was drawn.
    before = next(
        past.id
        for past in open_repository(drawn.store_url).ancestry(branch="main")
        if "synthetic/tiny" not in open_root(drawn.store_url, past.id)
    )
    shutil.copytree(drawn.store_url, work_dir / "store")
    open_repository(str(work_dir / "store")).reset_branch("main", before)

    def start(place: str = "nowhere", count: int = 0) -> int:
        command = [sys.executable, "-m", "tests.sampling.crashing_run", str(work_dir), place]
        return subprocess.run(
            [*command, str(count)], cwd=ROOT, stderr=subprocess.DEVNULL, timeout=300
        ).returncode

    codes = [start(place, count) for place, count in crashes]
    assert codes == [-signal.SIGKILL] * len(crashes)
    assert start() == 0
    assert content(str(work_dir / "store")) == content(drawn.store_url)
    assert validate(work_dir / "store", full=True) == []
