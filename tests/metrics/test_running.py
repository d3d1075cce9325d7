import numpy as np
import pytest

from raysynth.metrics.kernel import cubic_mmd2
from raysynth.metrics.running import RunningFeatures, RunningKernel

DIM = 16


def _features(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def _filled(features: np.ndarray, order: np.ndarray, max_kept: int = 100) -> RunningFeatures:
    running = RunningFeatures(DIM, max_kept)
    for rows in np.array_split(order, 7):
        running.update(rows, features[rows])
    return running


def test_what_is_kept_depends_on_neither_order_nor_grouping() -> None:
    features, rng = _features(1000), np.random.default_rng(1)
    one, other = (_filled(features, rng.permutation(1000)) for _ in range(2))
    assert len(one.rows) == 100
    assert not one.are_all_kept
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.features, features[one.rows])
    # A random part: neither the first ones nor the last.
    assert 350 < one.rows.mean() < 650
    merged = RunningFeatures(DIM, 100)
    for rows in np.array_split(rng.permutation(1000), 8):
        merged.merge(_filled(features, rows))
    assert np.array_equal(merged.features, one.features)
    for expected, found in zip(one.moments.compute(), merged.moments.compute(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_kernel_that_follows_equals_the_one_computed_anew() -> None:
    real, features = _features(300), _features(900, seed=1) + np.float32(0.2)
    kernel = RunningKernel(real)
    rng = np.random.default_rng(2)
    for size in (5, 40, 700, 300, 900):
        rows = rng.permutation(900)[:size]
        kernel.follow(rows, features[rows])
        value, std = kernel.distance()
        assert value == pytest.approx(cubic_mmd2(real, features[rows]), rel=1e-9, abs=1e-12)
        assert std > 0


def test_the_standard_error_is_the_spread_over_sets_of_samples() -> None:
    real, values, errors = _features(400), [], []
    for seed in range(60):
        kernel = RunningKernel(real)
        kernel.follow(np.arange(150), _features(150, seed=100 + seed) + np.float32(0.3))
        value, std = kernel.distance()
        values.append(value)
        errors.append(std)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)
