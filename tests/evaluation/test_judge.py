from dataclasses import replace

import numpy as np
import pytest

from raysynth.evaluation.intervals import Arm
from raysynth.evaluation.judge import OVERLAP, Arms, MetricResult, judge
from raysynth.metrics.frechet import frechet_distance_of

PATIENTS, PER_PATIENT, DIM = 12, 20, 6
PLACE = ("all", "ct-conv@1")


def _real(seed: int = 0) -> Arm:
    rng = np.random.default_rng(seed)
    of_patient = np.repeat(rng.normal(size=(PATIENTS, DIM)) * 0.3, PER_PATIENT, axis=0)
    features = of_patient + rng.normal(size=of_patient.shape)
    return Arm(features.astype(np.float32), np.repeat(np.arange(PATIENTS), PER_PATIENT))


def _moved(arm: Arm, shift: float) -> Arm:
    return Arm(arm.features + np.float32(shift), arm.patients)


def _arms(**judged: Arm) -> Arms:
    real = _real()
    return Arms(real, real.take(real.patients >= 8), judged)


def _perfect() -> Arm:
    """What a perfect generator would draw: like the patients that are not the reference."""
    real = _real()
    return real.take(real.patients < 8)


@pytest.fixture(scope="module")
def results() -> dict[str, MetricResult]:
    good = _perfect()
    arms = _arms(synthetic=good, untrained=_moved(good, 3), shuffled=_moved(good, 1))
    return judge(PLACE, arms, num_draws=60, seed=0)


def test_every_metric_has_its_key_and_one_n(results: dict[str, MetricResult]) -> None:
    assert set(results) == {
        f"{name}/slice/all/ct-conv@1/80" for name in ("fid", "kid", "mmd2", "mmd2_fixed", *OVERLAP)
    }
    for result in results.values():
        assert result.n == 80
        assert result.dim == DIM
        assert result.reference_patients == 4
        assert result.resampled == "patients"


def test_a_perfect_generator_is_at_the_floor_and_controls_are_not(
    results: dict[str, MetricResult],
) -> None:
    for key, result in results.items():
        floor = result.columns["floor"].interval
        assert floor is not None, key
        low, high = floor
        assert low - (high - low) <= result.value <= high + (high - low), key
        beside = {name: column.value for name, column in result.columns.items()}
        if key.startswith(OVERLAP):  # samples that moved a little lie in the same balls
            assert result.value > beside["untrained"], key
            continue
        assert result.value < beside["shuffled"] < beside["untrained"], key
        assert result.disjoint == {"untrained": True, "shuffled": True, "floor": False}, key
        assert result.interval[0] <= result.value <= result.interval[1], key


def test_fid_is_the_plain_one_and_has_a_limit_below_it() -> None:
    arms = _arms(synthetic=_perfect().take(np.arange(80)))
    result = judge(PLACE, arms, num_draws=10, seed=0)["fid/slice/all/ct-conv@1/80"]
    expected = frechet_distance_of(arms.reference.features, arms.judged["synthetic"].features)
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert result.limit is not None
    assert result.limit < result.value
    assert set(result.columns) == {"floor"}


def test_fewer_control_samples_are_compared_at_their_own_number() -> None:
    few = _perfect().take(np.arange(30))
    results = judge(PLACE, _arms(synthetic=_perfect(), untrained=few), num_draws=10, seed=0)
    assert "untrained" in results["fid/slice/all/ct-conv@1/30"].columns
    assert "untrained" not in results["fid/slice/all/ct-conv@1/80"].columns


def test_the_same_inputs_give_the_same_figures() -> None:
    arms = _arms(synthetic=_perfect())
    assert judge(PLACE, arms, 10, seed=3) == judge(PLACE, arms, 10, seed=3)


def test_one_patient_a_side_still_works_and_two_samples_do_not() -> None:
    real = _real().take(np.arange(3 * PER_PATIENT))
    arms = Arms(real, real.take(real.patients == 0), {"synthetic": _perfect()})
    (fid, *_) = judge(PLACE, arms, num_draws=10, seed=0).values()
    assert fid.reference_patients == 1
    assert fid.resampled == "samples"
    assert fid.columns["floor"].interval is None
    arms = Arms(real, real.take(np.arange(2)), {"synthetic": _perfect()})
    assert judge(PLACE, arms, num_draws=10, seed=0) == {}


def test_histograms_are_judged_by_how_far_intensities_moved() -> None:
    counts = np.zeros((PATIENTS * PER_PATIENT, 240), np.float32)
    counts[:, 30:40] = 5
    real = Arm(counts, np.repeat(np.arange(PATIENTS), PER_PATIENT))
    moved = Arm(np.roll(counts, 7, axis=1), real.patients)
    arms = Arms(real, real.take(real.patients >= 8), {"synthetic": moved})
    results = judge(("lung", "histogram@1"), arms, num_draws=10, seed=0)
    assert results["hu_w1/slice/lung/histogram@1/80"].value == pytest.approx(70)


def test_neighbours_are_compared_with_their_own_slices() -> None:
    arms = _arms(synthetic=_perfect())
    first = arms.reference.take(np.arange(0, 80, 2))
    arms = replace(arms, neighbours=(first, _moved(first, 0.01)))
    results = judge(PLACE, arms, num_draws=10, seed=0)
    assert {result.n for result in results.values()} == {40, 80}
    near = results["fid/slice/all/ct-conv@1/40"]
    assert near.columns["neighbour"].value < 0.01 * near.columns["floor"].value
    assert "neighbour" not in results["fid/slice/all/ct-conv@1/80"].columns


def test_of_too_few_samples_there_is_no_overlap() -> None:
    real = _real().take(np.arange(0, PATIENTS * PER_PATIENT, 10))  # two of each patient
    arms = Arms(real, real.take(real.patients >= 8), {"synthetic": _perfect()})
    results = judge(PLACE, arms, num_draws=10, seed=0)
    assert {key.partition("/")[0] for key in results} == {"fid", "kid", "mmd2", "mmd2_fixed"}
