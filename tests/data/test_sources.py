from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.data import sources
from raysynth.data.sources import list_cases
from raysynth.errors import InputError
from raysynth.seeding import load_key, pseudonym
from tests.data.tiny import TINY_SOURCE, tiny_config
from tests.formats.dicom_files import small_volume, write_series


def test_more_phantoms_keep_the_names_of_the_first_ones(tmp_path: Path) -> None:
    few, _ = list_cases(tiny_config(tmp_path))
    more, _ = list_cases(tiny_config(tmp_path, source={**TINY_SOURCE, "num_patients": 6}))
    finer, _ = list_cases(tiny_config(tmp_path, source={**TINY_SOURCE, "spacing_mm": (4, 4, 4)}))
    names = [ref.case_id for ref in few]
    assert names == [ref.case_id for ref in more][:4]
    assert not {ref.case_id for ref in finer}.intersection(names)


def test_a_split_has_whole_patients_and_names_are_keyed(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    for patient in range(6):
        for series in range(2):
            folder = scans / f"Doe_{patient}" / str(series)
            uid = f"1.2.3.{patient}.{series}"
            write_series(folder, small_volume(8), series_uid=uid, patient_id=f"MRN-{patient}")
    (scans / "LICENSE.txt").write_text("not an image")
    config = tiny_config(tmp_path, source={"kind": "lidc", "path": scans})
    refs, refused = list_cases(config)

    key = load_key(config.key_path)
    assert not refused
    assert len(refs) == 12
    assert {ref.patient_key for ref in refs} == {
        pseudonym(key, "patient", f"MRN-{patient}") for patient in range(6)
    }
    by_patient = {ref.patient_key: ref.split for ref in refs}
    assert all(by_patient[ref.patient_key] == ref.split for ref in refs)
    assert {"train", "test"} <= set(by_patient.values())
    for ref in refs:
        for secret in ("MRN-", "Doe_", "1.2.3.", str(tmp_path)):
            assert secret not in repr(ref)


def test_the_cluster_lists_what_one_process_lists(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for series in range(3):
        uid, patient = f"1.2.3.{series}", f"MRN-{series}"
        folder = tmp_path / f"scans/{series}"
        write_series(folder, small_volume(9), series_uid=uid, patient_id=patient)
    (tmp_path / "scans/0/damaged.dcm").write_bytes(b"noise")
    config = tiny_config(tmp_path, source={"kind": "lidc", "path": tmp_path / "scans"})
    here = list_cases(config)
    monkeypatch.setattr(sources, "ITEMS_PER_TASK", 5)
    assert list_cases(config) == here
    assert (len(here[0]), len(here[1])) == (3, 1)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "is no folder: give the one that holds the patients"),
        ({}, "holds no CT series: give a folder with CT series"),
        ({"README.md": b"hello"}, "holds no CT series"),
        ({"a/1.dcm": b"noise", "a/2.dcm": b"noise"}, "holds only unusable files"),
    ],
)
def test_a_folder_without_series_is_refused(
    tmp_path: Path, files: dict[str, bytes] | None, reason: str
) -> None:
    scans = tmp_path / "scans"
    if files is not None:
        scans.mkdir()
    for name, data in (files or {}).items():
        (scans / name).parent.mkdir(exist_ok=True)
        (scans / name).write_bytes(data)
    config = tiny_config(tmp_path, source={"kind": "lidc", "path": scans})
    with pytest.raises(InputError, match=reason) as caught:
        list_cases(config)
    assert "\n" not in str(caught.value)
