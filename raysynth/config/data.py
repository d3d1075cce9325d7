"""What is read, how patients are split, and how samples are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from raysynth.config.base import Section


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

    kind: Literal["lidc"] = "lidc"
    path: Path
    consensus_level: float = Field(0.5, gt=0, le=1)
    """Share of a nodule's readers who must have drawn a voxel for it to count."""


Source = Annotated[PhantomSource | LidcSource, Field(discriminator="kind")]


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
    `field_of_view_mm` around the middle of the lungs is cut from one and brought to `size` pixels
    in the same step. So a pixel is field_of_view_mm / size.
    """

    kind: Literal["slices"] = "slices"
    name: str = Field("slices", pattern=r"^[a-z0-9_]+$")
    size: int = Field(256, ge=16)
    spacing_mm: float = Field(0.7, gt=0)
    """Distance and thickness of planes, millimetres."""
    field_of_view_mm: float = Field(360.0, gt=0)
    nodule_slices: Literal["centre", "all"] = "all"
    """Of a nodule: only the plane of its largest area, or every plane it crosses."""
    nodule_free_every: int = Field(4, ge=0)
    """Keep one in so many lung planes that no nodule crosses; 0 keeps none."""
    min_nodule_mm: float = Field(0.0, ge=0)
    """Nodules below this diameter get no slices of their own."""

    def settings(self) -> dict[str, Any]:
        """All that decides what is cut, as JSON values: everything but the set's name."""
        return self.model_dump(mode="json", exclude={"name"})

    @property
    def pixel_mm(self) -> float:
        """Side of one pixel of a sample in millimetres."""
        return self.field_of_view_mm / self.size


class DataConfig(Section):
    """Everything between the scanner's files and the samples."""

    source: Source = PhantomSource()
    split: SplitConfig = SplitConfig()
    samples: SliceSamples = SliceSamples()
    max_quarantined: float = Field(0.5, ge=0, le=1)
    """A larger share of refused cases makes ingest fail (exit code 1)."""
