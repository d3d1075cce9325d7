"""Invented crops in the packing of lidcidri: made-up greys, outlines of LIDC's readers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from imagecodecs import png_encode
from scipy import ndimage

from raysynth.formats.lidc import LidcRecord, nodule_records

SIZE = 128


def a_record(skip: int = 0) -> LidcRecord:
    """A nodule of the database that four readers drew, in a plane that shows them all."""
    found = (
        one for one in nodule_records() if len(one.ratings) == 4 and max(map(len, one.areas)) == 4
    )
    return next(islice(found, skip, None))


def masks_of(record: LidcRecord) -> list[np.ndarray]:
    """What each reader drew in one plane that most of them drew in, around the crop's middle."""
    drawn = [annotation.drawn for annotation in record.annotations[:4]]
    planes = {k for corner, mask in drawn for k in range(corner[0], corner[0] + len(mask))}

    def areas(plane: int) -> list[int]:
        return [
            int(mask[plane - corner[0]].sum()) if 0 <= plane - corner[0] < len(mask) else 0
            for corner, mask in drawn
        ]

    plane = max(planes, key=lambda k: (np.count_nonzero(areas(k)), sum(areas(k))))
    shift = SIZE // 2 - np.round(record.centre_zyx[1:]).astype(int)
    masks = np.zeros((len(drawn), SIZE, SIZE), np.uint8)
    for own, (corner, mask) in zip(masks, drawn, strict=True):
        if 0 <= plane - corner[0] < len(mask):
            y, x = np.add(corner[1:], shift)
            own[y : y + mask.shape[1], x : x + mask.shape[2]] = mask[plane - corner[0]]
    return list(masks)


def write_crop(folder: Path, record: LidcRecord, *, slice_number: int = 3) -> Path:
    """Writes image and masks of one crop, and returns the image's path."""
    masks = masks_of(record)
    rng = np.random.default_rng(record.number)
    grey = 30 + 6 * ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 1)
    grey[:, 100:] = 140  # chest wall
    grey[masks[0] > 0] = 130
    grey[0, 0], grey[0, -1] = 0, 255
    top = folder / record.patient_id / f"nodule-{record.number}"
    for name, image in {
        "images": grey,
        **{f"mask-{k}": m * 255 for k, m in enumerate(masks)},
    }.items():
        path = top / name / f"slice-{slice_number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_encode(np.clip(image, 0, 255).astype(np.uint8)))
    return top / "images" / f"slice-{slice_number}.png"
