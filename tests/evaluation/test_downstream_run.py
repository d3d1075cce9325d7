"""`raysynth downstream` on a store of phantoms, from the recipe to the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from raysynth.case import CONDITION_COLUMNS
from raysynth.cli import main
from raysynth.config import ExperimentConfig, load_recipe
from raysynth.errors import InputError
from raysynth.evaluation.downstream.examples import NOBODY
from raysynth.evaluation.downstream.from_store import (
    downstream,
    read_real,
    read_synthetic,
    taught,
)
from raysynth.models.bundle import save_bundle
from raysynth.models.facts import BundleFacts
from raysynth.phantom.patient import phantom_case
from raysynth.preprocess.slices import cut_slices, plan_slices
from raysynth.store.reader import SampleSet, case_attrs, open_group
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import (
    create_sample_set,
    create_volume,
    set_index,
    write_rows,
    write_volume,
)
from storage_schema.v1 import SPLITS, sample_set, synthetic_run

NUM_PATIENTS, NUM_TRAINING, NUM_DRAWN = 6, 2, 60

SHARED = {"kind": "slices", "intensity": "hu", "parent_snapshot": "none"}

RECIPE = """
work_dir: {work_dir}
data:
  source:
    kind: phantom
    num_patients: 6
    spacing_mm: [10.0, 6.0, 6.0]
    nodules_per_patient: [5, 7]
    min_diameter_mm: 20
  samples: {{size: 48, spacing_mm: 20.0, nodule_free_every: 4}}
model: {{family: semantic_diffusion}}
downstream:
  tasks: [classification, localisation, segmentation]
  folds: 2
  ratios: [0.5]
  augmented_copies: 1
  imbalance: {{texture: solid, kept: 0.3}}
  steps: 2
  batch_size: 4
  width: 4
  backbone: narrow
  detection_size: 64
  num_bootstrap: 20
"""

ARMS = ["real", "+ synthetic x0.5", "duplicated", "augmented"]
RARE = ["thinned", "thinned + synthetic", "thinned, oversampled", "real"]


def _write_real(root: zarr.Group, config: ExperimentConfig) -> None:
    """Some patients to train on, and others who are held out."""
    samples = config.slices
    cut, index, cases = [], [], []
    for number in range(NUM_PATIENTS):
        split = "train" if number < NUM_TRAINING else "test"
        case = phantom_case(config.data.source, number, split)
        write_volume(create_volume(root, case), case)
        plans = plan_slices(case_attrs(root, case.case_id), samples)
        cut.append(cut_slices(case, plans, samples))
        index += [(number, plan.z_mm, plan.nodule, SPLITS.index(split)) for plan in plans]
        cases.append(case.case_id)
    columns = dict(zip(("case", "z_mm", "nodule", "split"), zip(*index, strict=True), strict=True))
    hu, layout, box, ratings = (
        np.concatenate([getattr(one, name) for one in cut])
        for name in ("hu", "layout", "box", "ratings")
    )
    attributes = SHARED | {
        "cases": cases,
        "pixel_mm": samples.pixel_mm,
        "fingerprint": "f" * 12,
        "settings": samples.settings(),
        "spacing_mm": samples.spacing_mm,
        "field_of_view_mm": samples.field_of_view_mm,
    }
    spec = sample_set(len(hu), hu.shape[1:])
    group = create_sample_set(root, f"samples/{samples.name}", spec, attributes)
    set_index(group, columns | {"box": box, "ratings": ratings, "has_nodule": box[:, 0] >= 0})
    write_rows(group, 0, {"hu": hu, "layout": layout})


def _write_run(root: zarr.Group, bundle: str) -> None:
    """A `model` that repeats its training patients; every third sample was not accepted."""
    real = SampleSet(open_group(root, "samples/slices"))
    boxed = (real.index["split"] == 0) & (real.index["box"][:, 0] >= 0)
    rows = np.resize(np.flatnonzero(boxed), NUM_DRAWN)
    attributes = SHARED | {
        "cases": real.attrs["cases"],
        "pixel_mm": real.pixel_mm,
        "bundle": bundle,
        "plan": "p" * 12,
        "source_set": "slices",
        "passport": {"sampling": {"num_inference_steps": 50}},
    }
    spec = synthetic_run(NUM_DRAWN, real.shape)
    group = create_sample_set(root, "synthetic/tiny", spec, attributes)
    columns = {
        "box": real.index["box"][rows],
        "source_case": np.where(np.arange(NUM_DRAWN) == 0, -1, real.index["case"][rows]),
        "attributes": real.index["ratings"][rows, 0][:, CONDITION_COLUMNS],
        "accepted": np.arange(NUM_DRAWN) % 3 > 0,
    }
    set_index(group, columns)
    write_rows(group, 0, {"hu": real.read("hu")[rows], "layout": real.read("layout")[rows]})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a store, a bundle and a synthetic run."""
    folder = tmp_path_factory.mktemp("downstream")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(work_dir=folder / "run"))
    config = load_recipe(path)
    with StoreRun(config.store_url, verb="test", fingerprint="a" * 12) as run:
        run.declare(lambda root: _write_real(root, config), "real")
        snapshot = run.publish("patients")
    facts = BundleFacts(
        model=config.model,
        samples=config.slices,
        intensity="hu",
        sources=("phantom",),
        snapshot=snapshot,
        patients={"train": NUM_TRAINING, "test": NUM_PATIENTS - NUM_TRAINING},
        indicative=True,
        seen_samples=8,
    )
    digest = save_bundle(config.bundle_path, facts, denoiser={})
    with StoreRun(config.store_url, verb="test", fingerprint="b" * 12) as run:
        run.declare(lambda root: _write_run(root, digest), "drawn")
        run.publish("a run")
    return path


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_recipe_is_put_to_the_trial(recipe: Path) -> None:
    assert main(["downstream", str(recipe)]) == 0
    folder = recipe.parent / "run" / "evaluation"
    found = json.loads((folder / "tiny_downstream.json").read_text())
    assert set(found["tasks"]) == {"classification", "localisation", "segmentation"}
    for result in found["tasks"].values():
        assert list(result["arms"]) == ARMS
        assert list(result["rare"]) == RARE
        assert {arm["steps"] for arm in result["arms"].values()} == {2}
        assert result["arms"]["real"]["synthetic"] == 0
        for arm in result["arms"].values():
            for metric in arm["metrics"].values():
                assert len(metric["folds"]) == 2
    named = {"accuracy", "precision", "recall", "specificity", "f1", "auc"}
    assert set(found["tasks"]["classification"]["arms"]["real"]["metrics"]) == named
    boxes = found["tasks"]["localisation"]["arms"]["real"]["metrics"]
    assert set(boxes) == {"ap50", "ap60", "ar50", "ar60", "ar70"}
    assert sum(found["folds"]) == found["patients"]["held_out"] < found["patients"]["real"]
    # Layouts are lent by training patients, who never test.
    assert found["excluded"] == {"synthetic": [0, 0]}
    for said in ("phantoms", "indicative only", "can be certain", "for 2 steps"):
        assert any(said in notice for notice in found["notices"]), said
    page = (folder / "tiny_downstream.html").read_text()
    assert page.count("<table>") == 6
    assert found["verdicts"][0].partition(": ")[2] in page


