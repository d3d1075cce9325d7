from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from raysynth.case import ATTRIBUTES
from raysynth.config import ExperimentConfig
from raysynth.data.statistics import HU_EDGES, SIZE_EDGES_MM, joint_ratings, statistics
from raysynth.formats.lidc import nodule_records
from raysynth.store.reader import case_ids, read_case
from raysynth.store.repository import open_root
from storage_schema.v1 import LABELS, SPLITS


@pytest.mark.ray
def test_counts_equal_those_of_the_whole_volumes(phantom_store: ExperimentConfig) -> None:
    root = open_root(phantom_store.store_url)
    cases = [read_case(root, case_id) for case_id in case_ids(root)]
    hu = np.concatenate([case.volume.hu.ravel() for case in cases])
    layout = np.concatenate([case.layout.ravel() for case in cases])

    found = statistics(phantom_store.store_url)

    expected, _ = np.histogram(hu.clip(HU_EDGES[0], HU_EDGES[-1]), HU_EDGES)
    np.testing.assert_array_equal(found.histogram, expected)
    assert found.histograms.keys() == {LABELS[label] for label in np.unique(layout)}
    for label, name in LABELS.items():
        if name in found.histograms:
            assert found.histograms[name].sum() == (layout == label).sum()
        if name in found.mean_hu:
            assert found.mean_hu[name] == pytest.approx(hu[layout == label].mean())
    assert found.mean_hu["left lung"] < -600 < found.mean_hu["body"]

    nodules = [nodule for case in cases for nodule in case.nodules]
    np.testing.assert_array_equal(found.spacing_mm, [case.volume.spacing_mm for case in cases])
    np.testing.assert_array_equal(found.diameter_mm, [one.diameter_mm for one in nodules])
    assert found.strata.sum() == len(nodules) > 0
    by_split = {split: sum(len(c.nodules) for c in cases if c.split == split) for split in SPLITS}
    assert dict(zip(SPLITS, found.strata.sum(axis=(1, 2)).tolist(), strict=True)) == by_split
    large = sum(nodule.diameter_mm >= SIZE_EDGES_MM[-1] for nodule in nodules)
    assert found.strata[:, -1].sum() == large
    assert found.strata[..., 0].sum() == 0  # LIDC's nodules are all rated


def test_pairs_of_scores_are_counted_as_lidc_has_them() -> None:
    rows = np.array([row for one in nodule_records() for row in one.ratings])
    joint = joint_ratings(rows)
    np.testing.assert_array_equal(joint.sum(axis=(2, 3)), len(rows))
    margin, texture = ATTRIBUTES.index("margin"), ATTRIBUTES.index("texture")
    np.testing.assert_array_equal(joint[margin, texture], joint[texture, margin].T)
    both = (rows[:, margin] == 5) & (rows[:, texture] == 1)
    assert joint[margin, texture, 5, 1] == both.sum() > 0
    # Published of the whole database: +.60 between margin and texture.
    pairs = np.argwhere(joint[margin, texture]).repeat(
        joint[margin, texture][joint[margin, texture] > 0], axis=0
    )
    assert spearmanr(*pairs.T).statistic == pytest.approx(0.60, abs=0.01)
