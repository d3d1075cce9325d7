"""Crops of LIDC in PNG: known again by what readers drew, and read as strictly as other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from imagecodecs import png_encode

from raysynth.case import Label
from raysynth.errors import UnreadableCase
from raysynth.formats.lidc_slices import find_crops, patient_of, read_crop
from raysynth.volume import RELATIVE_RANGE
from tests.formats.lidc_crops import SIZE, a_record, masks_of, write_crop


def test_a_crop_is_the_nodule_that_its_readers_drew(tmp_path: Path) -> None:
    record = a_record()
    image = write_crop(tmp_path / "deep", record)
    (files,) = find_crops(tmp_path)
    assert files[0] == image
    assert len(files) == 5
    assert patient_of(image) == record.patient_id
    volume, nodule, lung = read_crop(files, 0.5)
    assert volume.shape == (1, SIZE, SIZE)
    assert volume.spacing_mm == record.spacing_mm
    assert (volume.hu.min(), volume.hu.max()) == RELATIVE_RANGE
    assert nodule.ratings == record.ratings
    assert nodule.diameter_mm == record.diameter_mm
    assert lung == (Label.LEFT_LUNG if record.centre_zyx[2] > 255.5 else Label.RIGHT_LUNG)
    agreed = np.sum(masks_of(record), axis=0) >= 2
    (_, _), (y0, y1), (x0, x1) = nodule.box_zyx
    np.testing.assert_array_equal(nodule.mask[0], agreed[y0:y1, x0:x1])
    assert nodule.mask.sum() == agreed.sum()


def test_the_number_of_a_nodule_is_only_a_hint(tmp_path: Path) -> None:
    record = a_record()
    image = write_crop(tmp_path, record)
    image.parents[1].rename(image.parents[2] / "nodule-77")
    (files,) = find_crops(tmp_path)
    assert read_crop(files, 0.5)[1].ratings == record.ratings


def _with_pixels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[bytes], bytes]:
    return lambda _: png_encode(np.ascontiguousarray(change(np.full((SIZE, SIZE), 9, np.uint8))))


def _huge(packed: bytes) -> bytes:
    return packed[:16] + (1 << 30).to_bytes(4, "big") + packed[20:]


BAD: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "no image": ("images", lambda _: b"text", "png"),
    "cut": ("images", lambda packed: packed[: len(packed) // 2], "png"),
    "larger than it may be": ("images", _huge, "png"),
    "colours": ("images", _with_pixels(lambda grey: np.stack([grey] * 3, -1)), "png"),
    "16 bits": ("images", _with_pixels(lambda grey: grey.astype(np.uint16)), "png"),
    "one grey": ("images", _with_pixels(lambda grey: grey), "constant"),
    "resized mask": ("mask-0", _with_pixels(lambda grey: grey[::2, ::2]), "labels-misfit"),
    "another outline": ("mask-0", _with_pixels(lambda grey: grey), "annotations-misfit"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_crop_is_refused(tmp_path: Path, case: str) -> None:
    folder, change, rule = BAD[case]
    path = write_crop(tmp_path, a_record())
    bad = path.parents[1] / folder / path.name
    bad.write_bytes(change(bad.read_bytes()))
    with pytest.raises(UnreadableCase) as refused:
        read_crop(find_crops(tmp_path)[0], 0.5)
    assert refused.value.rule == rule


def test_a_slice_that_nobody_marked_is_refused(tmp_path: Path) -> None:
    path = write_crop(tmp_path, a_record())
    for mask in path.parents[1].glob("mask-*/*.png"):
        mask.write_bytes(png_encode(np.zeros((SIZE, SIZE), np.uint8)))
    with pytest.raises(UnreadableCase, match="all masks are empty"):
        read_crop(find_crops(tmp_path)[0], 0.5)
