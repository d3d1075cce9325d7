"""Malformed, hostile and randomly damaged image files: each is refused by name, or read."""

from __future__ import annotations

import gzip
import os
import resource
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raysynth.errors import UnreadableCase
from raysynth.formats.image import read_image
from tests.formats.image_files import (
    PRIVATE,
    bomb,
    metaimage,
    nifti,
    nrrd,
    run_mutants,
    small_values,
)

RAW = small_values().tobytes()
NAN = np.nan
SIGNALLING_NAN = bytes.fromhex("0100807f")  # one that warns when it is converted


def with_nan() -> NDArray[Any]:
    values = small_values("<f4")
    values[2, 1, 3] = NAN
    return values


def sheared(amount: float) -> dict[str, list[float]]:
    return {"srow_x": [-0.8, amount, 0, 140], "srow_y": [0, -0.7, 0, 120]}


def by_qform(**fields: object) -> bytes:
    return nifti(sform_code=0, qform_code=1, **fields)


def dims(*sizes: int) -> list[int]:
    return [*sizes, *[1] * (8 - len(sizes))]


BAD_FILES: list[tuple[str, str, bytes]] = [
    # rule, name of the file, its bytes
    ("suffix", "a.hdr", nifti()),
    ("not-nifti", "a.nii", b""),
    ("not-nifti", "a.nii", b"<html>404</html>" * 50),
    ("not-nifti", "a.nii", nifti()[:200]),
    ("not-nifti", "a.nii", nifti(magic=b"ni1")),
    ("not-nifti", "a.nii", nifti(magic=b"n+3")),
    ("not-nifti", "a.nii", nifti(sizeof_hdr=349)),
    ("not-nifti", "a.nii", nifti(version=2, eol_check=[10, 13, 10, 10])),
    ("not-nifti", "a.nii.gz", gzip.compress(b"nothing")),
    ("not-nifti", "a.nii.gz", gzip.compress(b"")),
    ("not-nifti", "a.nii.gz", b"PK\3\4" + bytes(400)),
    ("pixel-data", "a.nii", nifti()[:-1]),
    ("pixel-data", "a.nii", nifti()[:352]),
    ("pixel-data", "a.nii", nifti()[:350]),
    ("pixel-data", "a.nii", nifti() + b"\0"),
    ("pixel-data", "a.nii.gz", gzip.compress(nifti())[:-4]),
    ("pixel-data", "a.nii.gz", gzip.compress(nifti())[:80]),
    ("pixel-data", "a.nii.gz", gzip.compress(nifti()) + b"more"),
    ("pixel-data", "a.nii.gz", gzip.compress(nifti()) + gzip.compress(b"more")),
    ("pixel-data", "a.nii.gz", gzip.compress(nifti())[:-8] + bytes(8)),
    ("pixel-data", "a.nii.gz", b"\x1f\x8b" + bytes(400)),
    ("pixel-data", "a.nii.gz", bomb("gzip", nifti())),
    ("pixel-data", "a.nii.gz", gzip.compress(nifti(dim=dims(3, 512, 512, 4000)))),
    ("bad-field", "a.nii", nifti(srow_x=[NAN, 0, 0, 0])),
    ("bad-field", "a.nii", nifti(srow_y=[0, -0.7, 0, np.inf])),
    ("bad-field", "a.nii", nifti().replace(np.float32(-0.8).tobytes(), SIGNALLING_NAN)),
    ("bad-field", "a.nii", nifti(vox_offset=0)),
    ("bad-field", "a.nii", nifti(vox_offset=NAN)),
    ("bad-field", "a.nii", nifti(vox_offset=1e30)),
    ("bad-field", "a.nii", nifti(vox_offset=-352)),
    ("spacing", "a.nii", nifti(srow_z=[0, 0, 0, 0])),
    ("spacing", "a.nii", nifti(srow_x=[1e38, 0, 0, 0])),
    ("spacing", "a.nii", nifti(srow_x=[-800, 0, 0, 0])),
    ("origin", "a.nii", nifti(srow_x=[-0.8, 0, 0, 1e9])),
    ("shear", "a.nii", nifti(**sheared(0.1))),
    ("shear", "a.nii", nifti(srow_x=[-0.8, -0.8, 0, 0], srow_y=[0.8, 0.8, 0, 0])),  # singular
    ("mixed-spacing", "a.nii", nifti(pixdim=[1] * 8)),
    ("orientation", "a.nii", nifti(sform_code=0)),
    ("orientation", "a.nii", nifti(sform_code=-1)),
    ("orientation", "a.nii", by_qform(quatern_b=0.9, quatern_c=0.9)),
    ("orientation", "a.nii", by_qform(pixdim=[1, 0.8, -0.7, 2.5, 0, 0, 0, 0])),
    ("bad-field", "a.nii", by_qform(quatern_b=NAN)),
    ("bad-field", "a.nii", by_qform(qoffset_x=NAN)),
    ("spacing", "a.nii", by_qform(pixdim=[1, 0.8, 0, 2.5, 0, 0, 0, 0])),
    ("units", "a.nii", nifti(xyzt_units=1)),
    ("units", "a.nii", nifti(xyzt_units=3)),
    ("shape", "a.nii", nifti(dim=dims(2, 5, 12))),
    ("shape", "a.nii", nifti(dim=dims(4, 5, 3, 2, 2))),
    ("shape", "a.nii", nifti(dim=dims(5, 5, 3, 4, 1, 1))),
    ("shape", "a.nii", nifti(dim=dims(-3, 5, 3, 4))),
    ("size", "a.nii", nifti(dim=dims(3, 0, 3, 4))),
    ("size", "a.nii", nifti(dim=dims(3, -5, 3, 4))),
    ("size", "a.nii", nifti(dim=dims(3, 32767, 32767, 1024))),
    ("size", "a.nii", nifti(dim=dims(3, 4096, 4096, 4096))),
    ("size", "a.nii", nifti(version=2, dim=dims(3, 1 << 40, 1, 1))),
    ("size", "a.nii", nifti(version=2, dim=dims(3, 1 << 21, 1 << 21, 1 << 21))),
    ("bad-field", "a.nii", nifti()[:40] + nifti(small_values(">i2"))[40:]),  # two byte orders
    ("pixel-format", "a.nii", nifti(datatype=128)),  # colour
    ("pixel-format", "a.nii", nifti(datatype=32)),  # complex
    ("pixel-format", "a.nii", nifti(datatype=1)),  # bits
    ("pixel-format", "a.nii", nifti(datatype=1536)),  # 128 bits
    ("pixel-format", "a.nii", nifti(datatype=-7)),
    ("rescale", "a.nii", nifti(scl_slope=np.inf)),
    ("rescale", "a.nii", nifti(scl_slope=2, scl_inter=NAN)),
    ("not-finite", "a.nii", nifti(with_nan())),
    ("not-finite", "a.nii", nifti(scl_slope=3e38)),
    ("not-nrrd", "a.nrrd", b""),
    ("not-nrrd", "a.nrrd", nrrd().replace(b"NRRD0004", b"NRRD0009")),
    ("not-nrrd", "a.nrrd", nrrd().replace(b"NRRD0004", b"NRRD00041")),
    ("not-nrrd", "a.nrrd", nrrd().replace(b"encoding: raw", b"encoding raw")),
    ("missing-field", "a.nrrd", nrrd()[:50]),
    ("bad-field", "a.nrrd", nrrd().replace(b"endian", b"type: int\nendian")),
    ("header-size", "a.nrrd", nrrd().replace(b"endian", b"x: " + b"1 " * (1 << 20) + b"\nendian")),
    ("header-size", "a.nrrd", nrrd().replace(b"endian", b"k:=v\n" * (1 << 18) + b"endian")),
    ("missing-field", "a.nrrd", nrrd(type=None)),
    ("missing-field", "a.nrrd", nrrd(sizes=None)),
    ("missing-field", "a.nrrd", nrrd(encoding=None)),
    ("missing-field", "a.nrrd", nrrd(endian=None)),
    ("missing-field", "a.nrrd", nrrd(space=None)),
    ("missing-field", "a.nrrd", nrrd(space_directions=None)),
    ("missing-field", "a.nrrd", nrrd(space=None, space_directions=None)),
    ("space", "a.nrrd", nrrd(space="scanner-xyz")),
    ("units", "a.nrrd", nrrd(space_units='"um" "um" "um"')),
    ("shape", "a.nrrd", nrrd(dimension="4")),
    ("shape", "a.nrrd", nrrd(kinds="RGB-color domain domain")),
    ("bad-field", "a.nrrd", nrrd(sizes="5 3")),
    ("bad-field", "a.nrrd", nrrd(sizes="5 3 4.5")),
    ("bad-field", "a.nrrd", nrrd(sizes=f"5 3 {PRIVATE}")),
    ("bad-field", "a.nrrd", nrrd(sizes="nan nan nan")),
    ("bad-field", "a.nrrd", nrrd(sizes="9" * 5000 + " 1 1")),
    ("bad-field", "a.nrrd", nrrd(endian="middle")),
    ("size", "a.nrrd", nrrd(sizes="5 0 4")),
    ("size", "a.nrrd", nrrd(sizes="-5 -3 4")),
    ("size", "a.nrrd", nrrd(sizes=f"{1 << 40} 1 1")),
    ("size", "a.nrrd", nrrd(sizes="2048 2048 2048")),
    ("pixel-format", "a.nrrd", nrrd(type="block")),
    ("pixel-format", "a.nrrd", nrrd(type=PRIVATE)),
    ("encoding", "a.nrrd", nrrd(encoding="bzip2")),
    ("encoding", "a.nrrd", nrrd(encoding="ascii")),
    ("bad-field", "a.nrrd", nrrd(space_directions="(0.8,0,0) (0,nan,0) (0,0,2.5)")),
    ("bad-field", "a.nrrd", nrrd(space_directions="none (0,0.7,0) (0,0,2.5)")),
    ("bad-field", "a.nrrd", nrrd(space_directions="(((((" * 1000)),
    ("bad-field", "a.nrrd", nrrd(space_origin="(1,2)")),
    ("spacing", "a.nrrd", nrrd(space_directions="(0,0,0) (0,0.7,0) (0,0,2.5)")),
    ("spacing", "a.nrrd", nrrd(space=None, space_directions=None, spacings="0.8 -0.7 2.5")),
    ("shear", "a.nrrd", nrrd(space_directions="(0.8,0,0) (0.1,0.7,0) (0,0,2.5)")),
    ("bad-field", "a.nrrd", nrrd(byte_skip="-2")),
    ("bad-field", "a.nrrd", nrrd(line_skip="3")),
    ("pixel-data", "a.nrrd", nrrd(byte_skip="100000")),
    ("pixel-data", "a.nrrd", nrrd()[:-1]),
    ("pixel-data", "a.nrrd", nrrd() + b"\0"),
    ("pixel-data", "a.nrrd", nrrd(encoding="gzip")),
    ("pixel-data", "a.nrrd", nrrd(bomb("gzip"), encoding="gzip")),
    ("pixel-data", "a.nrrd", nrrd(gzip.compress(RAW[:-2]), encoding="gzip")),
    ("not-finite", "a.nrrd", nrrd(with_nan().tobytes(), type="float")),
    ("data-file", "a.nhdr", nrrd()),
    ("data-file", "a.nhdr", nrrd(b"", data_file="/etc/hostname")),
    ("data-file", "a.nhdr", nrrd(b"", data_file="../a.raw")),
    ("data-file", "a.nhdr", nrrd(b"", data_file="..")),
    ("data-file", "a.nhdr", nrrd(b"", data_file="sub\\a.raw")),
    ("data-file", "a.nhdr", nrrd(b"", data_file="a.raw\0b")),
    ("data-file", "a.nhdr", nrrd(b"", data_file="a" * 5000)),
    ("data-file", "a.nhdr", nrrd(b"", data_file="gone.raw")),
    ("data-file", "a.nhdr", nrrd(b"", data_file="")),
    ("data-file", "a.nhdr", nrrd(b"", data_file="LIST") + b"one.raw\ntwo.raw\n"),
    ("data-file", "a.nhdr", nrrd(b"", data_file="a%03d.raw 1 10 1")),
    ("not-metaimage", "a.mha", b""),
    ("not-metaimage", "a.mha", b"<html>404</html>" * 50),
    ("not-metaimage", "a.mha", metaimage(ElementDataFile=None)),
    ("not-metaimage", "a.mha", metaimage()[:100]),
    ("not-metaimage", "a.mha", metaimage(ObjectType="Tube")),
    ("header-size", "a.mha", b"Comment = " + b"x" * (2 << 20)),
    ("header-size", "a.mha", b"\n" * (2 << 20)),
    ("bad-field", "a.mha", b"NDims = 3\n" + metaimage()),
    ("missing-field", "a.mha", metaimage(NDims=None)),
    ("missing-field", "a.mha", metaimage(DimSize=None)),
    ("missing-field", "a.mha", metaimage(ElementType=None)),
    ("missing-field", "a.mha", metaimage(ElementSpacing=None)),
    ("shape", "a.mha", metaimage(NDims="2")),
    ("bad-field", "a.mha", metaimage(NDims="three")),
    ("bad-field", "a.mha", metaimage(DimSize="5 3")),
    ("bad-field", "a.mha", metaimage(CompressedData="maybe")),
    ("bad-field", "a.mha", metaimage(ElementByteOrderMSB="True")),
    ("bad-field", "a.mha", metaimage(Offset=f"0 0 {PRIVATE}")),
    ("bad-field", "a.mha", metaimage(Offset="0 0 nan")),
    ("bad-field", "a.mha", metaimage(Position="0 0 0")),
    ("bad-field", "a.mha", metaimage(HeaderSize="10")),
    ("size", "a.mha", metaimage(DimSize="5 3 0")),
    ("size", "a.mha", metaimage(DimSize="5 -3 -4")),
    ("size", "a.mha", metaimage(DimSize=f"1 1 {1 << 40}")),
    ("pixel-format", "a.mha", metaimage(ElementType="MET_STRING")),
    ("pixel-format", "a.mha", metaimage(ElementType="MET_SHORT_ARRAY")),
    ("pixel-format", "a.mha", metaimage(ElementNumberOfChannels="3")),
    ("encoding", "a.mha", metaimage(BinaryData="False")),
    ("rescale", "a.mha", metaimage(ElementToIntensityFunctionSlope="2")),
    ("units", "a.mha", metaimage(DistanceUnits="um")),
    ("spacing", "a.mha", metaimage(ElementSpacing="0.8 0 2.5")),
    ("spacing", "a.mha", metaimage(ElementSpacing="0.8 -0.7 2.5")),
    ("spacing", "a.mha", metaimage(ElementSpacing="0.8 0.7 2500")),
    ("bad-field", "a.mha", metaimage(ElementSpacing="0.8 0.7 1e308")),
    ("orientation", "a.mha", metaimage(TransformMatrix="2 0 0 0 1 0 0 0 1")),
    ("orientation", "a.mha", metaimage(TransformMatrix="0 0 0 0 1 0 0 0 1")),
    ("shear", "a.mha", metaimage(TransformMatrix="1 0 0 1 0 0 0 0 1")),
    ("shear", "a.mha", metaimage(TransformMatrix="1 0 0 0.6 0.8 0 0 0 1")),
    ("bad-field", "a.mha", metaimage(TransformMatrix="1 0 0 1")),
    ("pixel-data", "a.mha", metaimage()[:-1]),
    ("pixel-data", "a.mha", metaimage() + b"\0"),
    ("pixel-data", "a.mha", metaimage(CompressedData="True")),
    ("pixel-data", "a.mha", metaimage(zlib.compress(RAW)[:-1], CompressedData="True")),
    ("pixel-data", "a.mha", metaimage(zlib.compress(RAW * 2), CompressedData="True")),
    ("pixel-data", "a.mha", metaimage(bomb("zlib"), CompressedData="True")),
    ("not-finite", "a.mha", metaimage(with_nan().tobytes(), ElementType="MET_FLOAT")),
    ("data-file", "a.mhd", metaimage(ElementDataFile="/etc/hostname")),
    ("data-file", "a.mhd", metaimage(ElementDataFile="../a.raw")),
    ("data-file", "a.mhd", metaimage(ElementDataFile="sub/a.raw")),
    ("data-file", "a.mhd", metaimage(ElementDataFile="gone.raw")),
    ("data-file", "a.mhd", metaimage(ElementDataFile="LIST")),
    ("data-file", "a.mhd", metaimage(ElementDataFile="a%02d.raw 1 4 1")),
    ("data-file", "a.mhd", metaimage(ElementDataFile="")),
    ("pixel-data", "a.mhd", metaimage(ElementDataFile="a.mhd")),
]


