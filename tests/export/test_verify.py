"""Exported files say what they are, and whether they were altered."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zarr
from PIL import Image

from raysynth.cli import main
from raysynth.errors import InputError
from raysynth.export.nifti import nifti_files, nifti_passport, write_nifti
from raysynth.export.passport import Passport, flaw, packed, sealed, unpacked
from raysynth.export.plain_zarr import zarr_files
from raysynth.export.png import png_bytes, png_files, png_passport
from raysynth.export.verify import verify
from raysynth.export.writing import ExportedSample, Format, RunFacts

COUNT = 3
FORMATS: dict[str, Format] = {"nifti": nifti_files, "png": png_files, "zarr": zarr_files}


@pytest.fixture(params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_run(tmp_path / "out", FORMATS[request.param])
    return tmp_path / "out"


def write_run(folder: Path, open_format: Format) -> None:
    """A run of small volumes."""
    random = np.random.default_rng(0)
    folder.mkdir()
    facts = RunFacts("run", COUNT, (4, 5, 6), (2.0, 1.5), "hu", {"recipe": "tiny", "seed": 0})
    with open_format(folder, facts) as write:
        for number in range(COUNT):
            hu = random.integers(-1000, 400, facts.shape).astype(np.int16)
            layout = random.integers(0, 6, facts.shape).astype(np.uint8)
            passport = {"run": "run", "row": number, "bundle": "b" * 64, "seed": number}
            write(ExportedSample(f"run-{number}", number, hu, layout, number == 1, passport))


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


def voxel_changed(path: Path) -> None:
    passport, values, _ = nifti_passport(path)
    values = values.copy()
    values[1, 2, 3] += 1
    assert passport is not None
    write_nifti(path, values, (2.0, 1.5), is_mixed=False, passport=passport)


def seed_changed(path: Path) -> None:
    passport, values, _ = nifti_passport(path)
    assert passport is not None
    write_nifti(path, values, (2.0, 1.5), is_mixed=False, passport=passport | {"seed": 99})


def spacing_changed(path: Path) -> None:
    passport, values, _ = nifti_passport(path)
    assert passport is not None
    write_nifti(path, values, (2.0, 1.6), is_mixed=False, passport=passport)


def mark_removed(path: Path) -> None:
    image = nibabel.load(path)
    image.header["descrip"] = b"a patient"
    nibabel.save(image, path)


def passport_removed(path: Path) -> None:
    image = nibabel.load(path)
    image.header.extensions.clear()
    nibabel.save(image, path)


def passport_of_another(path: Path) -> None:
    passport, *_ = nifti_passport(path.with_name("run-2.nii.gz"))
    _, values, _ = nifti_passport(path)
    assert passport is not None
    write_nifti(path, values, (2.0, 1.5), is_mixed=False, passport=passport)


def labels_for_image(path: Path) -> None:
    path.write_bytes(path.with_name("run-0_labels.nii.gz").read_bytes()[:-20])


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        (voxel_changed, "altered", "its voxels"),
        (seed_changed, "altered", "its passport"),
        (spacing_changed, "altered", "its geometry"),
        (mark_removed, "unmarked", "no mark"),
        (passport_removed, "unmarked", "no mark"),
        (passport_of_another, "altered", "its voxels"),
        (labels_for_image, "altered", "cannot be read"),
    ],
)
def test_what_was_altered_is_named(
    change: Callable[[Path], None], verdict: str, reason: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "out", nifti_files)
    path = tmp_path / "out" / "run-0.nii.gz"
    change(path)
    (found,) = verify(path)
    assert found.verdict == verdict
    assert reason in found.reason


def test_pictures_that_were_saved_again_are_unmarked(tmp_path: Path) -> None:
    write_run(tmp_path / "out", png_files)
    path = tmp_path / "out" / "run-0.png"
    Image.open(path).save(path)
    (found,) = verify(path)
    assert found.verdict == "unmarked"
    passport, values = png_passport(tmp_path / "out" / "run-1.png")
    assert passport is not None
    path.write_bytes(png_bytes(values ^ 1, passport))
    assert verify(path)[0].reason == "its voxels"


def test_arrays_are_judged_one_by_one(tmp_path: Path) -> None:
    write_run(tmp_path / "out", zarr_files)
    root = zarr.open_group(tmp_path / "out" / "samples.zarr", mode="a")
    root["run-1/hu"][0, 0, 0] += 1
    root["run-2"].attrs["seed"] = 7
    del root["run-0/layout"].attrs["seal"]
    found = {one.path.rpartition(".zarr/")[2]: one for one in verify(tmp_path) if one.reason}
    assert {name: one.verdict for name, one in found.items()} == {
        "run-1/hu": "altered",
        "run-2": "altered",
        "run-0/layout": "unmarked",
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
    write_run(tmp_path / "out", nifti_files)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "valid    10 of 10" in capsys.readouterr().out
    (tmp_path / "out" / "other.dcm").write_bytes(b"a patient")
    seed_changed(tmp_path / "out" / "run-0.nii.gz")
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert {Path(one["path"]).name: one["verdict"] for one in told["flawed"]} == {
        "other.dcm": "unmarked",
        "run-0.nii.gz": "altered",
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
