from __future__ import annotations

import numpy as np
import pytest

from raysynth.case import CONDITION_ATTRIBUTES, CONDITION_COLUMNS
from raysynth.evaluation.consistency import (
    between_readers,
    mean_kappa,
    of_readers,
    of_requests,
    quadratic_kappa,
    train_judges,
)

SPHERICITY, TEXTURE = (CONDITION_ATTRIBUTES.index(name) for name in ("sphericity", "texture"))


def visible(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features that show the texture and nothing else, ratings by two readers, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(np.arange(1, 6), count, p=(0.1, 0.1, 0.1, 0.2, 0.5))
    features = rng.normal(size=(count, 12)).astype(np.float32)
    features[:, 3] += 2 * truth
    ratings = np.zeros((count, 4, 9), np.uint8)
    ratings[:, :2] = rng.integers(1, 6, (count, 1, 9))
    ratings[:, :2, CONDITION_COLUMNS[TEXTURE]] = truth[:, None]
    return features, ratings, truth


def test_kappa_has_its_closed_form() -> None:
    """Cohen (1968): equal scores 1, reversed ones -1, unrelated ones 0."""
    scores = np.array([1, 2, 3, 4, 5])
    assert quadratic_kappa(scores, scores) == 1
    assert quadratic_kappa(scores, scores[::-1]) == pytest.approx(-1)
    one, other = np.array([1, 1, 2, 2]), np.array([1, 2, 1, 2])
    assert quadratic_kappa(one, other) == pytest.approx(0)
    assert quadratic_kappa(np.array([3, 3]), np.array([3, 3])) == 0


def test_readers_agree_as_published() -> None:
    """Measured elsewhere on the same database, whose few ambiguous clusters make 0.003."""
    known = (0.246, 0.389, 0.352, 0.427, 0.589)
    assert list(between_readers().values()) == pytest.approx(known, abs=0.003)


def test_a_judge_reads_what_can_be_seen_and_nothing_else() -> None:
    features, ratings, _ = visible(600, seed=0)
    judges = train_judges(features, ratings)
    assert set(judges) == set(CONDITION_ATTRIBUTES)
    features, ratings, truth = visible(600, seed=1)
    real = of_readers(judges, features, ratings, seed=0)
    assert real["texture"].kappa > 0.85
    assert real["texture"].within_one > 0.9
    assert real["texture"].interval[0] > 0.8
    assert real["sphericity"].interval[0] < 0.05
    # The scores get the shares that they had in training.
    judged = judges["texture"](features)
    assert abs(np.mean(judged == 5) - np.mean(truth == 5)) < 0.05

    asked = np.zeros((600, 5), np.uint8)
    asked[:, TEXTURE] = truth
    told = of_requests(judges, features, asked, seed=0)
    assert set(told) == {"texture"}  # of the others nothing was asked
    assert told["texture"].kappa == real["texture"].kappa
    exchanged = of_requests(judges, features, np.roll(asked, 1, axis=0), seed=0)
    assert exchanged["texture"].interval[1] < told["texture"].interval[0]
    assert exchanged["texture"].interval[0] < 0 < exchanged["texture"].interval[1] + 0.05


def test_the_mean_over_scores_draws_requests() -> None:
    judges = train_judges(*visible(600, seed=0)[:2])
    features, _, truth = visible(300, seed=1)
    asked = np.zeros((300, 5), np.uint8)
    asked[:, TEXTURE] = truth
    told = of_requests(judges, features, asked, seed=0)["texture"]
    alone = mean_kappa(judges, features, asked, np.arange(300), seed=0)
    assert alone is not None
    assert alone[0] == pytest.approx(told.kappa)
    assert alone[1] == pytest.approx(told.interval, abs=0.02)
    asked[:, SPHERICITY] = 1  # what was asked never varies: 0 in the mean
    both = mean_kappa(judges, features, asked, np.arange(300), seed=0)
    assert both is not None
    assert both[0] == pytest.approx(told.kappa / 2)
    assert mean_kappa(judges, features, np.zeros_like(asked), np.arange(300), seed=0) is None


def test_few_or_equal_nodules_train_no_judge() -> None:
    features, ratings, _ = visible(15, seed=0)
    assert train_judges(features, ratings) == {}
    features, ratings, _ = visible(100, seed=0)
    ratings[:, :2, CONDITION_COLUMNS[SPHERICITY]] = 4
    assert "sphericity" not in train_judges(features, ratings)
