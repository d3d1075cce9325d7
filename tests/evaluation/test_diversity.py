"""Which real nodules count as one request, and how alike the samples of one are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import ndimage

from raysynth.config import EvaluationConfig, ExperimentConfig
from raysynth.config.evaluation import LpipsConfig
from raysynth.evaluation.diversity import likeness, match_nodules
from raysynth.evaluation.measure import Measures
from raysynth.metrics.perceptual import Lpips
from raysynth.metrics.similarity import ms_ssim
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import synthetic_run
from tests.metrics.test_perceptual import save_lpips


def test_nodules_match_by_scores_size_and_different_patients() -> None:
    scores = np.array([[5, 5], [4, 5], [5, 5], [3, 5], [5, 5], [np.nan, 5]])
    diameter_mm = np.array([9.0, 10.0, 20.0, 9.0, 9.5, 9.0])
    patients = np.array([0, 1, 2, 3, 0, 4])
    for seed in range(5):
        pairs = match_nodules(scores, diameter_mm, patients, seed)
        # 2 is too large, 5 has no score, 0 and 4 are of one patient; 3 is like 1 alone.
        assert {tuple(sorted(pair)) for pair in pairs.tolist()} <= {(0, 1), (1, 3), (1, 4)}
        assert len(pairs) == 1
    sizes_alone = match_nodules(scores[:, :0], diameter_mm, patients, 0)
    assert len(sizes_alone) == 2
    assert len(np.unique(sizes_alone)) == 4
    assert 2 not in sizes_alone
    assert match_nodules(scores[:0], diameter_mm[:0], patients[:0], 0).shape == (0, 2)


def _write(root: zarr.Group, hu: np.ndarray) -> None:
    attributes = {
        "kind": "slices",
        "intensity": "hu",
        "parent_snapshot": "none",
        "cases": [],
        "pixel_mm": 5.0,
        "bundle": "b" * 64,
        "plan": "p" * 12,
        "source_set": "slices",
        "passport": {},
    }
    spec = synthetic_run(len(hu), hu.shape[1:])
    group = create_sample_set(root, "synthetic/run_pairs", spec, attributes)
    set_index(group, {"box": np.full((len(hu), 4), -1)})
    write_rows(group, 0, {"hu": hu, "layout": np.zeros(hu.shape, np.uint8)})


@pytest.mark.ray
def test_pairs_are_compared_by_ssim_and_by_a_backbone(tmp_path: Path, local_ray: None) -> None:
    """Two samples of each of three requests, of 40 pixels and without nodules."""
    noise = np.random.default_rng(0).normal(size=(6, 40, 40))
    hu = (ndimage.gaussian_filter(noise, (0, 1.5, 1.5)) * 1500 - 400).astype(np.int16)
    hu[1] = hu[0]
    with StoreRun(str(tmp_path / "store"), verb="test", fingerprint="f" * 12) as run:
        run.declare(lambda root: _write(root, hu), "pairs")
        run.publish("pairs")
    pairs = SampleSet(open_group(open_root(str(tmp_path / "store")), "synthetic/run_pairs"))
    backbone, heads = save_lpips("alex", tmp_path)
    config = ExperimentConfig.model_validate(
        {
            "name": "run",
            "work_dir": tmp_path,
            "model": {"family": "semantic_diffusion"},
            "evaluation": EvaluationConfig(lpips=LpipsConfig(backbone=backbone, heads=heads)),
        }
    )
    found = likeness(config, {"synthetic": pairs}, pairs, Measures(), np.zeros(6, np.int64))
    lpips = Lpips("alex", backbone, heads, (-1000.0, 400.0))
    means = {key: of_sets["synthetic"].value for key, of_sets in found.items()}
    assert means == {
        "ms_ssim/slice/all/2-scales@1/3": ms_ssim(hu[::2], hu[1::2], (-1000.0, 400.0)).mean(),
        f"lpips/slice/all/{lpips.name}/3": lpips(hu[::2], hu[1::2]).mean(),
    }
