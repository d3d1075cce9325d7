"""What is read, how patients are split, and how samples are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from raysynth.config.base import Section

Anatomy = Literal[
    "ignore",
    "left_lung",
    "right_lung",
    "lung",
    "trachea",
    "body",
    "nodule",
    "liver",
    "left_kidney",
    "right_kidney",
    "spleen",
    "tumour",
]
"""What a value of somebody's label map may mean."""


class PhantomSource(Section):
    """Built-in patients: procedural anatomy, real LIDC nodules."""

    kind: Literal["phantom"] = "phantom"
    anatomy: Literal["thorax", "abdomen"] = "thorax"
    num_patients: int = Field(6, ge=1)
    seed: int = 0
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (2.5, 1.4, 1.4)
    """Voxel size (z, y, x). A patient fills about 300 x 260 x 360 mm: halving it costs 8x."""
    nodules_per_patient: tuple[int, int] = (1, 3)
    min_diameter_mm: float = 4.0
    """Smaller LIDC nodules are not placed."""
    intensity: Literal["hu", "relative"] = "hu"
    """`relative`: grey values without a unit, to lend layouts to models that learned from such."""

    @property
    def needs_lung(self) -> bool:
        """An abdomen may show none."""
        return self.anatomy == "thorax"

    @model_validator(mode="after")
    def _check(self) -> PhantomSource:
        low, high = self.nodules_per_patient
        if not 0 <= low <= high:
            raise ValueError(
                f"nodules_per_patient {self.nodules_per_patient}: give (least, most), from 0 on"
            )
        return self


class LidcSource(Section):
    """A folder of LIDC-IDRI DICOM series, in any arrangement of sub-folders."""

    needs_lung: ClassVar[bool] = True
    kind: Literal["lidc"] = "lidc"
    path: Path
    nodule_mask: Literal["consensus", "one_reader"] = "consensus"
    """`one_reader`: what one reader of each nodule drew, picked by a hash."""
    consensus_level: float = Field(0.5, gt=0, le=1)
    """Share of a nodule's readers who must have drawn a voxel for it to count."""


class LidcSlicesSource(Section):
    """LIDC-IDRI's nodules as PNG crops with readers' masks (Kaggle's zhangweiled/lidcidri).

    Each crop becomes a case of one slice.
    """

    needs_lung: ClassVar[bool] = False
    kind: Literal["lidc_slices"] = "lidc_slices"
    path: Path
    intensity: Literal["relative"] = "relative"
    """Each crop's grey values were stretched to 0..255: no Hounsfield units can be had."""
    consensus_level: float = Field(0.5, gt=0, le=1)
    """Share of a nodule's readers who must have drawn a pixel for it to count."""


class Luna16Source(Section):
    """A folder of LUNA16 volumes (`<SeriesInstanceUID>.mhd` and their data), in any arrangement."""

    needs_lung: ClassVar[bool] = True
    kind: Literal["luna16"] = "luna16"
    path: Path
    annotations: Path | None = None
    """The challenge's annotations.csv; None: that of the folder."""
    lungs: Path | None = None
    """A folder of the challenge's lung segmentations; None: lungs are segmented here."""
    nodule_mask: Literal["two_means", "sphere", "lidc"] = "two_means"
    """`two_means`: the brighter voxels of the annotated sphere, as published. `sphere`: all of it.
    `lidc`: what LIDC's readers outlined, with their ratings."""


class DicomSource(Section):
    """A folder of DICOM CT series that nobody annotated."""

    kind: Literal["dicom"] = "dicom"
    path: Path
    needs_lung: bool = True
    """Refuse series that show no lung."""


class ImageSource(Section):
    """A folder of NIfTI, NRRD or MetaImage volumes, each of another patient."""

    kind: Literal["images"] = "images"
    path: Path
    labels: Path | None = None
    """A folder of label maps, each named as its volume."""
    class_map: dict[int, Anatomy] = Field(default_factory=dict)
    """What a value of the label maps means; 0 is nothing. `nodule` makes nodules, `lung` is either
    lung, `ignore` says nothing."""
    intensity: Literal["hu", "relative"] = "hu"
    """`relative`: grey values of no known unit; layouts then come from label maps alone."""
    needs_lung: bool = True
    """Refuse volumes that show no lung."""


Source = Annotated[
    PhantomSource | LidcSource | LidcSlicesSource | Luna16Source | DicomSource | ImageSource,
    Field(discriminator="kind"),
]


class SplitConfig(Section):
    """Shares of patients; the rest trains. A patient's split follows from a hash of the patient."""

    val: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError(
                f"val + test is {self.val + self.test:g}: nothing is left to train on; "
                "make them smaller"
            )
        return self


