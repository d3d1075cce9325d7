import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from raysynth.errors import InputError
from raysynth.metrics import frechet
from raysynth.metrics.frechet import (
    FeatureMoments,
    frechet_distance,
    frechet_distance_of,
    frechet_limit,
)


def _moments(*batches: np.ndarray) -> FeatureMoments:
    moments = FeatureMoments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments


def _exactly(mean: np.ndarray, scale: np.ndarray) -> FeatureMoments:
    """Moments of a Gaussian with this mean and these standard deviations, without sampling."""
    moments = FeatureMoments(len(mean))
    moments.count, moments.mean, moments.scatter = 2, mean, np.diag(scale**2)
    return moments


def test_closed_form_of_gaussians_with_diagonal_covariances() -> None:
    mean_r, mean_s = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, -1.0])
    scale_r, scale_s = np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.5, 1.0])
    expected = np.sum((mean_r - mean_s) ** 2) + np.sum((scale_r - scale_s) ** 2)
    distance = frechet_distance(_exactly(mean_r, scale_r), _exactly(mean_s, scale_s))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_agrees_with_torch_fidelity_on_the_same_features() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(24, 24))
    x = rng.normal(size=(300, 24)) @ mixing
    y = rng.normal(size=(250, 24)) @ mixing * 1.2 + 0.3
    statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)]
    judged = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(_moments(x), _moments(y)) == pytest.approx(judged, abs=1e-6)
    assert frechet_distance_of(x, y) == pytest.approx(judged, abs=1e-6)


def test_agrees_with_monai_while_that_runs() -> None:
    from monai.metrics.fid import get_fid_score

    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(200, 12)), rng.normal(size=(150, 12)) * 1.2 + 0.3
    try:
        expected = get_fid_score(torch.from_numpy(y), torch.from_numpy(x)).item()
    except (TypeError, AttributeError) as error:
        pytest.skip(f"MONAI's FID asks scipy for what it no longer has: {error}")
    assert frechet_distance_of(x, y) == pytest.approx(expected, rel=1e-6)


def test_fewer_samples_than_dimensions_agree_both_ways() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 64)), rng.normal(size=(31, 64)) + 0.2
    of_features = frechet_distance_of(x, y)
    assert frechet_distance(_moments(x), _moments(y)) == pytest.approx(of_features, rel=1e-6)
    assert frechet_distance_of(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num_parts", [1, 8, 64])
def test_merging_parts_in_any_order_equals_the_whole(num_parts: int) -> None:
    rng = np.random.default_rng(2)
    features = (rng.normal(size=(1000, 16)) * 5 + 100).astype(np.float32)
    merged = FeatureMoments(16)
    parts = np.array_split(features, num_parts)
    for part in rng.permutation(num_parts):
        merged.merge(_moments(parts[part]))
    whole_mean, whole_covariance = _moments(features).compute()
    mean, covariance = merged.compute()
    np.testing.assert_allclose(mean, whole_mean, rtol=1e-12)
    np.testing.assert_allclose(covariance, whole_covariance, rtol=1e-9, atol=1e-9)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9, atol=1e-9)


def test_moments_of_another_worker_can_be_added_to() -> None:
    features = np.random.default_rng(8).normal(size=(60, 5))
    received = _moments(features[:40])
    received.mean.flags.writeable = received.scatter.flags.writeable = False  # as Ray hands it over
    received.update(features[40:])
    for found, expected in zip(received.compute(), _moments(features).compute(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_extrapolation_removes_most_of_the_small_sample_bias() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(400, 20)), rng.normal(size=(400, 20))
    limit = frechet_limit(x, y, seed=0)
    assert abs(limit.value) < 0.3 * frechet_distance_of(x, y)
    assert limit.slope > 0


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("n", "m"), [(300, 250), (300, 40), (60, 60), (61, 400)])
def test_every_spectrum_and_rank_agrees_with_the_square_root_of_a_matrix(
    n: int, m: int, power: float
) -> None:
    from scipy.linalg import sqrtm

    # A power of 4 leaves variances between 1 and 1e-14: the quick way steps aside there.
    rng, dim = np.random.default_rng(4), 60
    scale = np.arange(1.0, dim + 1) ** -power
    mixing = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    x = rng.normal(size=(n, dim)) * scale @ mixing
    y = (rng.normal(size=(m, dim)) * scale * 1.3 + scale) @ mixing
    shift, (one, other) = x.mean(0) - y.mean(0), (np.cov(f, rowvar=False) for f in (x, y))
    # The root of a singular product is inexact: its error is that of the square root of an ulp.
    root = sqrtm(one @ other + 1e-13 * np.eye(dim)).real
    expected = shift @ shift + np.trace(one + other) - 2 * np.trace(root)
    of_features = frechet_distance_of(x, y)
    assert of_features == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(_moments(x), _moments(y)) == pytest.approx(of_features, rel=1e-6)


@pytest.mark.parametrize("dim", [20, 400])
def test_the_exact_way_and_the_quick_one_agree(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    scale = np.arange(1.0, dim + 1) ** -0.5
    x, y = (rng.normal(size=(2 * dim, dim)) * scale for _ in range(2))
    quick = frechet_distance_of(x, y)
    monkeypatch.setattr(frechet, "PRECISION", 0.0)
    assert frechet_distance_of(x, y) == pytest.approx(quick, rel=1e-10)


def test_constant_features_do_no_harm() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(2, 200, 8))
    without = frechet_distance_of(x, y)
    x, y = (np.concatenate([side, np.ones((200, 3))], axis=1) for side in (x, y))
    assert frechet_distance_of(x, y) == pytest.approx(without, rel=1e-9)
    assert frechet_distance(_moments(x), _moments(y)) == pytest.approx(without, rel=1e-6)


def test_what_means_nothing_is_refused() -> None:
    one, many = np.zeros((1, 4)), np.zeros((9, 4))
    with pytest.raises(InputError, match="at least 2 samples a side, got 1"):
        _moments(one).compute()
    with pytest.raises(InputError, match="at least 2 samples a side, got 1"):
        frechet_distance_of(many, one)
    with pytest.raises(InputError, match="FID_inf needs at least 3 samples a side, got 2"):
        frechet_limit(many, many[:2], seed=0)
    with pytest.raises(InputError, match="4 and 3 features a sample"):
        frechet_distance_of(many, many[:, :3])
    with pytest.raises(InputError, match="4 and 3 features a sample"):
        frechet_distance(_moments(many), _moments(many[:, :3]))
    many[2, 1] = np.inf
    with pytest.raises(InputError, match=r"1 of 9 samples are not finite .* sample 2"):
        _moments(many)
    with pytest.raises(InputError, match=r"1 of 9 samples are not finite .* sample 2"):
        frechet_distance_of(np.zeros((9, 4)), many)
