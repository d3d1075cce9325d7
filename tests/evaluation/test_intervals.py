import numpy as np
import pytest
from scipy.stats import multivariate_normal, spearmanr

from raysynth.evaluation.intervals import (
    Arm,
    correlation,
    patient_splits,
    subsample_intervals,
    wilson,
)


def _arm(values: np.ndarray, samples_per_patient: int = 1) -> Arm:
    return Arm(values.astype(np.float32)[:, None], np.arange(len(values)) // samples_per_patient)


def _shift(real: np.ndarray, other: np.ndarray) -> tuple[float]:
    return (float(other.mean() - real.mean()),)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(120):
        real, other = _arm(rng.normal(size=60)), _arm(rng.normal(size=60) + 1)
        value = _shift(real.features, other.features)
        ((low, high),) = subsample_intervals(_shift, real, other, value, 60, seed=trial)
        covered += low <= 1 <= high
    assert 0.88 <= covered / 120 <= 0.99


def test_patients_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    of_patient = np.repeat(rng.normal(size=12), 20)
    values = of_patient + 0.1 * rng.normal(size=240)
    other = _arm(rng.normal(size=240))
    widths = []
    for samples_per_patient in (1, 20):
        real = _arm(values, samples_per_patient)
        ((low, high),) = subsample_intervals(_shift, real, other, (0.0,), 200, seed=0)
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_few_patients_fall_back_to_samples() -> None:
    assert _arm(np.zeros(30), samples_per_patient=10).resampled == "samples"
    assert _arm(np.zeros(40), samples_per_patient=10).resampled == "patients"


@pytest.mark.parametrize(("num_patients", "reference", "side"), [(3, 1, 1), (8, 3, 3), (4, 4, 2)])
def test_splits_share_no_patient(num_patients: int, reference: int, side: int) -> None:
    real = _arm(np.arange(num_patients * 5), samples_per_patient=5)
    splits = list(patient_splits(real.patients, reference, 20, seed=0))
    assert len(splits) == 20
    for split in splits:
        one, other = real.take(split), real.take(~split)
        assert len(np.unique(one.patients)) == side
        assert not set(one.patients) & set(other.patients)
        assert len(one) + len(other) == len(real)


def test_one_patient_cannot_be_split() -> None:
    assert not list(patient_splits(np.zeros(9, np.int64), 1, 20, seed=0))


def test_drawing_takes_no_sample_twice() -> None:
    arm = _arm(np.arange(50))
    drawn = arm.draw(20, np.random.default_rng(0))
    assert len(np.unique(drawn.features)) == 20
    assert arm.draw(80, np.random.default_rng(0)) is arm


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("pearson", [0.0, 0.6])
def test_the_interval_of_a_correlation_covers_it(pearson: float) -> None:
    truth = 6 / np.pi * np.arcsin(pearson / 2)  # of ranks, of normal variables (Pearson 1907)
    pairs = multivariate_normal.rvs(
        cov=np.array([[1, pearson], [pearson, 1]]), size=(400, 50), random_state=3
    )
    intervals = [correlation(float(spearmanr(drawn).statistic), 50) for drawn in pairs]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.98
    assert correlation(0.9, 3) == (-1.0, 1.0)
