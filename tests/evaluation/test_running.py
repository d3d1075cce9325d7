"""Metrics that run along: neither order nor grouping nor repeats change them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from raysynth.case import Label
from raysynth.errors import InputError
from raysynth.evaluation.regions import cut_regions
from raysynth.evaluation.running import Reference, RunningMetrics
from raysynth.metrics.features import CtConv
from raysynth.metrics.frechet import frechet_distance_of
from raysynth.metrics.kernel import cubic_mmd2
from tests.evaluation.equal_values import assert_equal_values

COUNT, SIZE = 320, 24
EXTRACTORS = (CtConv(),)
ALL = ("all", "ct-conv@1")


def _samples(shift_hu: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with a lung that every second slice shows a nodule in."""
    rng = np.random.default_rng(seed)
    level = rng.integers(-900, 0, (COUNT, 3, 3)).repeat(8, 1).repeat(8, 2)
    hu = (level + rng.integers(-99, 99, (COUNT, SIZE, SIZE)) + shift_hu).astype(np.int16)
    layout = np.full(hu.shape, Label.BODY, np.uint8)
    layout[:, 4:20, 4:20] = Label.LEFT_LUNG
    box = np.full((COUNT, 4), -1, np.int16)
    box[::2] = (8, 8, 14, 14)
    return hu, layout, box


REAL, SYNTHETIC = _samples(0, 0), _samples(200, 1)
PATIENTS = np.arange(COUNT) // 40


def _counted(
    rows: NDArray[np.int64], samples: tuple[np.ndarray, ...] = SYNTHETIC, max_kept: int = 4096
) -> RunningMetrics:
    metrics = RunningMetrics(max_kept)
    for part in np.array_split(rows, max(1, len(rows) // 30)):
        metrics.update(part, *(array[part] for array in samples), EXTRACTORS)
    return metrics


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(_counted(np.arange(COUNT), REAL), PATIENTS)


@pytest.fixture(scope="module")
def whole() -> RunningMetrics:
    return _counted(np.arange(COUNT))


def test_values_are_those_of_the_plain_functions(
    whole: RunningMetrics, reference: Reference
) -> None:
    values = whole.compute(reference)
    assert set(values) == {
        f"{metric}/slice/{region}/ct-conv@1"
        for metric in ("fid", "kid")
        for region in ("all", "lung", "nodule16")
    }
    for region in ("all", "lung", "nodule16"):
        x, y = (EXTRACTORS[0](cut_regions(*side)[region].hu) for side in (REAL, SYNTHETIC))
        fid, kid = (values[f"{metric}/slice/{region}/ct-conv@1"] for metric in ("fid", "kid"))
        assert fid.value == pytest.approx(frechet_distance_of(x, y), rel=1e-9)
        assert kid.value == pytest.approx(cubic_mmd2(x, y), rel=1e-9)
        assert (fid.n, fid.n_reference) == (len(y), len(x))
        assert kid.std is not None
        assert kid.std > 0
    floor = values["fid/slice/all/ct-conv@1"]
    assert floor.floor_n == COUNT // 2
    assert floor.floor is not None
    assert floor.floor < floor.value


@pytest.mark.parametrize("max_kept", [4096, 100])
@pytest.mark.parametrize("num_parts", [1, 8, 64])
def test_parts_in_any_order_merge_to_the_whole(
    num_parts: int, max_kept: int, reference: Reference
) -> None:
    """Also where not every feature is kept, and FID comes from moments."""
    rng = np.random.default_rng(num_parts)
    merged = RunningMetrics(max_kept)
    for rows in np.array_split(rng.permutation(COUNT), num_parts):
        part = _counted(rows, max_kept=max_kept)
        merged.merge(part)
        merged.merge(part)  # a part that comes twice counts once
    assert merged.count == COUNT
    expected = _counted(np.arange(COUNT), max_kept=max_kept).compute(reference)
    assert_equal_values(merged.compute(reference), expected)
    assert expected["kid/slice/all/ct-conv@1"].n == min(COUNT, max_kept)
    assert expected["fid/slice/all/ct-conv@1"].n == COUNT


def test_samples_that_come_again_are_ignored(whole: RunningMetrics, reference: Reference) -> None:
    metrics = _counted(np.arange(200))
    twice = np.array([7, 7, 250, 199])
    arguments = (twice, *(array[twice] for array in SYNTHETIC), EXTRACTORS)
    assert metrics.update(*arguments) == 1
    assert metrics.update(*arguments) == 0
    rest = np.arange(100, COUNT)
    assert metrics.update(rest, *(array[rest] for array in SYNTHETIC), EXTRACTORS) == 119
    assert_equal_values(metrics.compute(reference), whole.compute(reference))


def test_parts_that_share_some_samples_are_refused() -> None:
    metrics = _counted(np.arange(40))
    with pytest.raises(InputError, match="10 of 30 samples to merge are counted already"):
        metrics.merge(_counted(np.arange(30, 60)))
    assert metrics.count == 40


def test_values_along_the_way_equal_those_computed_anew(reference: Reference) -> None:
    metrics, kernels = RunningMetrics(100), {}
    for rows in np.array_split(np.random.default_rng(0).permutation(COUNT), 9):
        metrics.update(rows, *(array[rows] for array in SYNTHETIC), EXTRACTORS)
        along = metrics.compute(reference, [ALL], kernels)
        anew = metrics.compute(reference)
        assert_equal_values(along, {key: anew[key] for key in along})


def test_a_saved_state_goes_on_where_it_was(whole: RunningMetrics, reference: Reference) -> None:
    saved = _counted(np.arange(150)).save("mark")
    metrics = RunningMetrics.load(saved, "mark")
    assert metrics.save("mark") == saved
    rest = np.arange(COUNT)
    assert metrics.update(rest, *(array[rest] for array in SYNTHETIC), EXTRACTORS) == COUNT - 150
    assert_equal_values(metrics.compute(reference), whole.compute(reference))


def test_a_state_of_another_run_or_a_damaged_one_is_refused(whole: RunningMetrics) -> None:
    saved = whole.save("mark")
    with pytest.raises(InputError, match="is of mark, not of other"):
        RunningMetrics.load(saved, "other")
    flipped = bytearray(saved)
    flipped[len(flipped) // 2] ^= 1
    for broken in (b"", b"no npz", saved[: len(saved) // 2], bytes(flipped)):
        with pytest.raises(InputError, match="damaged"):
            RunningMetrics.load(broken, "mark")


def test_features_that_are_no_numbers_are_refused_and_nothing_is_counted() -> None:
    class Broken(CtConv):
        def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
            features = super().__call__(hu)
            features[min(3, len(features) - 1), 5] = np.nan
            return features

    metrics = _counted(np.arange(20))
    before = metrics.save("mark")
    rows = np.arange(20, 60)
    with pytest.raises(InputError, match=r"ct-conv@1 gives features of sample 23 that are no num"):
        metrics.update(rows, *(array[rows] for array in SYNTHETIC), (Broken(),))
    assert metrics.save("mark") == before


def test_too_few_samples_give_no_value(reference: Reference) -> None:
    assert _counted(np.arange(7)).compute(reference) == {}
    keys = _counted(np.arange(9)).compute(reference)  # five nodules among them
    assert {key.split("/")[2] for key in keys} == {"all", "lung"}
    assert RunningMetrics().compute(reference) == {}


def test_of_one_patient_there_is_no_floor(whole: RunningMetrics, reference: Reference) -> None:
    alone = Reference(reference.real, np.zeros(COUNT, np.int64))
    for value in whole.compute(alone).values():
        assert value.floor is None
        assert value.floor_n is None
