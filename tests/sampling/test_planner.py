"""The two priors: where nodules are asked for, how large, and with which scores."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from tokenizers import Tokenizer

from raysynth.case import CONDITION_ATTRIBUTES, CONDITION_COLUMNS, LUNG_LABELS, Label
from raysynth.config import ExperimentConfig, parse_recipe
from raysynth.errors import InputError
from raysynth.formats.lidc import nodule_records
from raysynth.models.text import tokenize
from raysynth.prompt import NO_NODULE, WORDS
from raysynth.sampling.cohort import (
    DIAMETERS,
    TEXTURES,
    diameter_class,
    plan_strata,
    texture_class,
)
from raysynth.sampling.planner import (
    NO_SOURCE,
    PlannedSample,
    independent_prior,
    joint_prior,
    plan_samples,
    shuffle_conditions,
    without_nodules,
)

SIZE = 64
NO_SAMPLES: Any = None
"""Who plans prompts looks at no real sample."""


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


def test_in_crops_the_nodule_is_in_the_middle_again(config: ExperimentConfig) -> None:
    crops = config.slices.model_copy(update={"centre": "nodule", "nodule_free_every": 0})
    data = config.data.model_copy(update={"samples": crops})
    layout = np.full((SIZE, SIZE), Label.LEFT_LUNG, np.uint8)
    layout[:, SIZE // 2 + 2 :] = Label.BODY  # no room for a whole nodule
    strata = plan_strata(None, 0)
    prior = joint_prior(config.model_copy(update={"data": data}), [layout], strata.of(0).draw)
    for drawn in _draws(prior, 20):
        box = np.array(drawn[1].box)
        assert np.abs((box[:2] + box[2:]) / 2 - SIZE / 2).max() <= 1
        assert (drawn[1].layout[:, SIZE // 2 + 2 :] == Label.BODY).all()


def _draws(prior: Callable, count: int) -> list:
    rng = np.random.default_rng(0)
    drawn = (prior(rng) for _ in itertools.count())
    return list(itertools.islice((one for one in drawn if one is not None), count))


@pytest.fixture(scope="module")
def joint_draws(config: ExperimentConfig) -> list:
    return _draws(joint_prior(config, [_anatomy()], plan_strata(None, 0.0).of(0).draw), 10_000)


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
    prior = joint_prior(config, [_anatomy()], plan_strata(None, 0.0).of(0).draw)
    plan = [
        PlannedSample(f"s{number}", number, condition, source)
        for number, (source, condition, _) in enumerate(_draws(prior, 9))
    ]
    shuffled = shuffle_conditions(plan)
    assert [one.seed for one in shuffled] == [one.seed for one in plan]
    own = {id(one.condition) for one in plan}
    assert {id(one.condition) for one in shuffled} == own
    assert all(a.condition is not b.condition for a, b in zip(plan, shuffled, strict=True))


def test_recipes_of_other_names_ask_for_the_same_with_other_noise() -> None:
    one, other = (
        plan_samples(_text_recipe().model_copy(update={"name": name}), NO_SAMPLES)
        for name in ("one", "other")
    )
    assert [a.condition for a in one] == [b.condition for b in other]
    assert all(a.seed != b.seed for a, b in zip(one, other, strict=True))


def test_a_lent_layout_keeps_no_nodule() -> None:
    layout = _anatomy()
    layout[30:34, 18:22] = Label.NODULE
    assert np.array_equal(without_nodules(layout), _anatomy())


def _text_recipe(*overrides: str) -> ExperimentConfig:
    samples = "{size: 32, field_of_view_mm: 64, centre: nodule, nodule_slices: centre, "
    model = "{family: text_diffusion, autoencoder: unused, max_tokens: 40}"
    return parse_recipe(
        f"model: {model}\ndata: {{samples: {samples} nodule_free_every: 0, min_nodule_mm: 6}}}}",
        name="words",
        overrides=overrides,
    )


def test_a_prompt_says_what_the_box_and_the_scores_say() -> None:
    plan = plan_samples(_text_recipe("sampling.num_samples=300"), NO_SAMPLES)
    assert len({planned.seed for planned in plan}) == 300
    sides = {"left lung": 0, "right lung": 0}
    for planned in plan:
        condition = planned.condition
        assert planned.source_sample == NO_SOURCE
        assert condition.layout is None
        assert condition.text is not None
        tokenize(condition.text, 40)
        y0, x0, y1, x1 = condition.box
        assert (y0 + y1, x0 + x1) in {(31, 31), (32, 32), (33, 33)}
        (diameter,) = re.findall(r"(\d+) mm", condition.text)
        assert abs((y1 - y0) * 2 - int(diameter)) <= 2.5  # two millimetres a pixel
        for name, score in zip(CONDITION_ATTRIBUTES, condition.attributes, strict=True):
            assert WORDS[name][score - 1][0] in condition.text
        sides[condition.text.rpartition(", ")[2]] += 1
    assert min(sides.values()) > 90  # nodules lie on both sides, more often on the right


def test_prompts_of_the_user_are_drawn_in_turn_and_checked_first() -> None:
    recipe = _text_recipe(
        "sampling.num_samples=3",
        "sampling.prompts=['axial chest CT, 9 mm solid pulmonary nodule', 'sharp margin']",
    )
    texts = [planned.condition.text for planned in plan_samples(recipe, NO_SAMPLES)]
    assert texts == [*recipe.sampling.prompts, recipe.sampling.prompts[0]]
    with pytest.raises(InputError, match="'tumor' is unknown to this model"):
        plan_samples(_text_recipe("sampling.prompts=['solid tumor']"), NO_SAMPLES)
    with pytest.raises(InputError, match="words and commas: this model reads 40"):
        plan_samples(_text_recipe(f"sampling.prompts=['{'solid ' * 41}']"), NO_SAMPLES)


def test_prompts_too_long_for_stable_diffusion_are_refused_without_its_weights(
    tmp_path: Path,
) -> None:
    from tests.models.folders import MAX_TOKENS, clip_tokenizer

    tokenizer = Tokenizer.from_str(clip_tokenizer().backend_tokenizer.to_str())
    tokenizer.enable_padding(length=MAX_TOKENS)
    bundle = tmp_path / "bundles" / "words"
    bundle.mkdir(parents=True)
    tokenizer.save(str(bundle / "tokenizer.json"))  # all that there is of it

    def planned(*overrides: str) -> list[PlannedSample]:
        model = "model={family: stable_diffusion, autoencoder: a, pretrained: nowhere}"
        return plan_samples(_text_recipe(model, f"work_dir={tmp_path}", *overrides), NO_SAMPLES)

    plan = planned("sampling.num_samples=50")
    assert all("pulmonary nodule" in str(one.condition.text) for one in plan)
    assert planned("sampling.prompts=['a hamartoma']")[0].condition.text == "a hamartoma"
    with pytest.raises(InputError, match="is 102 tokens long: this model reads 77; leave some cl"):
        planned(f"sampling.prompts=['{'solid ' * 100}']")


def test_every_other_prompt_may_ask_for_no_nodule() -> None:
    recipe = _text_recipe("sampling.num_samples=10", "sampling.nodule_free=0.5")
    texts = [planned.condition.text for planned in plan_samples(recipe, NO_SAMPLES)]
    assert texts.count(NO_NODULE) == 5


TEXTURE = CONDITION_ATTRIBUTES.index("texture")


def _millimetres(text: str) -> float:
    return float(re.findall(r"(\d+) mm", text)[0])


def test_a_cohort_gets_its_shares_and_else_stays_lidc() -> None:
    recipe = _text_recipe(
        "sampling.num_samples=400",
        "sampling.cohort={texture: {non_solid: 0.3, part_solid: 0.3}, diameter_mm: {15_up: 0.5}}",
    )
    plan = [planned.condition for planned in plan_samples(recipe, NO_SAMPLES)]
    textures = np.bincount([texture_class(c.attributes[TEXTURE]) for c in plan], minlength=3) / 400
    assert dict(zip(TEXTURES, textures, strict=True)) == pytest.approx(
        {"non_solid": 0.3, "part_solid": 0.3, "solid": 0.4}, abs=0.01
    )
    # Prompts give whole millimetres: a nodule of 14.6 mm is called one of 15.
    large = np.mean([_millimetres(c.text) >= 15 for c in plan])
    assert large == pytest.approx(0.5, abs=0.03)
    # The other classes of size keep their proportion among themselves, whatever the texture.
    strata = plan_strata(recipe.sampling.cohort, 6.0)
    small = [
        strata.shares[row]
        for size in ("6_to_8", "8_to_15")
        for row in [
            [
                number
                for number, stratum in enumerate(strata.strata)
                if DIAMETERS[diameter_class(stratum.records[0].diameter_mm)] == size
            ]
        ]
    ]
    natural = [
        np.mean([low <= record.diameter_mm < high for record in nodule_records()])
        for low, high in ((6, 8), (8, 15))
    ]
    assert small[0].sum() / small[1].sum() == pytest.approx(natural[0] / natural[1], rel=0.01)
    assert strata.shares.sum() == pytest.approx(1)


def test_the_first_samples_of_a_cohort_have_its_shares_already() -> None:
    recipe = _text_recipe("sampling.cohort={texture: {non_solid: 0.5, solid: 0.5, part_solid: 0}}")
    strata = plan_strata(recipe.sampling.cohort, 6.0)
    textures = [texture_class(strata.of(number).scores[0][0][7]) for number in range(200)]
    for count in (10, 50, 200):
        assert np.mean(np.array(textures[:count]) == 0) == pytest.approx(0.5, abs=1.5 / count)
    assert 1 not in textures


def test_shares_need_not_sum_up_to_one_in_floating_point() -> None:
    asked = {"non_solid": 0.3, "part_solid": 0.35, "solid": 0.35}
    assert sum(asked.values()) != 1
    recipe = _text_recipe(f"sampling.cohort={{texture: {asked}}}")
    strata = plan_strata(recipe.sampling.cohort, 6.0)
    assert strata.shares.sum() == pytest.approx(1)


def test_a_cohort_that_cannot_be_had_is_refused() -> None:
    recipe = _text_recipe("sampling.cohort={diameter_mm: {below_6: 0.1}}")
    with pytest.raises(InputError, match=r"diameter_mm: 0\.1 below_6, but no LIDC nodule"):
        plan_samples(recipe, NO_SAMPLES)
    with pytest.raises(InputError, match="sum up to 1 at most"):
        _text_recipe("sampling.cohort={texture: {solid: 0.7, non_solid: 0.7}}")


def test_a_counterfactual_series_changes_one_score_and_nothing_else() -> None:
    recipe = _text_recipe("sampling.num_samples=12", "sampling.counterfactual={texture: [1, 3, 5]}")
    plan = plan_samples(recipe, NO_SAMPLES)
    for start in range(0, 12, 3):
        series = plan[start : start + 3]
        assert len({planned.seed for planned in series}) == 1
        assert len({planned.condition.box for planned in series}) == 1
        scores = np.array([planned.condition.attributes for planned in series])
        assert scores[:, TEXTURE].tolist() == [1, 3, 5]
        assert (np.delete(scores, TEXTURE, axis=1) == np.delete(scores[0], TEXTURE)).all()
        assert len({planned.condition.text for planned in series}) == 3
    assert len({planned.seed for planned in plan}) == 4
    assert len({planned.sample_id for planned in plan}) == 12
    with pytest.raises(InputError, match="give two or more scores from 1 to 5"):
        _text_recipe("sampling.counterfactual={texture: [0, 5]}")
