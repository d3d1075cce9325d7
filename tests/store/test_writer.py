"""What is written comes back, and only whole shards can be written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from raysynth.case import Label
from raysynth.store.reader import SampleSet, case_attrs, case_ids, read_case
from raysynth.store.repository import open_root
from raysynth.store.writer import (
    create_sample_set,
    create_volume,
    set_index,
    update_quarantine,
    write_rows,
    write_volume,
)
from storage_schema.v1 import sample_set, synthetic_run, volume
from tests.store.conftest import (
    COUNT,
    SET_ATTRIBUTES,
    SIZE,
    invented_case,
    invented_index,
    invented_latents,
    invented_samples,
)


def test_a_case_comes_back_as_it_was(read_only_store: str) -> None:
    case = invented_case()
    root = open_root(read_only_store)
    assert case_ids(root) == ["case-a"]
    stored = read_case(root, "case-a")
    np.testing.assert_array_equal(stored.volume.hu, case.volume.hu)
    np.testing.assert_array_equal(stored.volume.direction, case.volume.direction)
    np.testing.assert_array_equal(stored.layout, case.layout)
    np.testing.assert_array_equal(stored.nodules[0].mask, case.nodules[0].mask)
    assert stored.volume.hu.dtype == np.int16
    assert stored.volume.spacing_mm == case.volume.spacing_mm
    assert stored.volume.origin_mm == case.volume.origin_mm
    for name in ("case_id", "patient_key", "split", "intensity", "source"):
        assert getattr(stored, name) == getattr(case, name)
    for name in ("centre_zyx", "corner_zyx", "diameter_mm", "ratings"):
        assert getattr(stored.nodules[0], name) == getattr(case.nodules[0], name)


def test_attributes_say_where_the_lungs_are(read_only_store: str) -> None:
    attributes = case_attrs(open_root(read_only_store), "case-a")
    assert attributes.shape == (37, 40, 150)
    assert attributes.lung_zyx == ((3, 30), (5, 30), (10, 130))
    assert attributes.lung_planes == ((3, 20), (25, 30))


def test_a_case_without_layout_or_nodules() -> None:
    from dataclasses import replace

    root = zarr.create_group(MemoryStore())
    case = replace(invented_case(), layout=None, nodules=())
    write_volume(create_volume(root, case), case)
    assert read_case(root, "case-a").layout is None
    assert case_attrs(root, "case-a").lung_zyx is None


def test_samples_index_and_latents_come_back(read_only_store: str) -> None:
    root = open_root(read_only_store)
    samples, latents = SampleSet(root["samples/slices"]), SampleSet(root["latents/slices/bundle"])
    assert (samples.count, samples.shape, samples.pixel_mm) == (COUNT, (SIZE, SIZE), 1.5)
    assert (samples.rows_per_shard, samples.num_shards) == (64, 3)
    assert [samples.shard_rows(shard) for shard in range(3)] == [(0, 64), (64, 128), (128, 130)]
    for name, values in invented_samples().items():
        np.testing.assert_array_equal(samples.read(name), values)
    for name, values in invented_index().items():
        np.testing.assert_array_equal(samples.index[name], values)
    np.testing.assert_array_equal(latents.read("latents", 60, 130), invented_latents()[60:])
    assert latents.attrs["latent_scale"] == 0.5
    assert latents.index == {}


def test_arrays_on_disk_are_as_the_schema_says(read_only_store: str) -> None:
    root = open_root(read_only_store)
    specs = {
        "volumes/case-a": volume((37, 40, 150)),
        "samples/slices": sample_set(COUNT, (SIZE, SIZE)),
    }
    for path, spec in specs.items():
        for array in spec.arrays:
            stored = json.loads(json.dumps(root[f"{path}/{array.name}"].metadata.to_dict()))
            assert {name: stored[name] for name in array.metadata()} == array.metadata()


@pytest.mark.parametrize(
    ("first_row", "count"),
    [(0, 10), (1, 64), (32, 64), (64, 65), (128, 1), (128, 3), (0, 131)],
)
def test_anything_but_whole_shards_is_refused(first_row: int, count: int) -> None:
    root = zarr.create_group(MemoryStore())
    attributes = {**SET_ATTRIBUTES, "cases": []}
    group = create_sample_set(root, "samples/s", sample_set(COUNT, (4, 4)), attributes)
    rows = np.zeros((count, 4, 4), np.int16)
    with pytest.raises(AssertionError, match="whole shards"):
        write_rows(group, first_row, {"hu": rows})


def test_values_that_a_column_cannot_hold_are_refused() -> None:
    root = zarr.create_group(MemoryStore())
    attributes = {**SET_ATTRIBUTES, "cases": []}
    group = create_sample_set(root, "samples/s", sample_set(2, (4, 4)), attributes)
    with pytest.raises(AssertionError, match="int16"):
        set_index(group, {"nodule": [1, 40_000]})
    with pytest.raises(AssertionError, match="not float64"):
        write_rows(group, 0, {"hu": np.zeros((2, 4, 4))})


def test_a_group_without_its_attributes_is_refused() -> None:
    root = zarr.create_group(MemoryStore())
    with pytest.raises(ValueError, match=r"synthetic/run: .*'passport'"):
        create_sample_set(root, "synthetic/run", synthetic_run(2, (4, 4)), SET_ATTRIBUTES)


def test_a_seed_keeps_all_its_bits() -> None:
    root = zarr.create_group(MemoryStore())
    spec = synthetic_run(1, (4, 4))
    attributes = {attribute.name: None for attribute in spec.attributes}
    group = create_sample_set(root, "synthetic/run", spec, attributes)
    set_index(group, {"seed": np.array([2**63 - 25], np.uint64)})
    assert SampleSet(group).index["seed"].tolist() == [2**63 - 25]


def test_quarantine_merges_without_duplicates() -> None:
    root = zarr.create_group(MemoryStore())
    root.create_group("quarantine", attributes={"entries": []})
    first = {
        "source": "a",
        "rule": "missing-slice",
        "reason": "why",
        "when": "2026-01-01T00:00:00Z",
    }
    update_quarantine(root, [first, first])
    update_quarantine(root, [{**first, "when": "2026-02-02"}, {**first, "rule": "tilt"}])
    entries = root["quarantine"].attrs["entries"]
    assert [(e["source"], e["rule"], e["when"][:7]) for e in entries] == [
        ("a", "missing-slice", "2026-01"),
        ("a", "tilt", "2026-01"),
    ]


def test_labels_of_the_code_are_those_of_the_schema(tmp_path: Path) -> None:
    from raysynth import case
    from storage_schema import v1

    assert {int(label) for label in Label} == set(v1.LABELS)
    assert case.ATTRIBUTES == v1.ATTRIBUTES
    assert case.CONDITION_ATTRIBUTES == v1.CONDITION_ATTRIBUTES
    assert case.MAX_READERS == v1.NUM_READERS
