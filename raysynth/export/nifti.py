"""Samples as NIfTI-1: image and label map, each with its passport in an extension of its header."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import NDArray

from raysynth.case import Label
from raysynth.export.passport import Content, Passport, packed, sealed, unpacked
from raysynth.export.writing import ExportedSample, RunFacts, Write, write_json
from storage_schema.v1 import LABELS

DESCRIPTION = b"synthetic (raysynth), no patient; research only"
WITH_REAL_PIXELS = b"synthetic in part (raysynth), rest a real scan; research only"
"""The header's descrip; at most 79 bytes."""

COMMENT = 6
"""The code of an extension that holds text."""

SCANNER = 1
"""The code of coordinates in millimetres of a scanner."""

COLOURS = {
    Label.LEFT_LUNG: (102, 194, 165),
    Label.RIGHT_LUNG: (141, 160, 203),
    Label.TRACHEA: (255, 217, 47),
    Label.BODY: (179, 179, 179),
    Label.NODULE: (228, 26, 28),
}


@contextmanager
def nifti_files(folder: Path, facts: RunFacts) -> Iterator[Write]:
    """Writes NAME.nii.gz, NAME_labels.nii.gz and NAME.json, the passport; `labels.json` at last."""

    def write(sample: ExportedSample) -> None:
        parts: tuple[tuple[str, Content, NDArray[Any]], ...] = (
            ("", "image", sample.hu),
            ("_labels", "labels", sample.layout),
        )
        for ending, content, values in parts:
            path = folder / f"{sample.name}{ending}.nii.gz"
            write_part(path, sample, content, values, facts.spacing_mm)
        write_json(folder / f"{sample.name}.json", sealed(sample.passport, "text"))

    yield write
    names = {
        str(value): {"name": name, "colour": COLOURS.get(Label(value))}
        for value, name in LABELS.items()
    }
    told = sealed(facts.passport | {"labels": names}, "text")
    write_json(folder / "labels.json", told)


def nifti_image(
    values: NDArray[Any],
    spacing_mm: tuple[float, float],
    is_mixed: bool | None,
    passport: Passport | None = None,
) -> nibabel.Nifti1Image:
    """A sample as NIfTI; a synthetic one is marked.

    A volume, or a plane as one, in LPS as samples are; NIfTI counts x and y the other way. Both of
    its forms, sform and qform, are set.

    Args:
        values: (z, y, x) or (y, x).
        spacing_mm: between planes, and of a pixel.
        is_mixed: whether some are copied from a real scan; None: all are, and nothing is synthetic.
        passport: sealed; None: it carries none.
    """
    affine = nifti_affine(spacing_mm)
    volume = values if values.ndim == 3 else values[None]
    image = nibabel.Nifti1Image(volume.T, affine)  # type: ignore[no-untyped-call]
    image.set_sform(affine, SCANNER)  # type: ignore[no-untyped-call]
    image.set_qform(affine, SCANNER)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    if is_mixed is not None:
        image.header["descrip"] = WITH_REAL_PIXELS if is_mixed else DESCRIPTION
    if passport is not None:
        image.header.extensions.append(Nifti1Extension(COMMENT, packed(passport)))
    return image


def write_part(
    path: Path,
    sample: ExportedSample,
    content: Content,
    values: NDArray[Any],
    spacing_mm: tuple[float, float],
) -> None:
    """Writes the image or the label map of a sample, with its sealed passport.

    Args:
        path: of the file.
        sample: whose it is.
        content: which of both.
        values: its voxels.
        spacing_mm: between planes, and of a pixel.
    """
    own = sealed(sample.passport, content, values, nifti_affine(spacing_mm).ravel().tolist())
    write_nifti(path, values, spacing_mm, is_mixed=sample.is_mixed, passport=own)


def write_nifti(
    path: Path,
    values: NDArray[Any],
    spacing_mm: tuple[float, float],
    *,
    is_mixed: bool,
    passport: Passport,
) -> None:
    """Writes `nifti_image`'s, whole or not at all."""
    image = nifti_image(values, spacing_mm, is_mixed, passport)
    part = path.with_name(f".{path.name}")  # its ending says that it is to be packed
    nibabel.save(image, part)
    os.replace(part, path)


def nifti_affine(spacing_mm: tuple[float, float]) -> NDArray[np.float64]:
    """From the indices of `nifti_image`'s voxels to millimetres, (4, 4)."""
    depth_mm, pixel_mm = spacing_mm
    return np.diag([-pixel_mm, -pixel_mm, depth_mm, 1.0])


def nifti_passport(path: Path) -> tuple[Passport | None, NDArray[Any], list[float]]:
    """The passport in a header, the voxels, (z, y, x), and the affine matrix, row by row.

    Raises:
        OSError, ValueError, nibabel.filebasedimages.ImageFileError: no NIfTI.
    """
    image = nibabel.nifti1.load(path)  # type: ignore[no-untyped-call]
    found = [unpacked(bytes(one.get_content())) for one in image.header.extensions]
    is_marked = bytes(image.header["descrip"].tobytes()).startswith(b"synthetic")
    passport = next((one for one in found if one is not None), None) if is_marked else None
    return passport, np.asarray(image.dataobj).T, image.affine.ravel().tolist()
