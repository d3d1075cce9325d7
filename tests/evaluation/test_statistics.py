import numpy as np
import pytest
from scipy import stats

from raysynth.evaluation.statistics import (
    clopper_pearson,
    cohen_kappa,
    d_prime,
    fleiss_kappa,
    holm,
    rank_sum,
    signed_rank,
    tost,
    tost_answers,
    tost_power,
    tost_share,
)


def test_the_smallest_exact_p_values() -> None:
    low, high = np.arange(10), np.arange(10) + 100
    assert rank_sum(high, low).p == pytest.approx(2 / 184_756)  # 1.08e-5
    assert signed_rank(high + low, low).p == pytest.approx(2 / 1024)  # 1.95e-3


@pytest.mark.parametrize(("against", "ways"), [([3], 10), ([4, 6], 86), ([18], 506)])
def test_published_p_values_are_signed_ranks_of_20_pairs(against: list[int], ways: int) -> None:
    ranks = np.arange(1.0, 21)
    signs = np.where(np.isin(ranks, against), -1, 1)
    assert signed_rank(ranks * signs, np.zeros(20)).p == pytest.approx(ways / 2**20, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(3, 4), (7, 5), (10, 10)])
def test_rank_sum_is_scipys_exact_one(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=n) + 0.7, rng.normal(size=m)
    found = rank_sum(x, y)
    expected = stats.mannwhitneyu(x, y, method="exact")
    assert found.p == pytest.approx(expected.pvalue)
    assert found.effect == pytest.approx(2 * expected.statistic / (n * m) - 1)
    assert found.method.startswith("exact")


def test_ties_count_as_all_rearrangements_of_the_values_do() -> None:
    from itertools import combinations

    x, y = [1, 2, 2, 5], [2, 3, 3, 5, 5]
    ranks = stats.rankdata(x + y)
    sums = np.array([ranks[list(chosen)].sum() for chosen in combinations(range(9), 4)])
    far = np.abs(sums - sums.mean()) >= abs(ranks[:4].sum() - sums.mean()) - 1e-9
    assert rank_sum(x, y).p == pytest.approx(far.mean())


def test_effects_point_to_the_larger_sample() -> None:
    assert rank_sum([2, 3], [0, 1]).effect == 1
    assert rank_sum([0, 1], [2, 3]).effect == -1
    assert rank_sum([1, 1], [1, 1]).effect == 0
    assert signed_rank([2, 3, 4], [1, 1, 1]).effect == 1
    assert signed_rank([1, 5], [2, 1]).effect == pytest.approx((2 - 1) / 3)


def test_pairs_without_a_difference_are_left_out() -> None:
    assert signed_rank([1, 2, 3, 9], [1, 1, 1, 1]).n == 3
    assert signed_rank([1, 2], [1, 2]).p == 1


def test_large_samples_name_the_approximation() -> None:
    rng = np.random.default_rng(0)
    found = rank_sum(rng.normal(size=80), rng.normal(size=80))
    assert "approximation" in found.method
    assert 0.05 < found.p <= 1


@pytest.mark.parametrize(("x", "y"), [([], [1.0]), ([np.nan], [1.0])])
def test_no_test_of_nothing(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="rank"):
        rank_sum(x, y)


def test_holm_by_hand() -> None:
    # Sorted .01, .03, .04: times 3, 2, 1 is .03, .06, .04; the last may not fall below .06.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (3, 10), (10, 10), (1, 500)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_clopper_pearson_is_scipys(successes: int, count: int, level: float) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(level, method="exact")
    assert clopper_pearson(successes, count, level) == pytest.approx((expected.low, expected.high))


def test_equivalence_needs_answers_and_not_only_a_small_difference() -> None:
    assert tost_share(10, 20, 0.1).verdict == "not shown"
    assert tost_share(500, 1000, 0.1).verdict == "equivalent"
    assert tost_share(900, 1000, 0.1).verdict == "different"


def test_a_small_certain_difference_is_equivalent() -> None:
    draws = np.random.default_rng(0).normal(0.05, 0.01, 2000)
    found = tost(0.05, draws, 0.1)
    assert found.verdict == "equivalent"
    assert found.interval95[0] > 0
    assert tost(0.05, draws, 0.04).verdict == "different"
    assert tost(0.05, (draws - 0.05) * 20 + 0.05, 0.1).verdict == "not shown"


def test_214_answers_show_equivalence_four_times_in_five() -> None:
    assert tost_answers(0.1) == 214
    assert tost_power(214, 0.1) == pytest.approx(0.8, abs=0.002)
    assert tost_power(10, 0.1) == 0
    answers = np.arange(215)
    shown = np.array([tost_share(int(k), 214, 0.1).verdict == "equivalent" for k in answers])
    power = stats.binom.pmf(answers, 214, 0.5)[shown].sum()
    assert power == pytest.approx(0.8, abs=0.04)  # exact intervals are a little wider


def test_d_prime_is_the_distance_of_two_normals() -> None:
    hit, alarm = stats.norm.cdf(0.5), stats.norm.cdf(-0.7)
    n = 10_000_000
    found = d_prime(round(n * hit), round(n * (1 - hit)), round(n * alarm), round(n * (1 - alarm)))
    assert found.value == pytest.approx(1.2, abs=1e-4)
    assert found.interval[0] < 1.2 < found.interval[1]


def test_d_prime_of_guesses_and_of_perfect_readers() -> None:
    assert d_prime(10, 10, 10, 10).value == 0
    perfect = d_prime(20, 0, 0, 20)
    assert perfect.value == pytest.approx(2 * stats.norm.ppf(20.5 / 21))
    assert perfect.interval[0] > 0


def test_the_interval_of_d_prime_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        hits, alarms = rng.binomial(100, stats.norm.cdf([0.6, -0.4]))
        low, high = d_prime(int(hits), 100 - int(hits), int(alarms), 100 - int(alarms)).interval
        covered += low <= 1 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_cohens_kappa_by_hand() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: (.7 - .5) / .5.
    one = [1] * 25 + [0] * 25
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa([1, 1], [1, 1]) == 1


def test_fleiss_kappa_of_his_own_example() -> None:
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[3, 0], [0, 3]]) == 1
    assert fleiss_kappa([[3, 0], [1, 0]]) == 1  # one answer alone agrees with none


def test_agreement_needs_two_readers() -> None:
    with pytest.raises(ValueError, match="two readers"):
        fleiss_kappa([[1, 0], [0, 1]])
