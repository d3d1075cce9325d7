"""Who trains, validates and tests: decided by a hash of the patient, the same in every store."""

from __future__ import annotations

from collections.abc import Iterable

from raysynth.case import Split
from raysynth.config.data import SplitConfig
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


def split_at(place: float, split: SplitConfig) -> Split:
    """The split of a patient at a place in [0, 1)."""
    if place < split.test:
        return "test"
    return "val" if place < split.test + split.val else "train"


def is_indicative(num_patients: int) -> bool:
    """Whether figures on so few patients are no more than a hint, and must be labelled so."""
    return num_patients < FEW_PATIENTS
