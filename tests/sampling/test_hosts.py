"""Where holes are made, and where another patient's tissue is put."""

from __future__ import annotations

import numpy as np
import zarr

from raysynth.case import Label
from raysynth.config import parse_recipe
from raysynth.layout.holes import ORGANS
from raysynth.sampling.hosts import _hole, _rows_by_organ, place_tissue, tissue_means
from raysynth.store.reader import SampleSet
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import SPLITS, sample_set

SIDE = 40


def layout(with_tumour: bool) -> np.ndarray:
    """A disc of liver in the body, maybe with a tumour in it."""
    y, x = np.mgrid[:SIDE, :SIDE]
    made = np.full((SIDE, SIDE), Label.BODY, np.uint8)
    made[(y - 20) ** 2 + (x - 16) ** 2 < 12**2] = Label.LIVER
    made[2:8, 30:38] = Label.SPLEEN
    if with_tumour:
        made[18:22, 12:18] = Label.TUMOUR
        made[22, 14] = Label.TUMOUR
    return made


def test_tissue_keeps_its_shape_and_lies_in_its_organ() -> None:
    host, donor = layout(False), layout(True)
    corners = set()
    for seed in range(40):
        placed = place_tissue(host, donor, Label.TUMOUR, np.random.default_rng(seed))
        assert placed is not None
        new = placed == Label.TUMOUR
        assert (host[new] == Label.LIVER).all()
        assert np.array_equal(placed[~new], host[~new])
        (y, x), (dy, dx) = np.argwhere(new).min(axis=0), np.argwhere(donor == Label.TUMOUR).min(0)
        assert np.array_equal(np.roll(donor == Label.TUMOUR, (y - dy, x - dx), (0, 1)), new)
        corners.add((y, x))
    assert len(corners) > 20


def test_a_host_without_the_organ_takes_nothing() -> None:
    host = np.where(layout(False) == Label.LIVER, Label.BODY, layout(False)).astype(np.uint8)
    assert place_tissue(host, layout(True), Label.TUMOUR, np.random.default_rng(0)) is None


def test_an_organ_is_all_of_it_and_has_its_own_hosts() -> None:
    both = layout(True)
    both[30:34, 4:8], both[30:34, 30:34] = Label.RIGHT_KIDNEY, Label.LEFT_KIDNEY
    hosts = {3: layout(False), 8: both}
    rows_of = {organ: rows.tolist() for organ, rows in _rows_by_organ(hosts, ORGANS)}
    assert rows_of == {"liver": [3, 8], "kidney": [8], "spleen": [3, 8], "tumour": [8]}
    config = parse_recipe("{work_dir: runs, model: {family: pix2pix}}", name="holes")
    made = _hole(both, "kidney", config, [], np.random.default_rng(0))
    assert made is not None
    assert np.array_equal(made[0], np.isin(both, ORGANS["kidney"]))


def test_the_mean_of_a_tissue_is_that_of_training_patients_within_the_window() -> None:
    rng = np.random.default_rng(0)
    layouts = np.stack([layout(number % 2 == 0) for number in range(6)])
    hu = rng.integers(-400, 400, layouts.shape).astype(np.int16)
    split = np.array(
        [SPLITS.index(name) for name in ("train", "train", "test", "test", "train", "val")]
    )
    root = zarr.create_group(zarr.storage.MemoryStore(), zarr_format=3)
    attributes = {
        "kind": "slices",
        "intensity": "hu",
        "cases": ["case"],
        "parent_snapshot": "none",
        "fingerprint": "f" * 12,
        "settings": {},
        "pixel_mm": 1.0,
        "spacing_mm": 1.0,
        "field_of_view_mm": 40.0,
    }
    spec = sample_set(len(hu), hu.shape[1:])
    group = create_sample_set(root, "samples/slices", spec, attributes)
    set_index(group, {"split": split})
    write_rows(group, 0, {"hu": hu, "layout": layouts})
    means = tissue_means(SampleSet(group), (-100, 200))
    learned = split == SPLITS.index("train")
    for label in (Label.LIVER, Label.SPLEEN, Label.TUMOUR, Label.BODY):
        of_label = np.clip(hu[learned][layouts[learned] == label], -100, 200)
        assert means[label] == round(of_label.mean())
    assert means[Label.NODULE] == 0
