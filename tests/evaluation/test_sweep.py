"""The rule that chooses a guidance scale."""

from __future__ import annotations

from raysynth.evaluation.intervals import Figure
from raysynth.evaluation.sweep import rank


def _figures(**values: float) -> dict[str, Figure]:
    return {name: Figure(value, None) for name, value in values.items()}


PATIENTS = _figures(ms_ssim=0.5)


def test_the_best_mean_rank_is_chosen() -> None:
    scales, chosen = rank(
        {
            5.0: _figures(fid=3, kid=0.3, ms_ssim=0.9, kappa=0.6, found=0.9),
            1.0: _figures(fid=2, kid=0.1, ms_ssim=0.2, kappa=0.1, found=0.3),
            3.0: _figures(fid=1, kid=0.2, ms_ssim=0.4, kappa=0.5, found=0.9),
        },
        PATIENTS,
    )
    assert [one.scale for one in scales] == [1, 3, 5]
    # Neither the most nor the least alike is best, but what is as alike as patients are.
    assert [one.ranks["diversity"] for one in scales] == [2, 1, 3]
    assert [one.ranks["quality"] for one in scales] == [1.5, 1.5, 3]
    assert [one.ranks["consistency"] for one in scales] == [3, (2 + 1.5) / 2, (1 + 1.5) / 2]
    assert chosen == 3
    assert [one.mean_rank for one in scales] == [6.5 / 3, 4.25 / 3, 7.25 / 3]


def test_equal_ranks_choose_the_smaller_scale() -> None:
    _, chosen = rank({7.0: _figures(found=0.5), 2.0: _figures(found=0.5)}, {})
    assert chosen == 2


def test_what_cannot_be_compared_ranks_nothing() -> None:
    figures = {1.0: _figures(ms_ssim=0.4, kappa=0.1), 3.0: _figures(ms_ssim=0.5)}
    scales, chosen = rank(figures, {})
    assert chosen is None
    assert all(one.ranks == {} and one.mean_rank is None for one in scales)
    scales, _ = rank(figures, PATIENTS)
    assert [set(one.ranks) for one in scales] == [{"diversity"}] * 2
