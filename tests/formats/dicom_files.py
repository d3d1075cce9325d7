"""Writes small DICOM CT series, whole or faulty, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from raysynth.volume import Volume

SERIES_UID = "1.2.826.0.1.3680043.8.498.7"
INTERCEPT = -1024

Edit = Callable[[Dataset, int], None]


def small_volume(slices: int = 10, side: int = 16) -> Volume:
    """Voxels that tell planes, rows and columns apart, on a grid with three different spacings."""
    z, y, x = np.indices((slices, side, side))
    hu = (100 * z - 10 * y + x - 700).astype(np.int16)
    return Volume(hu, spacing_mm=(2.5, 0.7, 0.8), origin_mm=(-300.0, -120.0, -140.0))


def write_series(
    folder: Path,
    volume: Volume,
    *,
    edit: Edit | None = None,
    series_uid: str = SERIES_UID,
    patient_id: str = "PATIENT-1",
) -> list[Path]:
    """Writes one file a plane, head first, and returns them.

    Args:
        edit: changes the data set of plane number `int` (from the feet) before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, plane in enumerate(reversed(range(volume.shape[0]))):
        tags = ct_slice(volume, plane, series_uid, patient_id)
        if edit is not None:
            edit(tags, plane)
        files.append(folder / f"{number:04d}.dcm")
        tags.save_as(files[-1], enforce_file_format=True)
    return files


def ct_slice(volume: Volume, plane: int, series_uid: str, patient_id: str) -> Dataset:
    """One plane as a CT image with names, dates and ids that no reader should pass on."""
    tags = Dataset()
    tags.file_meta = FileMetaDataset()
    tags.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    tags.SOPClassUID = CTImageStorage
    tags.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(plane)])
    tags.SeriesInstanceUID = series_uid
    tags.StudyInstanceUID = f"{series_uid}.1"
    tags.PatientID = patient_id
    tags.PatientName = "Doe^Jane"
    tags.StudyDate = "19991231"
    tags.InstitutionName = "St. Elsewhere"
    tags.Modality = "CT"
    tags.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    tags.Manufacturer = "ACME"
    tags.ConvolutionKernel = ["I30f", "3"]
    tags.KVP = 120
    tags.SliceThickness = 2.5
    tags.InstanceNumber = plane + 1
    z_mm, y_mm, x_mm = volume.position_mm((plane, 0, 0))
    tags.ImagePositionPatient = [round(value, 6) for value in (x_mm, y_mm, z_mm)]
    _, column, row = volume.direction.T[:, ::-1]
    tags.ImageOrientationPatient = [*row, *column]
    tags.PixelSpacing = [*volume.spacing_mm[1:]]
    tags.Rows, tags.Columns = volume.shape[1:]
    tags.SamplesPerPixel = 1
    tags.PhotometricInterpretation = "MONOCHROME2"
    tags.BitsAllocated = tags.BitsStored = 16
    tags.HighBit = 15
    tags.PixelRepresentation = 1
    tags.RescaleSlope = 1
    tags.RescaleIntercept = INTERCEPT
    tags.PixelData = (volume.hu[plane] - INTERCEPT).astype("<i2").tobytes()
    return tags
