from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from raysynth.case import Label
from raysynth.config import ExperimentConfig
from raysynth.data.shard import shard
from raysynth.errors import InputError
from raysynth.preprocess.slices import cut_slices, plan_slices
from raysynth.store.reader import SampleSet, case_attrs, case_ids, open_group, read_case
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.validate import validate
from tests.data.tiny import tiny_config

pytestmark = pytest.mark.ray


def stored(config: ExperimentConfig) -> SampleSet:
    return SampleSet(open_group(open_root(config.store_url), "samples/slices"))


def test_rows_are_the_planned_slices_of_their_cases(phantom_store: ExperimentConfig) -> None:
    samples, root = stored(phantom_store), open_root(phantom_store.store_url)
    settings = phantom_store.data.samples
    for number, case_id in enumerate(samples.attrs["cases"]):
        rows = np.flatnonzero(samples.index["case"] == number)
        plans = plan_slices(case_attrs(root, case_id), settings)
        assert rows.tolist() == list(range(rows[0], rows[0] + len(plans)))
        batch = cut_slices(read_case(root, case_id), plans, settings)
        span = (int(rows[0]), int(rows[-1]) + 1)
        np.testing.assert_array_equal(samples.read("hu", *span), batch.hu)
        np.testing.assert_array_equal(samples.read("layout", *span), batch.layout)
        np.testing.assert_array_equal(samples.index["box"][rows], batch.box)
        np.testing.assert_array_equal(samples.index["ratings"][rows], batch.ratings)


def test_the_index_agrees_with_the_pixels(phantom_store: ExperimentConfig) -> None:
    samples = stored(phantom_store)
    index, layout = samples.index, samples.read("layout")
    nodules = (layout == Label.NODULE).any(axis=(1, 2))
    np.testing.assert_array_equal(index["has_nodule"], nodules)
    assert 0 < (index["nodule"] >= 0).sum() < samples.count
    for row in np.flatnonzero(index["nodule"] >= 0):
        y0, x0, y1, x1 = index["box"][row]
        assert (layout[row, y0:y1, x0:x1] == Label.NODULE).any()
    names, root = samples.attrs["cases"], open_root(phantom_store.store_url)
    for case, nodule, diameter_mm in zip(
        index["case"], index["nodule"], index["diameter_mm"], strict=True
    ):
        nodules_of_case = case_attrs(root, names[case]).nodules
        expected = nodules_of_case[nodule].diameter_mm if nodule >= 0 else np.nan
        assert diameter_mm == pytest.approx(expected, rel=1e-6, nan_ok=True)
    # By split: a shard of one split is not read for another.
    assert (np.diff(index["split"].astype(int)) >= 0).all()


def test_the_same_recipe_has_nothing_left_to_do(phantom_store: ExperimentConfig) -> None:
    before = main_snapshot(phantom_store.store_url)
    again = shard(phantom_store)
    assert again.snapshot == before
    assert again.samples == stored(phantom_store).count
    assert again.shards == -(-again.samples // 64)


def test_a_name_that_is_taken_is_refused(phantom_store: ExperimentConfig) -> None:
    samples = phantom_store.data.samples.model_dump() | {"size": 64}
    with pytest.raises(InputError, match=r"another name by data\.samples\.name"):
        shard(tiny_config(phantom_store.work_dir, samples=samples))


def test_samples_that_nothing_can_be_cut_for_are_refused(phantom_store: ExperimentConfig) -> None:
    samples = phantom_store.data.samples.model_dump()
    none = samples | {"name": "none", "min_nodule_mm": 1000.0, "nodule_free_every": 0}
    with pytest.raises(InputError, match="none of the store's 4 cases"):
        shard(tiny_config(phantom_store.work_dir, samples=none))


def test_cubes_are_cut_and_indexed_like_slices(
    phantom_store: ExperimentConfig, tmp_path: Path
) -> None:
    shutil.copytree(phantom_store.store_url, tmp_path / "store")
    patches = {
        "kind": "patches",
        "size": 16,
        "field_of_view_mm": 64.0,
        "patches_per_nodule": 2,
        "random_per_case": 3,
    }
    config = tiny_config(tmp_path, samples=patches)
    done = shard(config)
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, "samples/patches"))
    cases = [case_attrs(root, case_id) for case_id in case_ids(root)]
    assert done.nodule_samples == 2 * sum(len(case.nodules) for case in cases)
    assert samples.count == done.nodule_samples + 3 * len(cases)
    assert samples.shape == (16, 16, 16)
    layout, index = samples.read("layout"), samples.index
    for row in np.flatnonzero(index["nodule"] >= 0):
        z0, y0, x0, z1, y1, x1 = index["box"][row]
        assert (layout[row, z0:z1, y0:y1, x0:x1] == Label.NODULE).any()
    np.testing.assert_array_equal(index["has_nodule"], (layout == 5).any(axis=(1, 2, 3)))
    assert np.isfinite(index["middle_mm"]).all()
    assert validate(config.store_url, full=True) == []
    with pytest.raises(
        InputError, match=r"done with slices alone, but data\.samples\.kind is patches"
    ):
        _ = config.slices
