"""The two priors: where nodules are asked for, how large, and with which scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr

from raysynth.case import CONDITION_ATTRIBUTES, CONDITION_COLUMNS, LUNG_LABELS, Label
from raysynth.config import ExperimentConfig, parse_recipe
from raysynth.formats.lidc import nodule_records
from raysynth.sampling.planner import (
    PlannedSample,
    independent_prior,
    joint_prior,
    shuffle_conditions,
    without_nodules,
)

SIZE = 64


def _anatomy() -> np.ndarray:
    """A thorax in a slice: an ellipse of body with two elliptic lungs."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    layout = np.where((x / 29) ** 2 + (y / 21) ** 2 < 1, Label.BODY, 0).astype(np.uint8)
    layout[((x + 13) / 11) ** 2 + (y / 16) ** 2 < 1] = Label.RIGHT_LUNG
    layout[((x - 13) / 10) ** 2 + (y / 16) ** 2 < 1] = Label.LEFT_LUNG
    return layout


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return parse_recipe(
        "model: {family: autoencoder_kl}",
        name="plan",
        overrides=[f"data.samples={{size: {SIZE}, nodule_slices: centre}}"],
    )


def _draws(prior: Callable, count: int) -> list:
    rng = np.random.default_rng(0)
    drawn = (prior(rng) for _ in itertools.count())
    return list(itertools.islice((one for one in drawn if one is not None), count))


@pytest.fixture(scope="module")
def joint_draws(config: ExperimentConfig) -> list:
    return _draws(joint_prior(config, [_anatomy()]), 10_000)


def test_the_joint_prior_keeps_every_nodule_inside_the_lung(
    config: ExperimentConfig, joint_draws: list
) -> None:
    lung = np.isin(_anatomy(), LUNG_LABELS)
    for source, condition, diameter_mm in joint_draws:
        assert source == 0
        nodule = condition.layout == Label.NODULE
        assert nodule.any()
        assert not (nodule & ~lung).any()
        y0, x0, y1, x1 = condition.box
        assert y1 - y0 == x1 - x0 >= max(2, int(diameter_mm / config.data.samples.pixel_mm))
        centre = np.argwhere(nodule).mean(axis=0)
        assert np.abs(centre - [(y0 + y1 - 1) / 2, (x0 + x1 - 1) / 2]).max() <= 1


def test_the_joint_prior_keeps_the_correlations_of_the_readers(joint_draws: list) -> None:
    asked = np.array([[*condition.attributes, mm] for _, condition, mm in joint_draws])
    # Each record counts once, whatever its number of readers, and its size decides what fits.
    real = np.array(
        [
            [*(reader[column] for column in CONDITION_COLUMNS), record.diameter_mm]
            for record in nodule_records()
            for reader in (record.ratings * 12)[:12]
        ]
    )
    difference = spearmanr(asked).statistic - spearmanr(real).statistic
    assert np.abs(difference).max() < 0.05


def test_the_independent_prior_follows_the_training_boxes_and_nothing_else() -> None:
    boxes = np.array([[10, 20, 14, 24]] * 3 + [[50, 52, 58, 60]])
    drawn = _draws(independent_prior(boxes, [_anatomy()], SIZE, pixel_mm=1.0), 4_000)
    corners = np.array([condition.box for _, condition, _ in drawn])
    centres = (corners[:, :2] + corners[:, 2:]) / 2
    in_first = (np.abs(centres - [12, 22]) <= 3).all(axis=1)
    in_second = (np.abs(centres - [54, 56]) <= 5).all(axis=1)
    assert (in_first | in_second).all()
    # Presence: 3 boxes of 16 pixels against one of 64.
    assert in_first.mean() == pytest.approx(48 / 112, abs=0.03)
    sides = corners[:, 2] - corners[:, 0]
    assert (sides == 4).mean() == pytest.approx(0.75, abs=0.03)
    scores = np.array([c.attributes for _, c, _ in drawn])
    assert scores.shape[1] == len(CONDITION_ATTRIBUTES)
    assert np.bincount(scores.ravel(), minlength=6)[1:] / scores.size == pytest.approx(
        0.2, abs=0.02
    )
    assert np.abs(np.corrcoef(scores.T) - np.eye(5)).max() < 0.06


def test_shuffling_leaves_nobody_with_its_own_request(config: ExperimentConfig) -> None:
    prior = joint_prior(config, [_anatomy()])
    plan = [
        PlannedSample(f"s{number}", number, condition, source)
        for number, (source, condition, _) in enumerate(_draws(prior, 9))
    ]
    shuffled = shuffle_conditions(plan)
    assert [one.seed for one in shuffled] == [one.seed for one in plan]
    own = {id(one.condition) for one in plan}
    assert {id(one.condition) for one in shuffled} == own
    assert all(a.condition is not b.condition for a, b in zip(plan, shuffled, strict=True))


def test_a_lent_layout_keeps_no_nodule() -> None:
    layout = _anatomy()
    layout[30:34, 18:22] = Label.NODULE
    assert np.array_equal(without_nodules(layout), _anatomy())
