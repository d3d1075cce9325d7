"""Invented people, planted in every place of a DICOM series that could name one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from raysynth.volume import Volume
from tests.formats.dicom_files import write_series

WORD = "Qzlqw"
"""Starts every name; nothing else has it."""

UID_ROOT = "1.2.752.99113"
DAY = date(1923, 1, 1)

TAGS = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "IssuerOfPatientID"),
    *("PatientBirthDate", "PatientBirthName", "PatientMotherBirthName", "PatientAddress"),
    *("PatientTelephoneNumbers", "PatientComments", "EthnicGroup", "Occupation", "MilitaryRank"),
    *("BranchOfService", "CountryOfResidence", "RegionOfResidence", "AdditionalPatientHistory"),
    *("MedicalRecordLocator", "PatientReligiousPreference", "ResponsiblePerson"),
    *("ResponsibleOrganization", "AccessionNumber", "StudyID", "StudyDescription"),
    *("SeriesDescription", "ProtocolName", "InstitutionName", "InstitutionAddress"),
    *("InstitutionalDepartmentName", "ReferringPhysicianName", "ReferringPhysicianAddress"),
    *("ReferringPhysicianTelephoneNumbers", "PerformingPhysicianName"),
    *("NameOfPhysiciansReadingStudy", "OperatorsName", "PhysiciansOfRecord"),
    *("RequestingPhysician", "StationName", "DeviceSerialNumber", "StudyInstanceUID"),
    *("SeriesInstanceUID", "FrameOfReferenceUID", "StudyDate", "SeriesDate", "AcquisitionDate"),
    *("ImageComments", "DerivationDescription", "AdmissionID", "CurrentPatientLocation"),
    *("Manufacturer", "ManufacturerModelName", "ConvolutionKernel"),
)
"""Standard tags, one identity each."""

ELSEWHERE = (
    *("folder", "file", "preamble", "aetitle", "image type", "private creator", "private text"),
    *("private sequence", "nested sequence", "overlay label", "graphic text", "trailing padding"),
)
"""Other places that hold one each."""


@dataclass(frozen=True)
class Person:
    """Somebody who does not exist; each of `identities` stands in one place of the series."""

    number: int
    identities: dict[str, str]

    @property
    def folder(self) -> str:
        """Name of the folder that holds the series."""
        return f"{self.identities['folder']}^Jane"


def person(number: int) -> Person:
    """A person with an identity in every place."""
    identities = {}
    for place, name in enumerate((*TAGS, *ELSEWHERE)):
        unique = number * 100 + place
        vr = dictionary_VR(name) if name in TAGS else "LO"
        if vr == "DA":
            identities[name] = f"{DAY + timedelta(days=unique):%Y%m%d}"
        elif vr == "UI":
            identities[name] = f"{UID_ROOT}.{1000 + unique}"
        else:
            digest = hashlib.sha256(f"{name} {number}".encode()).digest()
            identities[name] = WORD + "".join(chr(97 + byte % 26) for byte in digest[:9])
    return Person(number, identities)


def write_person(root: Path, one: Person, volume: Volume) -> list[Path]:
    """Writes the series of a person, and returns its files."""
    told = one.identities

    def plant(tags: Dataset, plane: int) -> None:
        for name in TAGS:
            setattr(tags, name, told[name])
        tags.SOPInstanceUID = f"{told['SeriesInstanceUID']}.{plane}"
        tags.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", told["image type"].upper()]
        tags.file_meta.SourceApplicationEntityTitle = told["aetitle"]
        private = tags.private_block(0x0011, told["private creator"], create=True)
        private.add_new(1, "LT", told["private text"])
        private.add_new(2, "SQ", Sequence([_with("PatientName", told["private sequence"])]))
        tags.RequestAttributesSequence = Sequence([Dataset()])
        request = tags.RequestAttributesSequence[0]
        request.RequestedProcedureCodeSequence = Sequence(
            [_with("CodeMeaning", told["nested sequence"])]
        )
        tags.add_new(0x60000010, "US", 1)
        tags.add_new(0x60001500, "LO", told["overlay label"])
        text = _with("UnformattedTextValue", told["graphic text"])
        tags.GraphicAnnotationSequence = Sequence([Dataset()])
        tags.GraphicAnnotationSequence[0].TextObjectSequence = Sequence([text])
        tags.add_new(0xFFFCFFFC, "OB", told["trailing padding"].encode() + b"\0" * 2)

    files = write_series(root / one.folder, volume, edit=plant)
    for number, path in enumerate(files):
        raw = path.read_bytes()
        path.write_bytes(told["preamble"].encode().ljust(128, b"\0") + raw[128:])
        files[number] = path.rename(path.with_name(f"{told['file']}-{number}.dcm"))
    return files


def _with(keyword: str, value: str) -> Dataset:
    tags = Dataset()
    setattr(tags, keyword, value)
    return tags
