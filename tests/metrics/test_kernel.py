import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch_fidelity.metric_kid import kid_features_to_metric

from raysynth.errors import InputError
from raysynth.metrics.frechet import frechet_distance_of
from raysynth.metrics.kernel import (
    FeatureTable,
    cubic_mmd2,
    gaussian_mmd2,
    kernel_distance,
    median_distance,
)


def _naive_mmd2(x: np.ndarray, y: np.ndarray, kernel) -> float:
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = sum(kernel(a, b) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def test_mmd_equals_the_published_double_loop() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(8, 3)) + 0.5
    pool = np.concatenate([x, y])
    distances = torch.tensor([[np.linalg.norm(a - b) for b in pool] for a in pool])
    median = float(distances.median())  # torch's median is the lower one, diagonal included
    assert median_distance(pool) == pytest.approx(median, rel=1e-12)
    expected = _naive_mmd2(x, y, lambda a, b: np.exp(-np.sum((a - b) ** 2) / median**2))
    assert gaussian_mmd2(x, y) == pytest.approx(expected, rel=1e-10)
    fixed = _naive_mmd2(x, y, lambda a, b: np.exp(-np.sum((a - b) ** 2) / 4))
    assert gaussian_mmd2(x, y, bandwidth=2.0) == pytest.approx(fixed, rel=1e-10)


def test_mmd_approaches_its_closed_form_on_gaussians() -> None:
    # For N(0, 1) and N(a, 1) in one dimension with exp(-d^2 / s^2):
    # E k = s / sqrt(s^2 + 4) * exp(-a^2 / (s^2 + 4)).
    shift, bandwidth = 1.0, 1.5
    x = norm.ppf((np.arange(1000) + 0.5) / 1000)[:, None]  # quantiles: no sampling error
    y = x[::-1] + shift
    wide = bandwidth**2 + 4
    expected = 2 * bandwidth / np.sqrt(wide) * (1 - np.exp(-(shift**2) / wide))
    assert gaussian_mmd2(x, y, bandwidth) == pytest.approx(expected, rel=0.02)


def test_kid_agrees_with_torch_fidelity_on_the_same_subsets() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(90, 16)), rng.normal(size=(70, 16)) * 1.1 + 0.2
    ours = kernel_distance(x, y, num_subsets=12, subset_size=40, seed=5)
    theirs = kid_features_to_metric(
        *map(torch.from_numpy, (x, y)),
        kid_subsets=12,
        kid_subset_size=40,
        rng_seed=5,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1.0,
        verbose=False,
    )
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)
    naive = _naive_mmd2(x[:6], y[:5], lambda a, b: (a @ b / 16 + 1) ** 3)
    assert cubic_mmd2(x[:6], y[:5]) == pytest.approx(naive, rel=1e-10)


def test_kid_is_unbiased_where_fid_is_not() -> None:
    """The true distance of two sets from one distribution is 0, however few they are."""
    rng = np.random.default_rng(3)
    pairs = rng.normal(size=(300, 2, 12, 4))
    kid = [cubic_mmd2(x, y) for x, y in pairs]
    assert abs(np.mean(kid)) < 3 * np.std(kid) / np.sqrt(len(kid))
    fid = [frechet_distance_of(x, y) for x, y in pairs]
    assert np.mean(fid) > 30 * np.std(fid) / np.sqrt(len(fid))


@pytest.mark.parametrize("num_parts", [1, 8, 64])
def test_a_table_does_not_depend_on_the_order_of_workers(num_parts: int) -> None:
    rng = np.random.default_rng(4)
    features = rng.normal(size=(200, 3)).astype(np.float32)
    merged = FeatureTable()
    parts = np.array_split(np.arange(200), num_parts)
    for part in rng.permutation(num_parts):
        worker = FeatureTable()
        worker.update(parts[part], features[parts[part]])
        merged.merge(worker)
    rows, found = merged.compute()
    np.testing.assert_array_equal(rows, np.arange(200))
    np.testing.assert_array_equal(found, features)


def test_what_means_nothing_is_refused() -> None:
    one, many = np.zeros((1, 3)), np.arange(30.0).reshape(10, 3)
    with pytest.raises(InputError, match="KID needs at least 2 samples a side, got 1"):
        kernel_distance(one, many)
    with pytest.raises(InputError, match="KID needs at least 2 samples a side, got 1"):
        cubic_mmd2(many, one)
    with pytest.raises(InputError, match="MMD needs at least 2 samples a side, got 1"):
        gaussian_mmd2(many, one)
    with pytest.raises(InputError, match="bandwidth is 0: it must be above 0"):
        gaussian_mmd2(np.zeros((5, 3)), np.zeros((5, 3)))
    many[3] = np.nan
    with pytest.raises(InputError, match=r"1 of 10 samples are not finite .* sample 3"):
        median_distance(many)
