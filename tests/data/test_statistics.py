from __future__ import annotations

import numpy as np
import pytest

from raysynth.config import ExperimentConfig
from raysynth.data.statistics import HU_EDGES, statistics
from raysynth.store.reader import case_ids, read_case
from raysynth.store.repository import open_root
from storage_schema.v1 import LABELS


@pytest.mark.ray
def test_counts_equal_those_of_the_whole_volumes(phantom_store: ExperimentConfig) -> None:
    root = open_root(phantom_store.store_url)
    cases = [read_case(root, case_id) for case_id in case_ids(root)]
    hu = np.concatenate([case.volume.hu.ravel() for case in cases])
    layout = np.concatenate([case.layout.ravel() for case in cases])

    found = statistics(phantom_store.store_url)

    expected, _ = np.histogram(hu.clip(HU_EDGES[0], HU_EDGES[-1]), HU_EDGES)
    np.testing.assert_array_equal(found.histogram, expected)
    assert found.voxels == {
        name: int((layout == label).sum()) for label, name in LABELS.items() if label in layout
    }
    for label, name in LABELS.items():
        if name in found.mean_hu:
            assert found.mean_hu[name] == pytest.approx(hu[layout == label].mean())
    assert found.mean_hu["left lung"] < -600 < found.mean_hu["body"]
