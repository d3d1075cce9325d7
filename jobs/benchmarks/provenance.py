"""Is every exported file marked, and every altered one found (S8)?

python -m jobs.benchmarks.provenance [--files 200] [--altered 100]

Writes small volumes of noise in every format until there are so many files, and verifies them. Then
so many of them are altered, one at a time: a voxel, the geometry or the passport changed, the mark
or the passport taken away. Prints a table and a line of JSON; exits 1 unless all files were valid,
and all altered ones, and no others, found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import zarr
from PIL import Image

from jobs.benchmarks.ratios import facts_of_run
from raysynth.export.dicom import PASSPORT_TAG, dicom_files
from raysynth.export.nifti import nifti_files, nifti_passport, write_nifti
from raysynth.export.nnunet import nnunet_files
from raysynth.export.passport import Passport, packed
from raysynth.export.plain_zarr import zarr_files
from raysynth.export.png import png_bytes, png_files, png_passport
from raysynth.export.verify import Checked, verify
from raysynth.export.writing import ExportedSample, Format, RunFacts

SHAPE, SPACING_MM = (4, 5, 6), (2.0, 1.5)

FORMATS: dict[str, Format] = {
    "nifti": nifti_files,
    "dicom": dicom_files,
    "nnunet": nnunet_files,
    "png": png_files,
    "zarr": zarr_files,
}

FOLDER = "Dataset501_Noise"
"""As nnU-Net wants it called."""

Alter = Callable[[Path], None]


def write_run(folder: Path, open_format: Format, count: int) -> None:
    """A run of so many small volumes of noise, in a new folder."""
    random = np.random.default_rng(0)
    folder.mkdir()
    facts = RunFacts("run", count, SHAPE, SPACING_MM, "hu", {"recipe": "tiny", "seed": 0})
    with open_format(folder, facts) as write:
        for number in range(count):
            hu = random.integers(-1000, 400, SHAPE).astype(np.int16)
            layout = random.integers(0, 6, SHAPE).astype(np.uint8)
            passport = {
                "run": "run",
                "row": number,
                "bundle": "b" * 64,
                "seed": number,
                "contains_real_pixels": number == 1,
                "passport": {"software": "raysynth 0"},
            }
            write(ExportedSample(f"run-{number:04d}", number, hu, layout, number == 1, passport))


def files_of(folder: Path) -> list[Path]:
    """The files of an export that hold voxels; of Zarr, the arrays."""
    if (folder / "samples.zarr").exists():
        found = (one.parent for one in folder.rglob("zarr.json"))
        return sorted(one for one in found if one.name in ("hu", "layout"))
    return sorted(one for one in folder.rglob("*") if one.suffix in (".gz", ".dcm", ".png"))


def _nifti(**changes: Any) -> Alter:
    def alter(path: Path) -> None:
        passport, values, _ = nifti_passport(path)
        assert passport is not None
        values = values.copy()
        values.flat[7] ^= changes.get("voxel", 0)
        spacing_mm = changes.get("spacing_mm", SPACING_MM)
        own = changes.get("passport", lambda one: one)(passport)
        write_nifti(path, values, spacing_mm, is_mixed=False, passport=own)

    return alter


def _nifti_unmarked(path: Path) -> None:
    image: Any = nibabel.load(path)
    image.header["descrip"] = b"a patient"
    nibabel.save(image, path)


def _nifti_without_passport(path: Path) -> None:
    image: Any = nibabel.load(path)
    image.header.extensions.clear()
    nibabel.save(image, path)


def _dicom(change: Callable[[pydicom.Dataset], None]) -> Alter:
    def alter(path: Path) -> None:
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path)

    return alter


def _flip_pixel(dataset: pydicom.Dataset) -> None:
    pixels = bytearray(dataset.PixelData)
    pixels[0] ^= 1
    dataset.PixelData = bytes(pixels)


def _change_seed(dataset: pydicom.Dataset) -> None:
    passport = json.loads(dataset[PASSPORT_TAG].value)
    dataset[PASSPORT_TAG].value = packed(_another_seed(passport)).decode()


def _png(voxel: int, change: Callable[[Passport], Passport]) -> Alter:
    def alter(path: Path) -> None:
        passport, values = png_passport(path)
        assert passport is not None
        path.write_bytes(png_bytes(values ^ np.uint8(voxel), change(passport)))

    return alter


def _png_saved_again(path: Path) -> None:
    Image.open(path).save(path)


def _zarr_voxel(path: Path) -> None:
    array = zarr.open_array(path, mode="r+")
    array[0, 0, 0] = np.asarray(array[0, 0, 0]) ^ 1


def _zarr_seed(path: Path) -> None:
    zarr.open_array(path, mode="r+").attrs["seed"] = 10**6


def _zarr_unmarked(path: Path) -> None:
    del zarr.open_array(path, mode="r+").attrs["seal"]


def _same(passport: Passport) -> Passport:
    return passport


def _another_seed(passport: Passport) -> Passport:
    return passport | {"seed": 10**6}


NIFTI_ALTERATIONS: dict[str, Alter] = {
    "voxel": _nifti(voxel=1),
    "geometry": _nifti(spacing_mm=(2.0, 1.6)),
    "passport": _nifti(passport=_another_seed),
    "mark gone": _nifti_unmarked,
    "passport gone": _nifti_without_passport,
}

ALTERATIONS: dict[str, dict[str, Alter]] = {
    "nifti": NIFTI_ALTERATIONS,
    "nnunet": NIFTI_ALTERATIONS,
    "dicom": {
        "voxel": _dicom(_flip_pixel),
        "header": _dicom(lambda dataset: setattr(dataset, "PatientName", "Somebody^Real")),
        "passport": _dicom(_change_seed),
        "mark gone": _dicom(lambda dataset: delattr(dataset, "SyntheticData")),
        "passport gone": _dicom(lambda dataset: dataset.remove_private_tags()),
    },
    "png": {
        "voxel": _png(1, _same),
        "passport": _png(0, _another_seed),
        "passport gone": _png_saved_again,
    },
    "zarr": {"voxel": _zarr_voxel, "passport": _zarr_seed, "mark gone": _zarr_unmarked},
}
"""Of a file, by format."""


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--altered", type=int, default=100)
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, int]] = {}
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = judge(name, Path(folder) / FOLDER, options.files, options.altered)
    print(f"{'format':8}{'files':>7}{'valid':>7}{'altered':>9}{'found':>7}{'wrong':>7}")
    for name, row in rows.items():
        print(
            f"{name:8}{row['files']:7}{row['valid']:7}{row['altered']:9}{row['found']:7}"
            f"{row['wrong']:7}"
        )
    print(json.dumps(facts_of_run("nibabel", "pydicom", "zarr") | {"formats": rows}))
    missed = any(
        row["valid"] < row["files"] or row["found"] < row["altered"] or row["wrong"]
        for row in rows.values()
    )
    return int(missed)


def judge(name: str, folder: Path, num_files: int, num_altered: int) -> dict[str, int]:
    """How many files of a format are valid, and how many altered ones are found.

    Args:
        name: of the format.
        folder: a new one.
        num_files: at least so many are written.
        num_altered: of them are altered.
    """
    # DICOM has a file for every plane and one of labels; all others two for a sample.
    each = SHAPE[0] + 1 if name == "dicom" else 2
    write_run(folder, FORMATS[name], -(-num_files // each))
    files = files_of(folder)
    valid = sum(one.verdict == "valid" for one in _checked(files))
    altered = files[:: max(1, len(files) // num_altered)][:num_altered]
    for path, alter in zip(altered, itertools.cycle(ALTERATIONS[name].values()), strict=False):
        alter(path)
    after = _checked(files)
    told = {one.path for one in after if one.verdict != "valid"}
    return {
        "files": len(files),
        "valid": valid,
        "altered": len(altered),
        "found": sum(str(path) in told for path in altered),
        "wrong": len(told - {str(path) for path in altered}),
    }


def _checked(files: list[Path]) -> list[Checked]:
    return [verify(path)[0] for path in files]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
