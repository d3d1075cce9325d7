"""Writes a sample as a DICOM CT series and its layout as a DICOM segmentation; reads both back.

Every file says that it is synthetic: in Synthetic Data (0008,001C), in its image type, in the names
of its patient and series, in what made it, and in the passport that it carries in a private block.
Nobody was scanned: whatever tells of a person or a day stays empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom import uid as uids
from pydicom.dataelem import RawDataElement
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.valuerep import DSfloat

from raysynth import __version__
from raysynth.case import Label
from raysynth.errors import InputError, UnreadableCase
from raysynth.export.passport import Passport, packed, sealed, unpacked
from raysynth.export.writing import ExportedSample, RunFacts, Write, write_file
from raysynth.formats.dicom import MAX_VOXELS
from raysynth.formats.dicom_file import hushed, parse_file, require
from raysynth.volume import Volume
from storage_schema.v1 import LABELS

SEGMENTATION = "segmentation.dcm"

PRIVATE_CREATOR = "RAYSYNTH"
PRIVATE_GROUP = 0x0099
REST = "rest"
PASSPORT_ELEMENT = 0x01
PASSPORT_TAG = PRIVATE_GROUP << 16 | 0x1000 | PASSPORT_ELEMENT
"""Of the private block: the passport as JSON, so (0099,1001) in files that have no other block."""

NO_PATIENT = "synthetic, no patient; research only"
WITH_REAL_PIXELS = "synthetic in part, rest a real scan; research only"
"""Descriptions of a series; at most 64 characters."""

WINDOWS = {"LUNG": (-600, 1500), "MEDIASTINUM": (40, 400)}
"""Centre and width in HU of what viewers offer; they open with the first."""

NO_DATE, NO_TIME = "19700101", "000000"
"""Where a segmentation must have a date: the same command writes the same bytes on any day."""

UNKNOWN = (
    *("PatientBirthDate", "PatientSex", "PatientPosition", "ReferringPhysicianName"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "AcquisitionNumber"),
    *("KVP", "PositionReferenceIndicator"),
)
"""What a CT image must have, though it may be empty."""

_ANATOMY = codes.SCT.AnatomicalStructure
_ABNORMAL = codes.SCT.MorphologicallyAbnormalStructure


def _sct(value: str, meaning: str) -> Code:
    return Code(value, "SCT", meaning)


CODES = {
    Label.LEFT_LUNG: (_ANATOMY, _sct("44029006", "Left lung")),
    Label.RIGHT_LUNG: (_ANATOMY, _sct("3341006", "Right lung")),
    Label.TRACHEA: (_ANATOMY, _sct("44567001", "Trachea")),
    Label.BODY: (_ANATOMY, _sct("38266002", "Entire body")),
    Label.NODULE: (_ABNORMAL, _sct("27925004", "Nodule")),
    Label.LIVER: (_ANATOMY, _sct("10200004", "Liver")),
    Label.LEFT_KIDNEY: (_ANATOMY, _sct("18639004", "Left kidney")),
    Label.RIGHT_KIDNEY: (_ANATOMY, _sct("9846003", "Right kidney")),
    Label.SPLEEN: (_ANATOMY, _sct("78961009", "Spleen")),
    Label.TUMOUR: (_ABNORMAL, _sct("108369006", "Neoplasm")),
}
"""Category and type of a segment, in SNOMED CT; a segment's name is that of `LABELS`."""


@dataclass(frozen=True)
class Marks:
    """What an exported file says.

    Attributes:
        passport: sealed; None if the file has none that can be read.
        is_synthetic: whether it says of itself that it is.
        rest: hash of the file without its passport, which holds what it was.
        pixels: Hounsfield units of one plane, int16 (y, x); or of a segmentation the labels of all
            planes of its series, uint8 (z, y, x), 0 where no segment is.
    """

    passport: Passport | None
    is_synthetic: bool
    rest: str
    pixels: NDArray[np.int16] | NDArray[np.uint8]


def dicom_files(folder: Path, facts: RunFacts) -> AbstractContextManager[Write]:
    """Writes a folder a sample, see `write_dicom`.

    Raises:
        InputError: values are no Hounsfield units.
    """
    if facts.intensity != "hu":
        raise InputError("--format dicom: this run has grey values of no known unit; take nifti")
    return _series(folder, facts)


@contextmanager
def _series(folder: Path, facts: RunFacts) -> Iterator[Write]:
    depth_mm, pixel_mm = facts.spacing_mm

    def write(sample: ExportedSample) -> None:
        shape = (-1, *sample.hu.shape[-2:])
        volume = Volume(sample.hu.reshape(shape), (depth_mm, pixel_mm, pixel_mm))
        (folder / sample.name).mkdir(exist_ok=True)
        write_dicom(folder / sample.name, volume, sample.layout.reshape(shape), sample.passport)

    yield write


