"""The same patient falls in the same split, and few patients still leave one to test."""

from __future__ import annotations

import pytest

from raysynth.config.data import SplitConfig
from raysynth.store.splits import assign_splits, is_indicative

PATIENTS = [f"LIDC-IDRI-{number:04d}" for number in range(1, 1011)]


def test_shares_are_about_right() -> None:
    splits = list(assign_splits(PATIENTS, SplitConfig(val=0.1, test=0.2)).values())
    assert 0.17 < splits.count("test") / len(splits) < 0.23
    assert 0.07 < splits.count("val") / len(splits) < 0.13


def test_a_patient_falls_in_the_same_split_whoever_else_is_there() -> None:
    everybody = assign_splits(PATIENTS, SplitConfig())
    some = assign_splits(reversed(PATIENTS[200:300]), SplitConfig())
    assert all(everybody[patient] == split for patient, split in some.items())
    # Never to change: published splits depend on it.
    assert [everybody[patient] for patient in PATIENTS[:8]] == ["test"] + ["train"] * 7


def test_more_validation_takes_nobody_from_the_test() -> None:
    few, many = (assign_splits(PATIENTS, SplitConfig(val=val)) for val in (0.0, 0.5))
    assert [p for p in few if few[p] == "test"] == [p for p in many if many[p] == "test"]
    assert "val" not in few.values()


@pytest.mark.parametrize("count", range(2, 12))
def test_few_patients_leave_somebody_to_train_and_to_test(count: int) -> None:
    for start in range(0, 1000, 25):
        splits = assign_splits(PATIENTS[start : start + count], SplitConfig(val=0.4, test=0.2))
        assert {"train", "test"} <= set(splits.values())


def test_one_patient_alone_trains() -> None:
    for patient in PATIENTS[:30]:
        assert assign_splits([patient, patient], SplitConfig(test=0.9, val=0.05)) == {
            patient: "train"
        }
    assert assign_splits([], SplitConfig()) == {}


def test_under_ten_patients_is_indicative() -> None:
    assert is_indicative(9)
    assert not is_indicative(10)
