from __future__ import annotations

import json
import re
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
    assert (root.attrs["cases"], root.attrs["patients"], root.attrs["indicative"]) == (4, 4, True)


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


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DICOM of two phantoms, of one whose middle plane is lost, of noise, and one broken file."""
    folder = tmp_path_factory.mktemp("scans")
    source = PhantomSource(spacing_mm=(5.0, 3.0, 3.0))
    for number in range(2):
        volume = phantom_case(source, number).volume
        uid = f"1.2.3.{number}"
        write_series(folder / f"Doe{number}", volume, series_uid=uid, patient_id=f"MRN-{number}")
    holed = write_series(folder / "Doe2", volume, series_uid="1.2.3.2", patient_id="MRN-2")
    holed[len(holed) // 2].unlink()
    (folder / "Doe3").mkdir()
    (folder / "Doe3" / "broken.dcm").write_bytes(b"no DICOM")
    return folder


def test_bad_cases_go_to_quarantine_without_a_name(
    tmp_path: Path, scans: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path, source={"kind": "lidc", "path": scans})
    summary = ingest(config)
    assert (summary.cases, summary.added, summary.quarantined) == (2, 2, 2)
    root = open_root(config.store_url)
    entries = root["quarantine"].attrs["entries"]
    assert {entry["rule"] for entry in entries} == {"missing-slice", "not-dicom"}
    for case_id in reader.case_ids(root):
        layout = reader.read_case(root, case_id).layout
        assert {Label.LEFT_LUNG, Label.RIGHT_LUNG} <= set(np.unique(layout).tolist())
    everything = json.dumps([root.attrs.asdict(), caplog.text]) + "".join(
        path + json.dumps(node.attrs.asdict()) for path, node in root.members(max_depth=None)
    )
    for secret in ("MRN", "Doe", "1.2.3.", "Elsewhere", "19991231", str(scans)):
        assert secret not in everything

    again = ingest(config)
    assert (again.added, again.snapshot) == (0, summary.snapshot)


def test_too_many_refusals_fail_after_the_good_cases_are_published(
    tmp_path: Path, scans: Path, local_ray: None
) -> None:
    source = {"kind": "lidc", "path": scans}
    with pytest.raises(RaysynthError, match=r"50% of the cases were refused, .* is 40%") as caught:
        ingest(tiny_config(tmp_path, source=source, max_quarantined=0.4))
    assert caught.value.exit_code == 1
    assert len(reader.case_ids(open_root(str(tmp_path / "store")))) == 2


def test_nothing_but_refusals_is_bad_input(tmp_path: Path, scans: Path, local_ray: None) -> None:
    source = {"kind": "lidc", "path": scans / "Doe2"}
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
