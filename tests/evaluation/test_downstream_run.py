"""`raysynth downstream` on a recipe of phantoms, from the scans to the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from raysynth.cli import main
from raysynth.config import load_recipe
from raysynth.errors import InputError
from raysynth.evaluation.downstream.from_store import read_real, read_synthetic, taught
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

RECIPE = """
work_dir: {work_dir}
data:
  source:
    kind: phantom
    num_patients: 10
    spacing_mm: [10.0, 6.0, 6.0]
    nodules_per_patient: [2, 3]
    min_diameter_mm: 20
  split: {{val: 0.2, test: 0.4}}
  samples: {{size: 48, spacing_mm: 10.0, nodule_free_every: 4}}
model:
  family: semantic_diffusion
  channels: [8, 16]
  attention_levels: [false, false]
  num_res_blocks: 1
  norm_num_groups: 4
training:
  global_batch_size: 8
  open_shards: 4
  max_seen_samples: 16
sampling:
  num_samples: 48
  num_inference_steps: 2
  batch_size: 16
  cohort: {{texture: {{solid: 0.5}}}}
evaluation: {{controls: false}}
downstream:
  tasks: [classification, malignancy, localisation, segmentation]
  folds: 3
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


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose samples have been drawn."""
    folder = tmp_path_factory.mktemp("downstream")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(work_dir=folder / "run"))
    for verb in ("ingest", "shard", "train", "synthesize"):
        assert main([verb, str(path)]) == 0
    return path


def test_a_recipe_is_put_to_the_trial(recipe: Path) -> None:
    assert main(["downstream", str(recipe)]) == 0
    folder = recipe.parent / "run" / "evaluation"
    found = json.loads((folder / "tiny_downstream.json").read_text())
    assert set(found["tasks"]) == {"classification", "malignancy", "localisation", "segmentation"}
    for result in found["tasks"].values():
        assert list(result["arms"]) == ARMS
        assert list(result["rare"]) == RARE
        assert {arm["steps"] for arm in result["arms"].values()} == {2}
        assert result["arms"]["real"]["synthetic"] == 0
        for arm in result["arms"].values():
            for metric in arm["metrics"].values():
                assert len(metric["folds"]) == 3
    named = {"accuracy", "precision", "recall", "specificity", "f1", "auc"}
    assert set(found["tasks"]["classification"]["arms"]["real"]["metrics"]) == named
    boxes = found["tasks"]["localisation"]["arms"]["real"]["metrics"]
    assert set(boxes) == {"ap50", "ap60", "ar50", "ar60", "ar70"}
    assert sum(found["folds"]) == found["patients"]["held_out"] < found["patients"]["real"]
    # Layouts are lent by training patients, who never test.
    assert found["excluded"] == {"synthetic": [0, 0, 0]}
    for said in ("phantoms", "indicative only", "can be certain", "for 2 steps"):
        assert any(said in notice for notice in found["notices"]), said
    page = (folder / "tiny_downstream.html").read_text()
    assert page.count("<table>") == 8
    assert found["verdicts"][0].partition(": ")[2] in page


def test_synthetic_samples_descend_from_their_lenders(recipe: Path) -> None:
    config = load_recipe(recipe)
    root = open_root(config.store_url)
    real = read_real(root, SampleSet(open_group(root, "samples/slices")), taught(config))
    run = SampleSet(open_group(root, "synthetic/tiny"))
    drawn = read_synthetic(root, run, accepted_only=False)
    assert set(drawn.patient.tolist()) <= taught(config)
    assert not set(real.patient[real.held_out].tolist()) & taught(config)
    assert np.isfinite(drawn.scores[drawn.boxed]).all()
    assert len(read_synthetic(root, run, accepted_only=False)) == 48


BAD = {
    "too many folds": ("downstream.folds=9", r"folds 9, but \d patients with a nodule"),
    "too few samples": ("downstream.ratios=[50]", r"ratios 50 wants \d+ samples of synthetic"),
    "no such run": ("name=other", "no 'other' in /synthetic; there is: tiny"),
    "another drawing": ("sampling.num_inference_steps=3", "was drawn with sampling.num_inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_tried_is_refused(
    recipe: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    override, message = BAD[case]
    assert main(["downstream", str(recipe), "--set", override]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_patients_who_taught_the_generator_may_not_be_held_out_now(recipe: Path) -> None:
    config = load_recipe(recipe)
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, "samples/slices"))
    everybody = frozenset(read_real(root, samples, frozenset()).patient.tolist())
    with pytest.raises(InputError, match=r"\d patients who are held out now were among the gen"):
        read_real(root, samples, everybody)
