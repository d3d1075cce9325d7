from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from raysynth.case import Label
from raysynth.config import ExperimentConfig, PhantomSource
from raysynth.data.ingest import _write_case, ingest
from raysynth.data.sources import CaseRef, list_cases, read_case
from raysynth.errors import InputError, RaysynthError
from raysynth.phantom.patient import phantom_case
from raysynth.store import reader
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.validate import validate
from tests.data.tiny import TINY_SOURCE, tiny_config
from tests.formats.dicom_files import write_series

pytestmark = pytest.mark.ray


def test_the_store_holds_what_the_source_has(phantom_store: ExperimentConfig) -> None:
    root = open_root(phantom_store.store_url)
    assert validate(phantom_store.store_url, full=True) == []
    refs, _ = list_cases(phantom_store)
    assert reader.case_ids(root) == [ref.case_id for ref in refs]
    expected = read_case(refs[2])
    stored = reader.read_case(root, refs[2].case_id)
    np.testing.assert_array_equal(stored.volume.hu, expected.volume.hu)
    np.testing.assert_array_equal(stored.layout, expected.layout)
    assert stored.split == refs[2].split
    assert len(stored.nodules) == len(expected.nodules) > 0
    assert root.attrs["ingested"] == {"split": {"val": 0.1, "test": 0.2}}


def test_a_second_ingest_adds_only_what_is_new(tmp_path: Path, local_ray: None) -> None:
    first = ingest(tiny_config(tmp_path, source={**TINY_SOURCE, "num_patients": 1}))
    assert (first.cases, first.added) == (1, 1)
    again = ingest(tiny_config(tmp_path, source={**TINY_SOURCE, "num_patients": 1}))
    assert (again.cases, again.added, again.snapshot) == (1, 0, first.snapshot)
    grown = ingest(tiny_config(tmp_path, source={**TINY_SOURCE, "num_patients": 2}))
    assert (grown.cases, grown.added) == (2, 1)
    # Alone, the first patient trains, and stays there: though of these two it would be the one to
    # test, the new one has to.
    refs, _ = list_cases(tiny_config(tmp_path, source={**TINY_SOURCE, "num_patients": 2}))
    assert [ref.split for ref in refs] == ["test", "train"]
    root = open_root(str(tmp_path / "store"))
    splits = [reader.case_attrs(root, name).split for name in reader.case_ids(root)]
    assert splits == ["train", "test"]


def test_settings_that_stored_cases_share_cannot_change(tmp_path: Path, local_ray: None) -> None:
    source = {**TINY_SOURCE, "num_patients": 1}
    ingest(tiny_config(tmp_path, source=source))
    with pytest.raises(InputError, match=r"was ingested with split .*'test': 0.2.* set it back"):
        ingest(tiny_config(tmp_path, source=source, split={"test": 0.3}))


def test_a_list_of_splits_holds_from_the_first_case_on(tmp_path: Path, local_ray: None) -> None:
    source, table = {**TINY_SOURCE, "num_patients": 2}, tmp_path / "splits.csv"
    ids = [ref.case_id for ref in list_cases(tiny_config(tmp_path, source=source))[0]]
    table.write_text(f"patient,split\n{ids[0]},val\n{ids[1]},train\n")
    listed = tiny_config(tmp_path, source=source, split_list=table)
    ingest(listed)
    root = open_root(listed.store_url)
    assert [reader.case_attrs(root, name).split for name in ids] == ["val", "train"]
    table.write_text(f"patient,split\n{ids[0]},val\n{ids[1]},test\n")
    with pytest.raises(InputError, match=r"puts 1 patients of store .* into another split"):
        ingest(listed)
    with pytest.raises(InputError, match="was ingested with split listed"):
        ingest(tiny_config(tmp_path, source=source))


def test_a_recipe_nobody_can_fulfil_is_not_the_cases_fault(tmp_path: Path, local_ray: None) -> None:
    with pytest.raises(InputError, match="no LIDC nodule measures 60 mm"):
        ingest(tiny_config(tmp_path, source={**TINY_SOURCE, "min_diameter_mm": 60}))
    assert open_root(str(tmp_path / "store"))["quarantine"].attrs["entries"] == []


