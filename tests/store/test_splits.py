"""The same patient falls in the same split, and few patients still leave one to test."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.config.data import SplitConfig
from raysynth.errors import InputError
from raysynth.store.splits import assign_splits, is_indicative, listed_splits

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


def test_a_table_decides_for_everybody(tmp_path: Path) -> None:
    table = tmp_path / "splits.csv"
    table.write_text("patient,split,note\nb,test,\na,train,old\nc,val,\nd,train,\na,train,again\n")
    assert listed_splits(["a", "b", "c", "b"], table) == {"a": "train", "b": "test", "c": "val"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("who,split\na,train\n", "give the columns patient and split"),
        ("patient,split\na,training\n", "line 2: give a patient, and train, val or test"),
        ("patient,split\n,train\n", "line 2: give a patient"),
        ("patient,split\na,train\na,test\n", "line 3: the same patient is in two splits"),
        ("patient,split\nsecret,train\n", "does not name 1 of 2 patients"),
        ("", "give the columns patient and split"),
        (None, "cannot be read"),
    ],
)
def test_a_table_that_does_not_say_is_refused(text: str | None, why: str, tmp_path: Path) -> None:
    table = tmp_path / "splits.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(InputError, match=why) as refused:
        listed_splits(["secret", "hidden"], table)
    assert "hidden" not in str(refused.value)
