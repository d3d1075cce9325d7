"""Who trains, validates and tests: decided by a hash of the patient, the same in every store."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from raysynth.case import Split
from raysynth.config.data import SplitConfig
from raysynth.errors import InputError
from raysynth.seeding import SPLIT_SALT, unit_interval

FEW_PATIENTS = 10


def assign_splits(patient_ids: Iterable[str], split: SplitConfig) -> dict[str, Split]:
    """The split of every patient.

    A patient's place in [0, 1) is SHA-256 of a public salt and the id. Below `split.test` they
    test, in the next `split.val` they validate, above that they train: with the same shares, the
    same patient falls in the same split everywhere.

    Where that leaves nobody to test or nobody to train, as it may with few patients, the patient of
    the lowest place tests, and the one of the highest place trains. One patient alone trains.

    Args:
        patient_ids: the original ids, not pseudonyms; repetitions count once.
        split: shares of patients.
    """
    places = {patient: unit_interval(SPLIT_SALT, patient) for patient in patient_ids}
    splits = {patient: split_at(place, split) for patient, place in places.items()}
    if not splits:
        return splits
    ordered = sorted(places, key=lambda patient: (places[patient], patient))
    if "test" not in splits.values():
        splits[ordered[0]] = "test"
    if "train" not in splits.values():
        splits[ordered[-1]] = "train"
    return splits


def read_splits(path: Path) -> Mapping[str, Split]:
    """The split of every patient that a table names.

    Raises:
        InputError: no such table, or one that does not say which.
    """
    splits: dict[str, Split] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"patient", "split"} <= set(rows.fieldnames or ()):
                raise InputError(f"data.split_list {path}: give the columns patient and split")
            for row in rows:
                where = f"data.split_list {path}, line {rows.line_num}"
                patient, named = row["patient"], row["split"]
                known = [split for split in get_args(Split) if split == named]
                if not patient or not known:
                    raise InputError(f"{where}: give a patient, and train, val or test")
                if splits.setdefault(patient, known[0]) != known[0]:
                    raise InputError(f"{where}: the same patient is in two splits")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.split_list {path} cannot be read: {error}") from error
    return splits


def listed_splits(patient_ids: Iterable[str], path: Path) -> dict[str, Split]:
    """The split of every patient, as a table says.

    Raises:
        InputError: it cannot be read, or does not name them all.
    """
    patients, listed = set(patient_ids), read_splits(path)
    unnamed = len(patients - listed.keys())
    if unnamed:  # whoever they are, a log is not the place to say so
        raise InputError(
            f"data.split_list {path} does not name {unnamed} of {len(patients)} patients: give "
            "each a line, by the DICOM PatientID or the file's name without its ending"
        )
    return {patient: listed[patient] for patient in sorted(patients)}


def split_at(place: float, split: SplitConfig) -> Split:
    """The split of a patient at a place in [0, 1)."""
    if place < split.test:
        return "test"
    return "val" if place < split.test + split.val else "train"


def is_indicative(num_patients: int) -> bool:
    """Whether figures on so few patients are no more than a hint, and must be labelled so."""
    return num_patients < FEW_PATIENTS