# Read by LIDC's radiologists, who outlined nothing in them.
NODULE_FREE_SERIES = (
    "1.3.6.1.4.1.14519.5.2.1.6279.6001.203741923654363010377298352671",
    "1.3.6.1.4.1.14519.5.2.1.6279.6001.803808126682275425758092691689",
)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DICOM of two phantoms, of one that lost its middle plane, and of no LIDC patient; noise."""
    folder = tmp_path_factory.mktemp("scans")
    source = PhantomSource(spacing_mm=(5.0, 3.0, 3.0))
    for number, uid in enumerate([*NODULE_FREE_SERIES, "1.2.3.4"]):
        volume = phantom_case(source, number).volume
        write_series(folder / f"Doe{number}", volume, series_uid=uid, patient_id=f"MRN-{number}")
    holed = write_series(folder / "Doe3", volume, series_uid="1.2.3.2", patient_id="MRN-3")
    holed[len(holed) // 2].unlink()
    (folder / "Doe4").mkdir()
    (folder / "Doe4" / "broken.dcm").write_bytes(b"no DICOM")
    return folder


def test_bad_cases_go_to_quarantine_without_a_name(
    tmp_path: Path, scans: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"kind": "lidc", "path": scans}
    config = tiny_config(tmp_path, source=source, max_quarantined=0.7)
    summary = ingest(config)
    assert (summary.cases, summary.added, summary.quarantined) == (2, 2, 3)
    root = open_root(config.store_url)
    entries = root["quarantine"].attrs["entries"]
    assert {entry["rule"] for entry in entries} == {"missing-slice", "not-dicom", "not-annotated"}
    for case_id in reader.case_ids(root):
        layout = reader.read_case(root, case_id).layout
        assert {Label.LEFT_LUNG, Label.RIGHT_LUNG} <= set(np.unique(layout).tolist())
    everything = json.dumps([root.attrs.asdict(), caplog.text]) + "".join(
        path + json.dumps(node.attrs.asdict()) for path, node in root.members(max_depth=None)
    )
    for secret in ("MRN", "Doe", "1.2.3.", "1.3.6.1", "Elsewhere", "19991231", str(scans)):
        assert secret not in everything

    again = ingest(config)
    assert (again.added, again.snapshot) == (0, summary.snapshot)

    config.key_path.write_text("0" * 64)
    with pytest.raises(InputError, match=r"is not the key that the patients .* were named with"):
        ingest(config)


def test_who_is_read_at_last_leaves_the_quarantine(
    tmp_path: Path, scans: Path, local_ray: None
) -> None:
    folder = tmp_path / "scans"
    shutil.copytree(scans / "Doe0", folder / "a")
    shutil.copytree(scans / "Doe1", folder / "b")
    lost = sorted((folder / "b").iterdir())[5].rename(tmp_path / "lost.dcm")
    config = tiny_config(tmp_path, source={"kind": "lidc", "path": folder})
    assert ingest(config).quarantined == 1
    lost.rename(folder / "b" / "found.dcm")
    summary = ingest(config)
    assert (summary.cases, summary.added, summary.quarantined) == (2, 1, 0)
    assert open_root(config.store_url)["quarantine"].attrs["entries"] == []


def test_too_many_refusals_fail_after_the_good_cases_are_published(
    tmp_path: Path, scans: Path, local_ray: None
) -> None:
    source = {"kind": "lidc", "path": scans}
    with pytest.raises(RaysynthError, match=r"60% of the cases were refused, .* is 40%") as caught:
        ingest(tiny_config(tmp_path, source=source, max_quarantined=0.4))
    assert caught.value.exit_code == 1
    assert len(reader.case_ids(open_root(str(tmp_path / "store")))) == 2


def test_nothing_but_refusals_is_bad_input(tmp_path: Path, scans: Path, local_ray: None) -> None:
    source = {"kind": "lidc", "path": scans / "Doe3"}
    with pytest.raises(InputError, match=r"all 1 cases were refused: missing-slice \(1\)"):
        ingest(tiny_config(tmp_path, source=source))
    store = str(tmp_path / "store")
    assert len(open_root(store)["quarantine"].attrs["entries"]) == 1
    assert main_snapshot(store)


def test_an_unforeseen_error_is_named_without_its_text(tmp_path: Path) -> None:
    store = zarr.open_group(tmp_path / "unused", mode="w")
    # No recipe can say this: it stands for what nobody thought of. The KeyError quotes it.
    source = PhantomSource.model_construct(anatomy="Doe^Jane")
    ref = CaseRef("abc", "def", "train", source)
    refusal = _write_case(store, ref)
    assert refusal.rule == "unexpected"
    assert re.fullmatch(r"\w+Error in \w+\.py, line \d+", refusal.reason)
    assert not list(store.group_keys())