def test_synthetic_samples_descend_from_their_lenders(recipe: Path) -> None:
    config = load_recipe(recipe)
    root = open_root(config.store_url)
    real = read_real(root, SampleSet(open_group(root, "samples/slices")), taught(config))
    run = SampleSet(open_group(root, "synthetic/tiny"))
    drawn = read_synthetic(root, run, accepted_only=False)
    assert taught(config) == {f"phantom-0-{number}" for number in range(NUM_TRAINING)}
    assert set(drawn.patient[1:].tolist()) <= taught(config)
    assert drawn.patient[0] == NOBODY
    assert len(set(real.patient[real.held_out].tolist())) == NUM_PATIENTS - NUM_TRAINING
    assert not set(real.patient[real.held_out].tolist()) & taught(config)
    assert np.isnan(drawn.malignancy).all()
    assert len(read_synthetic(root, run, accepted_only=True)) == 40
    assert np.isfinite(real.scores[real.boxed]).all()


BAD = {
    "too many folds": ("downstream.folds=9", r"folds 9, but \d patients with a nodule"),
    "too few samples": ("downstream.ratios=[50]", r"ratios 50 wants \d+ samples of synthetic"),
    "nodules of one kind": (
        "downstream.tasks=[malignancy]",
        r"\d+ rated nodule slices .* are all benign or all malignant",
    ),
    "no such run": ("name=other", "no 'other' in /synthetic; there is: tiny"),
    "another drawing": ("sampling.num_inference_steps=3", "was drawn with sampling.num_inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_tried_is_refused(recipe: Path, case: str) -> None:
    override, message = BAD[case]
    config = load_recipe(recipe, [override])
    with pytest.raises(InputError, match=message):
        downstream(config)


def test_patients_who_taught_the_generator_may_not_be_held_out_now(recipe: Path) -> None:
    config = load_recipe(recipe)
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, "samples/slices"))
    everybody = frozenset(read_real(root, samples, frozenset()).patient.tolist())
    with pytest.raises(InputError, match=r"\d patients who are held out now were among the gen"):
        read_real(root, samples, everybody)