def write_dicom(
    folder: Path, volume: Volume, layout: NDArray[np.uint8] | None, passport: Passport
) -> list[Path]:
    """Writes a CT series, one file a plane, and its segmentation if the layout names anything.

    All UIDs follow from the passport: the same call writes the same bytes, and a sample that leaves
    with another passport is another patient's series.

    Args:
        folder: that is there; the files are `image_0001.dcm` on, and `segmentation.dcm`.
        volume: Hounsfield units and where they lie; one plane for a slice.
        layout: labels (`Label`), uint8 (z, y, x) on the volume's grid.
        passport: of the sample; its run, row, software and bundle are also told in plain tags.

    Returns:
        The files, in the order of the planes, with the segmentation at the end.

    Raises:
        ValueError: the layout is of another shape, or has a value that is no `Label`.
    """
    images = [_image(volume, plane, passport) for plane in range(volume.shape[0])]
    files = {f"image_{number:04d}.dcm": image for number, image in enumerate(images, start=1)}
    if layout is not None and layout.any():
        files[SEGMENTATION] = _segmentation(images, layout, passport)
    for name, dataset in files.items():
        is_image = name != SEGMENTATION
        values = volume.hu[dataset.InstanceNumber - 1] if is_image else layout
        _set_passport(dataset, {})
        own = passport | {REST: _hash_without_passport(_packed_file(dataset))}
        _set_passport(dataset, sealed(own, "image" if is_image else "labels", values))
        write_file(folder / name, _packed_file(dataset))
    return [folder / name for name in files]


def read_marks(path: Path) -> Marks:
    """Reads a file of `write_dicom` back: its marks, its passport and its voxels.

    Raises:
        UnreadableCase: it is damaged, or neither a CT image nor a segmentation as written here.
    """
    # Checked first: some codings can inflate to any size.
    with hushed():
        syntax = parse_file(path, ("SOPClassUID",)).transfer_syntax
    require(
        syntax == uids.ExplicitVRLittleEndian,
        "transfer-syntax",
        "not in Explicit VR Little Endian, as exports are",
    )
    try:
        with hushed():
            content = path.read_bytes()
            rest = _hash_without_passport(content)
            dataset = dcmread(BytesIO(content))
            if dataset.SOPClassUID == uids.SegmentationStorage:
                pixels: NDArray[Any] = _labels(dataset)
            else:
                pixels = dataset.pixel_array * int(dataset.RescaleSlope)
                pixels = (pixels + int(dataset.RescaleIntercept)).astype(np.int16)
            is_synthetic = dataset.get("SyntheticData") == "YES"
            return Marks(_passport(dataset), is_synthetic, rest, pixels)
    except UnreadableCase:
        raise
    except Exception as error:  # pydicom may raise anything; its text could quote the file
        reason = f"neither a CT image nor a segmentation as exported ({type(error).__name__})"
        raise UnreadableCase("not-dicom", reason) from None


def _uid(passport: dict[str, Any], part: str) -> str:
    """A UID that follows from the passport and the part of the sample that it names."""
    text = json.dumps([passport, part], sort_keys=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    # A UUID of version 8, which is made as its maker likes.
    number = number & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)
    return f"2.25.{number}"


