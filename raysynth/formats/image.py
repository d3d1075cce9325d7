"""3D images in NIfTI, NRRD and MetaImage: read, and made into volumes and label maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Intensity
from raysynth.errors import UnreadableCase
from raysynth.formats.dicom_file import require
from raysynth.formats.dicom_slice import PADDING_HU
from raysynth.formats.image_file import Image as Image
from raysynth.formats.metaimage import read_metaimage
from raysynth.formats.nifti import read_nifti
from raysynth.formats.nrrd import read_nrrd
from raysynth.volume import AIR_HU, RELATIVE_RANGE, Volume

MAX_LABEL = 65535

_READERS: dict[str, Callable[[Path], Image]] = {
    ".nii": read_nifti,
    ".nii.gz": read_nifti,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
}

IMAGE_SUFFIXES = tuple(_READERS)

_FAT_HU, _WATER_HU = -150, 0

_TOLERANCE_VOXELS = 0.1


def read_image(path: Path) -> Image:
    """Reads a 3D image by the suffix of its name, exactly as it is stored.

    Raises:
        UnreadableCase: the file breaks a rule.
    """
    name = path.name.lower()
    reader = next((read for suffix, read in _READERS.items() if name.endswith(suffix)), None)
    if reader is None:
        raise UnreadableCase("suffix", f"the name ends with none of {', '.join(IMAGE_SUFFIXES)}")
    try:
        image = reader(path)
    except OSError as error:
        raise UnreadableCase("unreadable", f"a file cannot be read: {error.strerror}") from None
    if image.values.dtype.kind == "f":
        finite = all(np.isfinite(plane).all() for plane in image.values)
        require(finite, "not-finite", "some values are NaN or infinite: replace them first")
    return image


def volume_of(image: Image, intensity: Intensity) -> Volume:
    """An image as a volume whose axes run along z, y and x.

    `hu`: values are Hounsfield units and are rounded; those at or below `PADDING_HU` were never
    measured and become `AIR_HU`, as in DICOM. What cannot be CT is refused: every CT holds fat,
    lung or air (below `_FAT_HU`) and something as dense as water. So images scaled to 0..1, to
    0..255 or by mean and deviation do not pass, nor does CT whose intercept was not applied.

    `relative`: grey values of unknown unit. The image's lowest and highest value become
    the ends of `RELATIVE_RANGE`, the rest lies linearly between, rounded.

    Raises:
        UnreadableCase: the values cannot be Hounsfield units, or the image is not axial.
    """
    image = _axial(image)
    lowest, highest = float(image.values.min()), float(image.values.max())
    hu = np.empty(image.values.shape, np.int16)
    if intensity == "relative":
        low, high = RELATIVE_RANGE
        # Halves, because the span itself may be more than a float can hold.
        span = highest / 2 - lowest / 2
        require(span > 0, "constant", f"all voxels are {lowest:g}")
        for plane, values in zip(hu, image.values, strict=True):
            share = (values.astype(np.float64) / 2 - lowest / 2) / span
            plane[...] = np.rint(low + share * (high - low))
    else:
        limits = np.iinfo(np.int16)
        require(
            limits.min <= lowest and highest <= limits.max,
            "hu-range",
            f"values from {lowest:g} to {highest:g}: no Hounsfield units",
        )
        for plane, values in zip(hu, image.values, strict=True):
            plane[...] = np.rint(values)
        measured = hu > PADDING_HU
        _check_hu(hu, measured)
        hu[~measured] = AIR_HU
    return Volume(hu, image.spacing_mm, image.origin_mm, image.direction)


def labels_of(image: Image, grid: Volume) -> NDArray[np.integer]:
    """A label map as an array on the grid of a volume of the same patient.

    Args:
        image: whole numbers of 0 to `MAX_LABEL` on the volume's grid, of any type.
        grid: the volume; the corners of both must meet within a tenth of a voxel.

    Returns:
        Labels, shape (z, y, x), uint8; uint16 if one is above 255.

    Raises:
        UnreadableCase: another grid, or values that are no labels.
    """
    image = _axial(image)
    misfits = _misfits(image, grid)
    require(
        not misfits,
        "labels-misfit",
        f"the labels are not on the grid of their CT ({', '.join(misfits)}): resample them to it",
    )
    values = image.values
    lowest, highest = float(values.min()), float(values.max())
    whole = values.dtype.kind != "f" or all((np.rint(plane) == plane).all() for plane in values)
    require(
        whole and lowest >= 0 and highest <= MAX_LABEL,
        "labels-values",
        f"values from {lowest:g} to {highest:g}; labels are whole numbers of 0 to {MAX_LABEL}",
    )
    return np.ascontiguousarray(values, dtype=np.uint8 if highest <= 255 else np.uint16)


def _check_hu(hu: NDArray[np.int16], measured: NDArray[np.bool_]) -> None:
    lowest = int(hu.min(initial=np.iinfo(np.int16).max, where=measured))
    highest = int(hu.max(initial=np.iinfo(np.int16).min, where=measured))
    require(
        lowest <= _FAT_HU and highest >= _WATER_HU,
        "not-hu",
        f"values from {lowest} to {highest}, where CT in Hounsfield units reaches below {_FAT_HU} "
        f"and above {_WATER_HU}: undo the scaling, or declare the source `relative`",
    )


def _axial(image: Image) -> Image:
    """The same image with its array axes in the order z, y, x; nothing is resampled or flipped."""
    weights = np.abs(image.direction)
    order = max(itertools.permutations(range(3)), key=lambda axes: weights[range(3), axes].prod())
    direction = image.direction[:, order]
    require(
        bool((np.abs(np.diagonal(direction)) > 0.9).all()),
        "not-axial",
        "the axes are oblique to the patient's by more than 25 degrees: resample it first",
    )
    z_mm, y_mm, x_mm = (image.spacing_mm[axis] for axis in order)
    return Image(image.values.transpose(order), (z_mm, y_mm, x_mm), image.origin_mm, direction)


def _misfits(image: Image, grid: Volume) -> list[str]:
    """What of the geometry differs, and by how much, in words; nothing if both grids are one."""
    if image.values.shape != grid.shape:
        return [f"shape {image.values.shape}, not {grid.shape}"]
    spacing = np.array(grid.spacing_mm)
    extent_mm = spacing * grid.shape
    turned = np.abs((image.direction - grid.direction) * extent_mm).sum(axis=1)
    # How far apart each makes two voxels that should be one, at worst, in voxels.
    shifts = {
        "spacing": np.abs(np.array(image.spacing_mm) - spacing) * grid.shape / spacing,
        "origin": np.abs(np.array(image.origin_mm) - grid.origin_mm) / spacing.min(),
        "direction": turned / spacing.min(),
    }
    return [
        f"{name} differs by up to {shift.max():.3g} voxels"
        for name, shift in shifts.items()
        if shift.max() > _TOLERANCE_VOXELS
    ]
