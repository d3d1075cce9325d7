"""Which real nodules count as one request."""

from __future__ import annotations

import numpy as np

from raysynth.evaluation.diversity import match_nodules


def test_nodules_match_by_scores_size_and_different_patients() -> None:
    scores = np.array([[5, 5], [4, 5], [5, 5], [3, 5], [5, 5], [np.nan, 5]])
    diameter_mm = np.array([9.0, 10.0, 20.0, 9.0, 9.5, 9.0])
    patients = np.array([0, 1, 2, 3, 0, 4])
    for seed in range(5):
        pairs = match_nodules(scores, diameter_mm, patients, seed)
        # 2 is too large, 5 has no score, 0 and 4 are of one patient; 3 is like 1 alone.
        assert {tuple(sorted(pair)) for pair in pairs.tolist()} <= {(0, 1), (1, 3), (1, 4)}
        assert len(pairs) == 1
    sizes_alone = match_nodules(scores[:, :0], diameter_mm, patients, 0)
    assert len(sizes_alone) == 2
    assert len(np.unique(sizes_alone)) == 4
    assert 2 not in sizes_alone
    assert match_nodules(scores[:0], diameter_mm[:0], patients[:0], 0).shape == (0, 2)