def _image(volume: Volume, plane: int, passport: Passport) -> Dataset:
    """One plane as a CT image."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    image.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    image.SOPClassUID = uids.CTImageStorage
    image.SOPInstanceUID = _uid(passport, f"image {plane}")
    image.StudyInstanceUID = _uid(passport, "study")
    image.SeriesInstanceUID = _uid(passport, "series")
    image.FrameOfReferenceUID = _uid(passport, "frame of reference")
    image.PatientID = f"SYN-{passport['run']}-{passport['row']:08d}"
    image.PatientName = f"Synthetic^{passport['run']} {passport['row']}"
    for name in UNKNOWN:
        setattr(image, name, None)
    image.Modality = "CT"
    image.BodyPartExamined = "CHEST"
    image.SeriesNumber = 1
    image.InstanceNumber = plane + 1
    _set_marks(image, passport)
    _set_geometry(image, volume, plane)
    _set_pixels(image, volume.hu[plane])
    return image


def _set_marks(dataset: Dataset, passport: Passport) -> None:
    """All that says of a file that it is synthetic and where it comes from."""
    dataset.SyntheticData = "YES"
    dataset.SeriesDescription = WITH_REAL_PIXELS if passport["contains_real_pixels"] else NO_PATIENT
    dataset.Manufacturer = "raysynth"
    dataset.ManufacturerModelName = "raysynth"
    dataset.SoftwareVersions = __version__
    dataset.ContributingEquipmentSequence = [
        highdicom.ContributingEquipment(
            "raysynth",
            codes.DCM.SynthesizingEquipment,
            manufacturer_model_name="raysynth",
            software_versions=passport["passport"].get("software", "raysynth"),
            contribution_description=f"drew the voxels with the bundle {passport['bundle']}",
        )
    ]


def _packed_file(dataset: Dataset) -> bytes:
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _hash_without_passport(content: bytes) -> str:
    """SHA-256 of a file without the element that is the passport; of all of it if it has none."""
    found: Any = dcmread(BytesIO(content)).get_item(PASSPORT_TAG)
    if isinstance(found, RawDataElement):
        # Tag, VR, two bytes of nothing and the length stand before a value of this kind.
        start = found.value_tell - 12
        content = content[:start] + content[found.value_tell + found.length :]
    return hashlib.sha256(content).hexdigest()


def _set_passport(dataset: Dataset, passport: Passport) -> None:
    block = dataset.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    block.add_new(PASSPORT_ELEMENT, "UT", packed(passport).decode())


def _set_geometry(image: Dataset, volume: Volume, plane: int) -> None:
    """DICOM counts in (x, y, z); lengths and directions have 16 characters each."""
    depth_mm, row_mm, column_mm = volume.spacing_mm
    _, down, right = volume.direction[::-1].T
    image.ImageOrientationPatient = _decimals([*right, *down])
    image.ImagePositionPatient = _decimals(volume.position_mm((plane, 0, 0))[::-1])
    image.PixelSpacing = _decimals([row_mm, column_mm])
    (image.SliceThickness,) = _decimals([depth_mm])


def _decimals(values: Any) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def _set_pixels(image: Dataset, hu: NDArray[np.int16]) -> None:
    """Stored values are Hounsfield units themselves."""
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows, image.Columns = hu.shape
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit = 15
    image.PixelRepresentation = 1
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = 0, 1, "HU"
    image.WindowCenter = [centre for centre, _ in WINDOWS.values()]
    image.WindowWidth = [width for _, width in WINDOWS.values()]
    image.WindowCenterWidthExplanation = list(WINDOWS)
    pixels = np.ascontiguousarray(hu, dtype="<i2").tobytes()
    image.add_new("PixelData", "OW", pixels)


def _segmentation(
    images: list[Dataset], layout: NDArray[np.uint8], passport: Passport
) -> Segmentation:
    """The layout as one segment a label that occurs, in the order of the labels."""
    labels = [Label(value) for value in np.unique(layout) if value]
    shape = (len(images), images[0].Rows, images[0].Columns)
    if layout.shape != shape:
        raise ValueError(f"a layout of {layout.shape} voxels for a series of {shape}")
    numbers = np.zeros(256, np.uint8)
    numbers[labels] = np.arange(1, len(labels) + 1)
    segmentation = Segmentation(
        images,
        numbers[layout],
        "BINARY",
        [_segment(number, label) for number, label in enumerate(labels, start=1)],
        series_instance_uid=_uid(passport, "segmentation series"),
        series_number=2,
        sop_instance_uid=_uid(passport, "segmentation"),
        instance_number=1,
        manufacturer="raysynth",
        manufacturer_model_name="raysynth",
        software_versions=__version__,
        device_serial_number=passport["bundle"],
        content_description="layout that the image was drawn from",
        content_date=NO_DATE,
        content_time=NO_TIME,
    )
    del segmentation.InstanceCreationDate, segmentation.InstanceCreationTime
    dimensions = _uid(passport, "dimensions")
    segmentation.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimensions
    for index in segmentation.DimensionIndexSequence:
        index.DimensionOrganizationUID = dimensions
    _set_marks(segmentation, passport)
    return segmentation


def _segment(number: int, label: Label) -> SegmentDescription:
    category, kind = CODES[label]
    return SegmentDescription(
        number,
        LABELS[label],
        category,
        kind,
        SegmentAlgorithmTypeValues.AUTOMATIC,
        highdicom.AlgorithmIdentificationSequence(
            "raysynth", codes.DCM.ArtificialIntelligence, __version__
        ),
        primary_anatomic_structures=[codes.SCT.Lung] if label == Label.NODULE else None,
    )


def _labels(dataset: Dataset) -> NDArray[np.uint8]:
    """The layout that a segmentation holds, on the planes of its series."""
    segmentation = Segmentation.from_dataset(dataset, copy=False)
    (series,) = dataset.ReferencedSeriesSequence
    planes = [image.ReferencedSOPInstanceUID for image in series.ReferencedInstanceSequence]
    voxels = len(planes) * dataset.Rows * dataset.Columns
    require(voxels <= MAX_VOXELS, "size", f"{voxels} voxels; at most {MAX_VOXELS} can be read")
    numbers = segmentation.get_pixels_by_source_instance(
        planes, combine_segments=True, assert_missing_frames_are_empty=True
    )
    values = {name: value for value, name in LABELS.items()}
    named = [values[segment.SegmentLabel] for segment in dataset.SegmentSequence]
    layout: NDArray[np.uint8] = np.array([0, *named], np.uint8)[numbers]
    return layout


def _passport(dataset: Dataset) -> Passport | None:
    try:
        block = dataset.private_block(PRIVATE_GROUP, PRIVATE_CREATOR)
    except KeyError:
        return None
    return unpacked(str(block[PASSPORT_ELEMENT].value)) if PASSPORT_ELEMENT in block else None
