"""Exported files say what they are, and whether they were altered."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from jobs.benchmarks.provenance import (
    ALTERATIONS,
    FOLDER,
    FORMATS,
    SPACING_MM,
    files_of,
    judge,
    write_run,
)
from raysynth.cli import main
from raysynth.errors import InputError
from raysynth.export.nifti import nifti_files, nifti_passport, write_nifti
from raysynth.export.passport import Passport, flaw, packed, sealed, unpacked
from raysynth.export.plain_zarr import zarr_files
from raysynth.export.png import png_bytes, png_files, png_passport
from raysynth.export.verify import verify

COUNT = 3


@pytest.fixture(params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_run(tmp_path / FOLDER, FORMATS[request.param], COUNT)
    return tmp_path / FOLDER


def test_whatever_is_exported_is_valid(folder: Path) -> None:
    found = verify(folder)
    assert len(found) >= 2 * COUNT
    assert {one.verdict for one in found} == {"valid"}


def test_each_altered_file_is_found_and_no_other(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(flipped) // 2] ^= 0x10
        path.write_bytes(flipped)
        found = [one for one in verify(folder) if one.verdict != "valid"]
        assert len(found) == 1, path
        assert found[0].path in str(path)
        path.write_bytes(whole)
    assert {one.verdict for one in verify(folder)} == {"valid"}


CASES = [(name, what) for name, some in ALTERATIONS.items() for what in some]


@pytest.mark.parametrize(("name", "what"), CASES)
def test_what_was_altered_is_named(name: str, what: str, tmp_path: Path) -> None:
    write_run(tmp_path / FOLDER, FORMATS[name], COUNT)
    path = files_of(tmp_path / FOLDER)[0]
    ALTERATIONS[name][what](path)
    (found,) = verify(path)
    assert found.verdict == ("unmarked" if "gone" in what else "altered")
    told = {"voxel": "voxels|passport", "geometry": "geometry", "header": "beside its passport"}
    assert re.search(told.get(what, "passport"), found.reason)


def test_a_passport_of_another_sample_does_not_fit(tmp_path: Path) -> None:
    write_run(tmp_path / FOLDER, nifti_files, COUNT)
    first, second = (tmp_path / FOLDER / f"run-000{n}.nii.gz" for n in (0, 1))
    passport, *_ = nifti_passport(first)
    _, values, _ = nifti_passport(second)
    assert passport is not None
    write_nifti(second, values, SPACING_MM, is_mixed=False, passport=passport)
    assert verify(second)[0].reason == "its voxels"


@pytest.mark.parametrize("name", FORMATS)
def test_a_tenth_of_the_release_count(name: str, tmp_path: Path) -> None:
    row = judge(name, tmp_path / FOLDER, num_files=20, num_altered=10)
    assert (row["valid"], row["found"], row["wrong"]) == (row["files"], row["altered"], 0)


def test_pictures_that_were_saved_again_are_unmarked(tmp_path: Path) -> None:
    write_run(tmp_path / FOLDER, png_files, COUNT)
    path = tmp_path / FOLDER / "run-0000.png"
    Image.open(path).save(path)
    (found,) = verify(path)
    assert found.verdict == "unmarked"
    passport, values = png_passport(tmp_path / FOLDER / "run-0001.png")
    assert passport is not None
    path.write_bytes(png_bytes(values ^ 1, passport))
    assert verify(path)[0].reason == "its voxels"


def test_arrays_are_judged_one_by_one(tmp_path: Path) -> None:
    write_run(tmp_path / FOLDER, zarr_files, COUNT)
    root = zarr.open_group(tmp_path / FOLDER / "samples.zarr", mode="a")
    root["run-0001/hu"][0, 0, 0] += 1
    root["run-0002"].attrs["seed"] = 7
    del root["run-0000/layout"].attrs["seal"]
    found = {one.path.rpartition(".zarr/")[2]: one for one in verify(tmp_path) if one.reason}
    assert {name: one.verdict for name, one in found.items()} == {
        "run-0001/hu": "altered",
        "run-0002": "altered",
        "run-0000/layout": "unmarked",
    }


def test_links_are_not_followed_and_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no files"):
        verify(tmp_path / "empty")
    with pytest.raises(InputError, match="no such file"):
        verify(tmp_path / "nothing")
    os.symlink("/etc/hostname", tmp_path / "empty" / "link.nii.gz")
    assert verify(tmp_path / "empty")[0].verdict == "unmarked"


def test_the_command_tells_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / FOLDER, nifti_files, COUNT)
    assert main(["verify", str(tmp_path / FOLDER)]) == 0
    assert "valid    10 of 10" in capsys.readouterr().out
    (tmp_path / FOLDER / "other.dcm").write_bytes(b"a patient")
    ALTERATIONS["nifti"]["passport"](tmp_path / FOLDER / "run-0000.nii.gz")
    assert main(["verify", str(tmp_path / FOLDER), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert {Path(one["path"]).name: one["verdict"] for one in told["flawed"]} == {
        "other.dcm": "unmarked",
        "run-0000.nii.gz": "altered",
    }
    assert main(["verify", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"\xff", b"[" * 99_999, b"1", b'{"seal": 1}', b'{"seal": NaN}']
)
def test_what_is_no_passport_is_none_or_altered(content: bytes) -> None:
    found = unpacked(content)
    assert found is None or flaw(found) == "its passport"


def test_a_seal_does_not_depend_on_order() -> None:
    own: Passport = sealed({"a": 1, "b": [1.5, None]}, "text")
    turned = json.loads(json.dumps(dict(reversed(own.items()))))
    assert flaw(turned) is None
    assert unpacked(packed(own)) == own
    assert flaw(own, np.zeros(3, np.int16)) == "what it holds"
