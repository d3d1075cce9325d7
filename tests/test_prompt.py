from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from raysynth.case import ATTRIBUTES, SCORE_RANGES, Label
from raysynth.prompt import DROP_RATE, OPENING, WORDS, place_of, write_prompt

SCORES = tuple(
    {"texture": 3, "margin": 4, "sphericity": 5, "lobulation": 1, "spiculation": 2}.get(name, 0)
    for name in ATTRIBUTES
)


def score(**given: int) -> tuple[int, ...]:
    return tuple(given.get(name, 0) for name in ATTRIBUTES)


def clauses(prompt: str) -> list[str]:
    opening, *said = prompt.split(", ")
    assert opening == OPENING
    return said


def test_the_plain_prompt_follows_the_grammar() -> None:
    assert write_prompt((5, 1, 6, *SCORES[3:8], 4), 8.4, "left upper lobe") == (
        "axial chest CT, 8 mm part-solid pulmonary nodule, nearly sharp margin, no lobulation, "
        "slight spiculation, round shape, no calcification, left upper lobe"
    )


def test_what_is_not_known_is_not_said() -> None:
    assert write_prompt((0,) * 9) == "axial chest CT, pulmonary nodule"
    assert write_prompt((0,) * 9, float("nan")) == "axial chest CT, pulmonary nodule"
    assert write_prompt(score(margin=5)) == "axial chest CT, pulmonary nodule, sharp margin"


def test_malignancy_is_said_on_request_alone() -> None:
    scores = score(malignancy=5)
    assert "malign" not in write_prompt(scores)
    assert write_prompt(scores, with_malignancy=True).endswith("highly suspicious for malignancy")


def test_no_two_scores_share_their_words() -> None:
    """So a prompt says which scores it was written from."""
    meant = [
        (text, name, level)
        for name, levels in WORDS.items()
        for level, words in enumerate(levels, 1)
        for text in words
    ]
    assert len({text for text, _, _ in meant}) == len(meant)
    for (name, levels), level in product(WORDS.items(), range(1, 7)):
        if level > SCORE_RANGES[name][1]:
            continue
        prompt = write_prompt(score(**{name: level}), with_malignancy=True)
        (said,) = {text for text, *_ in meant if text in clauses(prompt)} or {
            clauses(prompt)[0].removesuffix(" pulmonary nodule")
        }
        assert (said, name, level) in meant
        assert said == levels[level - 1][0]


def test_training_prompts_drop_shuffle_and_vary() -> None:
    rng = np.random.default_rng(0)
    prompts = [write_prompt(SCORES, 8.4, "right lung", rng=rng) for _ in range(4000)]
    count = Counter(clause for prompt in prompts for clause in clauses(prompt))
    for name, levels in WORDS.items():
        words = levels[SCORES[ATTRIBUTES.index(name)] - 1]
        if SCORES[ATTRIBUTES.index(name)] and name != "texture":
            said = [count[text] for text in words]
            assert sum(said) / 4000 == pytest.approx(1 - DROP_RATE, abs=0.02), name
            assert np.allclose(np.divide(said, sum(said)), 1 / len(words), atol=0.04), name
    sized = sum("8 mm" in prompt for prompt in prompts)
    assert sized / 4000 == pytest.approx(1 - DROP_RATE, abs=0.02)
    assert all("pulmonary nodule" in prompt for prompt in prompts)
    complete = [said for said in map(clauses, prompts) if len(said) == 6]
    first = Counter(said.index("right lung") for said in complete if "right lung" in said)
    assert len(first) == 6
    assert min(first.values()) > 0.7 * max(first.values())


def test_the_same_draw_gives_the_same_prompt() -> None:
    one, other = (write_prompt(SCORES, 8, rng=np.random.default_rng(3)) for _ in range(2))
    assert one == other


def test_the_place_is_the_lung_around_the_nodule() -> None:
    layout = np.full((20, 40), Label.BODY, np.uint8)
    layout[:, 2:18], layout[:, 22:38] = Label.RIGHT_LUNG, Label.LEFT_LUNG
    layout[8:12, 22:26] = Label.NODULE
    assert place_of(layout, (8, 22, 12, 26)) == "left lung"
    assert place_of(layout[:, ::-1], (8, 14, 12, 18)) == "left lung"
    assert place_of(layout, (0, 2, 4, 6)) == "right lung"
    assert place_of(np.zeros((20, 40), np.uint8), (8, 22, 12, 26)) is None