class SliceSamples(Section):
    """Axial slices of one fixed size (system A's images).

    Planes lie `spacing_mm` apart, each the mean of as much of the volume; a square of
    `field_of_view_mm` around the middle of the lungs, or around a nodule, is cut from one and
    brought to `size` pixels in the same step. So a pixel is field_of_view_mm / size.
    """

    kind: Literal["slices"] = "slices"
    name: str = Field("slices", pattern=r"^[a-z0-9_]+$")
    size: int = Field(256, ge=16)
    spacing_mm: float = Field(0.7, gt=0)
    """Distance and thickness of planes, millimetres."""
    field_of_view_mm: float = Field(360.0, gt=0)
    centre: Literal["lungs", "nodule", "volume"] = "lungs"
    """Middle of the image. `nodule`: crops around nodules, and nothing else. `volume`: every plane
    counts, whether it shows lung or not: what organs of the abdomen need."""
    nodule_slices: Literal["centre", "all"] = "all"
    """Of a nodule: only the plane of its largest area, or every plane it crosses."""
    nodule_free_every: int = Field(4, ge=0)
    """Keep one in so many planes that show lung and that no nodule crosses; 0 keeps none."""
    min_nodule_mm: float = Field(0.0, ge=0)
    """Nodules below this diameter get no slices of their own."""

    @model_validator(mode="after")
    def _crops_show_nodules(self) -> SliceSamples:
        if self.centre == "nodule" and self.nodule_free_every:
            raise ValueError(
                f"nodule_free_every {self.nodule_free_every}: with centre: nodule every slice has "
                "one; set it to 0"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """All that decides what is cut, as JSON values: everything but the set's name."""
        return self.model_dump(mode="json", exclude={"name"})

    @property
    def shape(self) -> tuple[int, int]:
        """Of one sample, (y, x)."""
        return self.size, self.size

    @property
    def pixel_mm(self) -> float:
        """Side of one pixel of a sample in millimetres."""
        return self.field_of_view_mm / self.size


class PatchSamples(Section):
    """Cubes of one fixed size (system D's patches and whole volumes).

    A cube of `field_of_view_mm` is cut from a volume and brought to `size` voxels a side in the
    same step, so a voxel measures field_of_view_mm / size along every axis. Cubes around nodules
    and random places are moved into the volume where they reach out of it.
    """

    kind: Literal["patches"] = "patches"
    name: str = Field("patches", pattern=r"^[a-z0-9_]+$")
    size: int = Field(64, ge=8)
    field_of_view_mm: float = Field(64.0, gt=0)
    centre: Literal["nodule", "lungs"] = "nodule"
    """`nodule`: cubes around every nodule. `lungs`: one for each case, around the lungs."""
    patches_per_nodule: int = Field(1, ge=1)
    """The first around the nodule's middle, others around voxels of it that are drawn at random."""
    random_per_case: int = Field(0, ge=0)
    """Besides, cubes around lung voxels drawn at random; they may show nodules."""
    min_nodule_mm: float = Field(0.0, ge=0)
    """Nodules below this diameter get no cubes of their own."""
    seed: int = 0
    """Of the random places."""

    @model_validator(mode="after")
    def _whole_volumes_are_one_each(self) -> PatchSamples:
        if self.centre == "lungs" and (self.patches_per_nodule > 1 or self.random_per_case):
            raise ValueError(
                "centre: lungs cuts one cube a case; leave patches_per_nodule at 1 and "
                "random_per_case at 0, or say centre: nodule"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """All that decides what is cut, as JSON values: everything but the set's name."""
        return self.model_dump(mode="json", exclude={"name"})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one sample, (z, y, x)."""
        return self.size, self.size, self.size

    @property
    def pixel_mm(self) -> float:
        """Side of one voxel of a sample in millimetres."""
        return self.field_of_view_mm / self.size

    @property
    def spacing_mm(self) -> float:
        """Distance and thickness of a sample's planes, which are as far apart as its columns."""
        return self.pixel_mm


def _slices_unless_said(value: Any) -> Any:
    return {"kind": "slices", **value} if isinstance(value, dict) else value


Samples = Annotated[
    SliceSamples | PatchSamples,
    Field(discriminator="kind"),
    BeforeValidator(_slices_unless_said),
]


class DataConfig(Section):
    """Everything between the scanner's files and the samples."""

    source: Source = PhantomSource()
    split: SplitConfig = SplitConfig()
    split_list: Path | None = None
    """A table (CSV with the columns patient and split) that decides instead of `split`. Patients go
    by the DICOM PatientID, for images by the file's name without its ending."""
    samples: Samples = SliceSamples()
    max_quarantined: float = Field(0.5, ge=0, le=1)
    """A larger share of refused cases makes ingest fail (exit code 1)."""
