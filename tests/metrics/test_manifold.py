import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from raysynth.errors import InputError
from raysynth.metrics import manifold
from raysynth.metrics.manifold import ManifoldOverlap, manifold_overlap


def _clouds(n: int, m: int, dim: int, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dim, dim))
    return rng.normal(size=(n, dim)) @ mixing, rng.normal(size=(m, dim)) @ mixing * 0.8 + shift


def _by_definition(real: np.ndarray, synthetic: np.ndarray, k: int) -> ManifoldOverlap:
    """Written from the papers, pair by pair."""

    def radius(one: np.ndarray, others: np.ndarray) -> float:
        return sorted(np.linalg.norm(one - other) for other in others)[k]  # [0] is itself

    real_radius = [radius(x, real) for x in real]
    synthetic_radius = [radius(y, synthetic) for y in synthetic]
    inside = np.array(
        [
            [np.linalg.norm(x - y) <= r for y in synthetic]
            for x, r in zip(real, real_radius, strict=True)
        ]
    )
    outside = [
        [np.linalg.norm(x - y) <= r for y, r in zip(synthetic, synthetic_radius, strict=True)]
        for x in real
    ]
    return ManifoldOverlap(
        precision=np.mean(inside.any(axis=0)),
        recall=np.mean(np.any(outside, axis=1)),
        density=inside.sum() / (k * len(synthetic)),
        coverage=np.mean(inside.any(axis=1)),
    )


@pytest.mark.parametrize(("n", "m", "k"), [(40, 30, 5), (25, 60, 3), (6, 6, 5)])
@pytest.mark.parametrize("block_bytes", [1, 2000, manifold.BLOCK_BYTES])
def test_blocks_of_any_height_equal_the_definition(
    n: int, m: int, k: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifold, "BLOCK_BYTES", block_bytes)
    real, synthetic = _clouds(n, m, 4)
    assert manifold_overlap(real, synthetic, k) == _by_definition(real, synthetic, k)


def test_points_on_a_line_are_counted_by_hand() -> None:
    # Balls of k = 1 reach to the next point, border included. Real ones: [-1, 1], [0, 2], [7, 13]
    # and [10, 16]; synthetic ones: [1, 3], [2, 4] and [3, 77].
    real = np.array([[0.0], [1.0], [10.0], [13.0]])
    synthetic = np.array([[2.0], [3.0], [40.0]])
    found = manifold_overlap(real, synthetic, num_neighbours=1)
    # 2 lies on the border of the ball around 1, and no other synthetic point in any ball.
    assert found.precision == pytest.approx(1 / 3)
    assert found.density == pytest.approx(1 / 3)
    assert found.coverage == pytest.approx(1 / 4)
    # The ball around 40 reaches down to 3, that around 2 to 1.
    assert found.recall == pytest.approx(3 / 4)


def test_a_set_overlaps_itself_and_nothing_far_away() -> None:
    real, _ = _clouds(200, 1, 8)
    same = manifold_overlap(real, real.copy())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx(6 / 5)  # of each ball its centre and its five neighbours
    far = manifold_overlap(real, real + 1e4)
    assert far == ManifoldOverlap(0, 0, 0, 0)


def test_samples_of_one_distribution_reach_what_the_papers_say() -> None:
    real, synthetic = np.random.default_rng(1).normal(size=(2, 2000, 16))
    found = manifold_overlap(real, synthetic)
    assert found.density == pytest.approx(1, abs=0.05)
    # Naeem et al. 2020, expectation of coverage: 1 - (N-1)...(N-k) / ((2N-1)...(2N-k)) at M = N.
    k, n = 5, 2000
    steps = np.arange(1, k + 1)
    assert found.coverage == pytest.approx(1 - np.prod((n - steps) / (2 * n - steps)), abs=0.01)


def test_dropped_modes_cost_coverage_and_recall_but_no_precision() -> None:
    real, synthetic = np.random.default_rng(2).normal(size=(2, 600, 8))
    real[::2] += 30
    found = manifold_overlap(real, synthetic)
    assert found.precision > 0.9
    assert found.recall < 0.55
    assert found.coverage < 0.55


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dim", [4, 300])
def test_precision_and_recall_are_those_of_torch_fidelity(k: int, dim: int) -> None:
    # One definition: it too counts the border, and finds the sample itself as its 0th neighbour.
    # Its default k is 3, and it knows neither density nor coverage.
    real, synthetic = _clouds(300, 250, dim)
    judged = prc_features_to_metric(
        torch.from_numpy(synthetic),
        torch.from_numpy(real),
        prc_neighborhood=k,
        prc_batch_size=100,
        save_cpu_ram=True,
        verbose=False,
    )
    found = manifold_overlap(real, synthetic, k)
    assert found.precision == pytest.approx(judged["precision"], abs=1e-6)
    assert found.recall == pytest.approx(judged["recall"], abs=1e-6)


def test_what_means_nothing_is_refused() -> None:
    real, synthetic = _clouds(20, 20, 3)
    with pytest.raises(InputError, match="needs at least 6 samples a side, got 5"):
        manifold_overlap(real, synthetic[:5])
    with pytest.raises(InputError, match="3 and 2 features a sample"):
        manifold_overlap(real, synthetic[:, :2])
    synthetic[[4, 7], 1] = np.nan
    with pytest.raises(InputError, match=r"2 of 20 samples are not finite .* sample 4"):
        manifold_overlap(real, synthetic)
