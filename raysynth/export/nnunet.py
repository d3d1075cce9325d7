"""Samples as a raw data set of nnU-Net (version 2): `Dataset501_Name` with images and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError
from raysynth.export.nifti import write_part
from raysynth.export.passport import Content, sealed
from raysynth.export.writing import ExportedSample, RunFacts, Write, write_json
from storage_schema.v1 import LABELS

FOLDER = re.compile(r"Dataset\d{3}_\w+", re.ASCII)
"""Names by which nnU-Net finds data sets."""

ENDING = ".nii.gz"

CONSECUTIVE = np.zeros(256, np.uint8)
"""What becomes of a label: nnU-Net counts them without a gap, and a store has one before organs."""
CONSECUTIVE[list(LABELS)] = range(len(LABELS))


def nnunet_files(folder: Path, facts: RunFacts) -> AbstractContextManager[Write]:
    """Writes imagesTr/NAME_0000.nii.gz and labelsTr/NAME.nii.gz; `dataset.json` at last.

    Raises:
        InputError: nnU-Net would not find a folder of that name.
    """
    if not FOLDER.fullmatch(folder.name):
        raise InputError(
            f"--to {folder}: nnU-Net knows data sets by their names; give a folder that is called "
            "like Dataset501_Synthetic"
        )
    return _cases(folder, facts)


@contextmanager
def _cases(folder: Path, facts: RunFacts) -> Iterator[Write]:
    highest = 1

    def write(sample: ExportedSample) -> None:
        nonlocal highest
        labels = CONSECUTIVE[sample.layout]
        highest = max(highest, int(labels.max()))
        write_nnunet_case(folder, sample, labels, facts.spacing_mm)

    yield write
    write_dataset_json(folder, facts, highest)


def write_nnunet_case(
    folder: Path,
    sample: ExportedSample,
    labels: NDArray[np.uint8],
    spacing_mm: tuple[float, float],
) -> None:
    """Writes the image and the label map of a training case, each with its passport.

    Args:
        folder: of the data set.
        sample: what is written.
        labels: its layout in consecutive numbers.
        spacing_mm: between planes, and of a pixel.
    """
    parts: tuple[tuple[str, Content, NDArray[np.int16] | NDArray[np.uint8]], ...] = (
        (f"imagesTr/{sample.name}_0000", "image", sample.hu),
        (f"labelsTr/{sample.name}", "labels", labels),
    )
    for name, content, values in parts:
        path = folder / f"{name}{ENDING}"
        path.parent.mkdir(exist_ok=True)
        write_part(path, sample, content, values, spacing_mm)


def write_dataset_json(folder: Path, facts: RunFacts, highest: int) -> None:
    """Writes what nnU-Net must know of a data set, marked as synthetic.

    Args:
        folder: of the data set.
        facts: of the run.
        highest: consecutive number of a label that occurs; those above it are not listed.
    """
    names = list(LABELS.values())[: highest + 1]
    told = facts.passport | {
        "name": folder.name.partition("_")[2],
        "description": f"Synthetic CT, run {facts.run} of raysynth; no patient, research only",
        # "CT" is nnU-Net's word for Hounsfield units; any other is scaled image by image.
        "channel_names": {"0": "CT" if facts.intensity == "hu" else "grey values"},
        "labels": {name: number for number, name in enumerate(names)},
        "stored_labels": {name: value for value, name in LABELS.items() if name in names},
        "numTraining": facts.count,
        "file_ending": ENDING,
    }
    write_json(folder / "dataset.json", sealed(told, "text"))