@pytest.mark.parametrize(
    ("rule", "name", "raw"),
    [
        pytest.param(*case, id=f"{number}-{case[0]}-{case[1]}")
        for number, case in enumerate(BAD_FILES)
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, rule: str, name: str, raw: bytes) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "a.raw").write_bytes(RAW)
    (folder / name).write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(UnreadableCase) as refusal:
        read_image(folder / name)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refusal.value.rule == rule
    told = refusal.value.reason
    assert not [text for text in (PRIVATE, "Jane", str(tmp_path), "a.raw") if text in told]
    assert "\n" not in told
    assert len(told) < 250
    # A header of a mebibyte is taken apart, but nothing of what it promises is allocated.
    assert peak_bytes < 8 << 20


def link_outside(folder: Path) -> None:
    (folder.parent / "b.raw").write_bytes(RAW)
    (folder / "a.raw").symlink_to(folder.parent / "b.raw")


def link_inside(folder: Path) -> None:
    (folder / "b.raw").write_bytes(RAW)
    (folder / "a.raw").symlink_to("b.raw")


@pytest.mark.parametrize(
    ("rule", "place"),
    [
        ("data-file", link_outside),
        ("data-file", link_inside),
        ("data-file", lambda folder: (folder / "a.raw").symlink_to("a.raw")),
        ("unreadable", lambda folder: os.mkfifo(folder / "a.raw")),
        ("unreadable", lambda folder: (folder / "a.raw").mkdir()),
        ("pixel-data", lambda folder: (folder / "a.raw").write_bytes(RAW[:-1])),
        ("pixel-data", lambda folder: (folder / "a.raw").write_bytes(RAW + b"\0")),
        ("size", lambda folder: _sparse(folder / "a.raw", 1 << 40)),
    ],
)
@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_data_files_that_are_no_plain_file(
    tmp_path: Path, name: str, rule: str, place: Callable[[Path], object]
) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    place(folder)
    header = metaimage(ElementDataFile="a.raw") if name == "a.mhd" else nrrd(b"", data_file="a.raw")
    (folder / name).write_bytes(header)
    with pytest.raises(UnreadableCase) as refusal:
        read_image(folder / name)
    assert refusal.value.rule == rule
    assert "a.raw" not in refusal.value.reason


def _sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii").mkdir()
    os.mkfifo(tmp_path / "b.nii.gz")
    for name in ("a.nii", "b.nii.gz", "gone.nrrd"):
        with pytest.raises(UnreadableCase) as refusal:
            read_image(tmp_path / name)
        assert refusal.value.rule == "unreadable"


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutants_are_read_or_refused(tmp_path: Path, count: int) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, slowest_s = run_mutants(tmp_path, count, seed=count)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert sum(outcomes.values()) >= count
    assert outcomes["read"] > count // 20
    assert len(outcomes) > 15
    assert slowest_s < 5
    assert grown_kib < 128 << 10
