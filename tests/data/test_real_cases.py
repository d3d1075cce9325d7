from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysynth.case import ATTRIBUTES, Label
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.store.reader import SampleSet, case_attrs, case_ids, open_group
from raysynth.store.repository import open_root
from raysynth.store.validate import validate
from tests.data.tiny import tiny_config


@pytest.mark.ray
def test_real_patients_become_samples_with_boxes_on_their_nodules(
    tmp_path: Path, lidc_dicom: Path, local_ray: None
) -> None:
    samples = {"size": 256, "spacing_mm": 0.7, "nodule_slices": "centre", "nodule_free_every": 40}
    config = tiny_config(tmp_path, source={"kind": "lidc", "path": lidc_dicom}, samples=samples)
    ingested = ingest(config)
    assert (ingested.cases, ingested.nodules, ingested.quarantined) == (3, 8, 0)
    root = open_root(config.store_url)
    splits = {case_attrs(root, case_id).split for case_id in case_ids(root)}
    assert {"train", "test"} <= splits

    summary = shard(config)
    assert validate(config.store_url) == []
    cut = SampleSet(open_group(open_root(config.store_url), "samples/slices"))
    index, hu, layout = cut.index, cut.read("hu"), cut.read("layout")
    rows = np.flatnonzero(index["nodule"] >= 0)
    assert summary.nodule_samples == len(rows) == 8
    textures = index["ratings"][rows, :, ATTRIBUTES.index("texture")]
    for row, texture in zip(rows, textures, strict=True):
        y0, x0, y1, x1 = index["box"][row]
        centre = hu[row, (y0 + y1) // 2, (x0 + x1) // 2]
        lung = np.isin(layout[row], (Label.LEFT_LUNG, Label.RIGHT_LUNG))
        if np.median(texture[texture > 0]) >= 4:
            assert centre > np.median(hu[row][lung]) + 300
    free = hu[(index["nodule"] < 0) & (index["split"] == 0)]
    assert len(free)
    # Air around the patient, whatever the scanner filled it with, and tissue inside.
    assert free.min() >= -1100
    assert np.median(free[:, 120:136, 120:136]) > -100
