"""Prompts: what a reader said of a nodule, as a sentence a text model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from raysynth.case import ATTRIBUTES, SCORE_RANGES, Label

OPENING = "axial chest CT"
SUBJECT = "pulmonary nodule"
NO_NODULE = f"{OPENING}, no {SUBJECT}"
PLACES = {Label.LEFT_LUNG: "left lung", Label.RIGHT_LUNG: "right lung"}

CLAUSES = ["margin", "lobulation", "spiculation", "sphericity", "calcification"]
"""What prompts say after size and texture, in this order."""

DROP_RATE = 0.15
"""Chance of each clause to be left out of a training prompt."""

Synonyms = tuple[str, ...]

WORDS: dict[str, tuple[Synonyms, ...]] = {
    # Synonyms of each score from 1 on, the usual word first.
    "texture": (
        ("non-solid", "ground-glass", "pure ground-glass"),
        ("mostly non-solid", "mostly ground-glass"),
        ("part-solid", "mixed solid and ground-glass", "subsolid"),
        ("mostly solid", "predominantly solid"),
        ("solid", "dense solid"),
    ),
    "margin": (
        ("poorly defined margin", "ill-defined margin", "indistinct margin"),
        ("rather poorly defined margin", "rather ill-defined margin"),
        ("moderately defined margin", "medium margin"),
        ("nearly sharp margin", "rather sharp margin"),
        ("sharp margin", "well-defined margin", "sharply demarcated margin"),
    ),
    "lobulation": (
        ("no lobulation", "not lobulated"),
        ("slight lobulation", "slightly lobulated"),
        ("moderate lobulation", "moderately lobulated"),
        ("considerable lobulation", "considerably lobulated"),
        ("marked lobulation", "markedly lobulated"),
    ),
    "spiculation": (
        ("no spiculation", "not spiculated"),
        ("slight spiculation", "slightly spiculated"),
        ("moderate spiculation", "moderately spiculated"),
        ("considerable spiculation", "considerably spiculated"),
        ("marked spiculation", "markedly spiculated"),
    ),
    "sphericity": (
        ("linear shape", "elongated shape"),
        ("ovoid to linear shape", "narrow ovoid shape"),
        ("ovoid shape", "oval shape"),
        ("ovoid to round shape", "nearly round shape"),
        ("round shape", "spherical shape"),
    ),
    "calcification": (
        ("popcorn calcification", "popcorn-like calcification"),
        ("laminated calcification", "layered calcification"),
        ("solid calcification", "dense calcification"),
        ("non-central calcification", "eccentric calcification"),
        ("central calcification", "calcified centre"),
        ("no calcification", "not calcified"),
    ),
    "malignancy": (
        ("malignancy highly unlikely", "clearly benign"),
        ("malignancy moderately unlikely", "probably benign"),
        ("malignancy indeterminate", "indeterminate nodule"),
        ("moderately suspicious for malignancy", "probably malignant"),
        ("highly suspicious for malignancy", "clearly malignant"),
    ),
}
"""The levels as LIDC's readers were given them."""

assert all(len(words) == SCORE_RANGES[name][1] for name, words in WORDS.items())


def write_prompt(
    scores: Sequence[int],
    diameter_mm: float | None = None,
    place: str | None = None,
    *,
    rng: np.random.Generator | None = None,
    with_malignancy: bool = False,
) -> str:
    """The prompt of a nodule as one reader saw it, such as "axial chest CT, 8 mm solid ...".

    What is not known is not said. The plain prompt has its clauses in a fixed order and the usual
    words. For training, clauses are shuffled, each is left out with `DROP_RATE`, and one of the
    words that mean the same is drawn.

    Args:
        scores: nine scores in the order of `ATTRIBUTES`; 0 = not rated.
        diameter_mm: of the nodule.
        place: where it lies, such as "left lung".
        rng: draws a training prompt; None: the plain one.
        with_malignancy: say what the reader thought of it, which no image shows.
    """
    score = dict(zip(ATTRIBUTES, scores, strict=True))

    def is_said() -> bool:
        return rng is None or rng.random() >= DROP_RATE

    def word(name: str) -> str | None:
        if not score[name] or not is_said():
            return None
        synonyms = WORDS[name][score[name] - 1]
        return synonyms[0 if rng is None else int(rng.integers(len(synonyms)))]

    has_size = diameter_mm is not None and np.isfinite(diameter_mm) and is_said()
    size = f"{diameter_mm:.0f} mm" if has_size else None
    clauses = [
        " ".join(filter(None, (size, word("texture"), SUBJECT))),
        *map(word, CLAUSES + ["malignancy"] * with_malignancy),
        place if place and is_said() else None,
    ]
    said = [clause for clause in clauses if clause]
    if rng is not None:
        rng.shuffle(said)
    return ", ".join([OPENING, *said])


def longest_prompt(length: Callable[[str], int]) -> str:
    """The longest prompt that a model can be trained on.

    Args:
        length: of a phrase, such as the number of its tokens.
    """

    def longest(phrases: Iterable[str]) -> str:
        return max(phrases, key=length)

    words = {name: longest(chain.from_iterable(WORDS[name])) for name in ("texture", *CLAUSES)}
    texture = words.pop("texture")
    place = longest(PLACES.values())
    return ", ".join([OPENING, f"88 mm {texture} {SUBJECT}", *words.values(), place])


def all_words() -> Iterator[str]:
    """Everything that prompts can say but sizes, phrase by phrase."""
    yield from (NO_NODULE, *PLACES.values(), "mm")
    for levels in WORDS.values():
        for synonyms in levels:
            yield from synonyms


def place_of(layout: NDArray[np.uint8], box: Sequence[int]) -> str | None:
    """The lung that a nodule lies in: the one with more pixels in the box and as much around it.

    Args:
        layout: labels of a slice, (y, x).
        box: around the nodule, half-open pixels (y0, x0, y1, x1).

    Returns:
        None if neither has any.
    """
    y0, x0, y1, x1 = box
    side = y1 - y0
    around = layout[max(0, y0 - side) : y1 + side, max(0, x0 - side) : x1 + side]
    counts = {label: np.count_nonzero(around == label) for label in PLACES}
    nearest = max(counts, key=lambda label: counts[label])
    return PLACES[nearest] if counts[nearest] else None
