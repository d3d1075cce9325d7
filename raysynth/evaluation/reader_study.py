"""A reader study: can people tell synthetic images from real ones, and is that shown either way."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError
from raysynth.evaluation.intervals import Interval
from raysynth.evaluation.statistics import (
    Equivalence,
    Sensitivity,
    Test,
    Verdict,
    clopper_pearson,
    cohen_kappa,
    d_prime,
    fleiss_kappa,
    rank_sum,
    tost,
    tost_answers,
    tost_power,
)
from raysynth.seeding import seed_of

REQUIRED, OPTIONAL = ("reader", "item", "truth", "answer"), ("rating", "repeat")
KINDS = ("real", "synthetic")
RATINGS = range(1, 6)

CHOICE_DELTA, RATING_DELTA = 0.1, 0.5
"""Differences that do not matter (methods F.11); fixed here, before anybody has answered."""

NUM_DRAWS = 2000


@dataclass(frozen=True)
class Answer:
    """One line of the table.

    Attributes:
        is_synthetic: what the item is.
        said_synthetic: what the reader took it for.
        rating: 1 to 5; None: not given.
        repeat: which showing of the item to this reader, from 0.
    """

    reader: str
    item: str
    is_synthetic: bool
    said_synthetic: bool
    rating: int | None
    repeat: int


@dataclass(frozen=True)
class Accuracy:
    """How often readers were right.

    Attributes:
        right: answers that were right.
        answers: in all, first showings only.
        share: right ones.
        interval: exact, 95 %; answers are taken as independent.
        d_prime: 0: real and synthetic look alike; a habit of saying one of both does not move it.
    """

    right: int
    answers: int
    share: float
    interval: Interval
    d_prime: Sensitivity


@dataclass(frozen=True)
class Repeated:
    """How far a reader agrees with himself on items shown twice.

    Attributes:
        items: shown again.
        agreed: share of the same answers.
        kappa: the same beyond chance.
    """

    items: int
    agreed: float
    kappa: float


@dataclass(frozen=True)
class ReaderStudy:
    """What a reader study shows.

    Attributes:
        readers: by reader.
        pooled: of all readers.
        between_readers: Fleiss' kappa; None for one reader.
        within_reader: by reader, where items were shown twice.
        ratings: rank-sum test of the items' mean ratings, synthetic against real; None without.
        choice: share of right answers minus .5, mean of both kinds of items.
        rating: mean rating of synthetic items minus that of real ones; None without.
        power: chance that so many independent answers show equivalence of choices, where readers
            only guess.
        verdict: of all that was asked together.
        sentences: the verdict in words.
    """

    readers: dict[str, Accuracy]
    pooled: Accuracy
    between_readers: float | None
    within_reader: dict[str, Repeated]
    ratings: Test | None
    choice: Equivalence
    rating: Equivalence | None
    power: float
    verdict: Verdict
    sentences: list[str]


def reader_study(path: Path, seed: int = 0) -> ReaderStudy:
    """Evaluates a table of answers.

    Args:
        path: CSV with the columns `REQUIRED`, and perhaps `OPTIONAL`.
        seed: of the drawing.

    Raises:
        InputError: no such file, a missing column, a value that is none, or nothing to compare.
    """
    return judge_answers(read_answers(path), seed)


def judge_answers(answers: Sequence[Answer], seed: int = 0) -> ReaderStudy:
    """What answers show.

    Intervals of choices and ratings draw readers and items together, 2,000 times. That counts the
    noise of single answers more than once: where there is nothing else, intervals are up to sqrt(3)
    too wide (Owen 2007), so equivalence is never claimed too easily.

    Args:
        answers: to real and synthetic items, first showings of both among them.
        seed: of the drawing.
    """
    first = [answer for answer in answers if not answer.repeat]
    by_reader = _grouped(first, lambda answer: answer.reader)
    right = _table(first, lambda answer: answer.is_synthetic == answer.said_synthetic)
    seed = seed_of("reader study", seed)
    choice = tost(*_mean_of_kinds(right, (0.5, 0.5), -0.5, seed), CHOICE_DELTA)
    rated = [answer for answer in first if answer.rating is not None]
    ratings, rating = None, None
    if len({answer.is_synthetic for answer in rated}) == len(KINDS):
        scores = _table(rated, lambda answer: answer.rating or 0)
        rating = tost(*_mean_of_kinds(scores, (-1.0, 1.0), 0.0, seed), RATING_DELTA)
        of_items = scores.total.sum(axis=0) / scores.count.sum(axis=0)
        ratings = rank_sum(of_items[scores.is_synthetic], of_items[~scores.is_synthetic])
    verdict = _together([choice] if rating is None else [choice, rating])
    return ReaderStudy(
        readers={reader: _accuracy(given) for reader, given in by_reader.items()},
        pooled=_accuracy(first),
        between_readers=_between(first) if len(by_reader) > 1 else None,
        within_reader=_within(answers),
        ratings=ratings,
        choice=choice,
        rating=rating,
        power=tost_power(len(first), CHOICE_DELTA),
        verdict=verdict,
        sentences=_sentences(verdict, choice, rating, len(by_reader), len(first)),
    )


def read_answers(path: Path) -> list[Answer]:
    """The table of answers, checked.

    Raises:
        InputError: see `reader_study`; the message has the number of the line.
    """
    answers: list[Answer] = []
    lines: dict[tuple[str, str, int], int] = {}
    truths: dict[str, bool] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            _check_columns(path, table.fieldnames or ())
            for row in table:
                answer = _answer(f"{path}, line {table.line_num}", row)
                key = (answer.reader, answer.item, answer.repeat)
                if key in lines:
                    raise InputError(
                        f"{path}, line {table.line_num}: reader {answer.reader!r} has answered "
                        f"item {answer.item!r} in line {lines[key]} already; number showings in "
                        "the column repeat (0, 1, ...)"
                    )
                if truths.setdefault(answer.item, answer.is_synthetic) != answer.is_synthetic:
                    raise InputError(
                        f"{path}, line {table.line_num}: item {answer.item!r} was "
                        f"{KINDS[not answer.is_synthetic]} before; an item is one of both"
                    )
                lines[key] = table.line_num
                answers.append(answer)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"answers {path}: {reason}; give a CSV file in UTF-8") from error
    _check_complete(path, answers, lines)
    return answers


def table_of(answers: Iterable[Answer]) -> str:
    """The table that `read_answers` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow((*REQUIRED, *OPTIONAL))
    for one in answers:
        truth, said = KINDS[one.is_synthetic], KINDS[one.said_synthetic]
        table.writerow((one.reader, one.item, truth, said, one.rating, one.repeat))
    return text.getvalue()


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    unknown = sorted(set(columns) - {*REQUIRED, *OPTIONAL})
    if missing or unknown:
        problem = f"no column {missing[0]!r}" if missing else f"unknown column {unknown[0]!r}"
        raise InputError(
            f"{path}, line 1: {problem}; there must be {', '.join(REQUIRED)}, and may be "
            f"{' and '.join(OPTIONAL)}"
        )


def _check_complete(
    path: Path, answers: Sequence[Answer], lines: dict[tuple[str, str, int], int]
) -> None:
    seen = {answer.is_synthetic for answer in answers if not answer.repeat}
    if len(seen) < len(KINDS):
        lacking = [kind for number, kind in enumerate(KINDS) if bool(number) not in seen]
        raise InputError(
            f"{path} has no answers on {' and '.join(lacking)} items: show readers both kinds"
        )
    for (reader, item, repeat), line in lines.items():
        if repeat and (reader, item, 0) not in lines:
            raise InputError(
                f"{path}, line {line}: repeat {repeat} of item {item!r} for reader {reader!r}, who "
                "has no answer with repeat 0"
            )


def _answer(place: str, row: dict[str, str | None]) -> Answer:
    values = {name: (row.get(name) or "").strip() for name in (*REQUIRED, *OPTIONAL)}
    if None in row:  # what csv calls the fields beyond the heading
        raise InputError(f"{place}: more fields than the heading has")
    for name in ("reader", "item"):
        if not values[name]:
            raise InputError(f"{place}: {name} is empty; name each one")
    for name in ("truth", "answer"):
        if values[name] not in KINDS:
            raise InputError(f"{place}: {name} is {values[name]!r}; write {' or '.join(KINDS)}")
    rating, repeat = values["rating"], values["repeat"] or "0"
    if rating and rating not in map(str, RATINGS):
        raise InputError(f"{place}: rating is {rating!r}; write 1 to 5, or leave it empty")
    if not (repeat.isascii() and repeat.isdigit()):
        raise InputError(f"{place}: repeat is {repeat!r}; write 0 for the first showing, then 1")
    return Answer(
        values["reader"],
        values["item"],
        values["truth"] == "synthetic",
        values["answer"] == "synthetic",
        int(rating) if rating else None,
        int(repeat),
    )


@dataclass(frozen=True)
class _Table:
    """Sums and numbers of values by (reader, item); `is_synthetic` of items."""

    total: NDArray[np.float64]
    count: NDArray[np.float64]
    is_synthetic: NDArray[np.bool_]


def _table(answers: Sequence[Answer], value: Callable[[Answer], float]) -> _Table:
    readers = {name: i for i, name in enumerate(sorted({a.reader for a in answers}))}
    items = {name: i for i, name in enumerate(sorted({a.item for a in answers}))}
    total, count = np.zeros((2, len(readers), len(items)))
    is_synthetic = np.zeros(len(items), bool)
    for answer in answers:
        place = readers[answer.reader], items[answer.item]
        total[place] += value(answer)
        count[place] += 1
        is_synthetic[place[1]] = answer.is_synthetic
    return _Table(total, count, is_synthetic)


def _mean_of_kinds(
    table: _Table, weights: tuple[float, float], shift: float, seed: int
) -> tuple[float, NDArray[np.float64]]:
    """`shift` and the weighted means over real and synthetic items, and draws of that."""
    rng = np.random.default_rng(seed)
    readers = len(table.total)
    drawn = rng.multinomial(readers, np.full(readers, 1 / readers), NUM_DRAWS)
    value, draws = shift, np.full(NUM_DRAWS, shift)
    for is_synthetic, weight in enumerate(weights):
        of_kind = table.is_synthetic == bool(is_synthetic)
        total, count = table.total[:, of_kind], table.count[:, of_kind]
        items = total.shape[1]
        shown = rng.multinomial(items, np.full(items, 1 / items), NUM_DRAWS)
        value += weight * float(total.sum() / count.sum())
        numbers = ((drawn @ count) * shown).sum(axis=1)
        means = ((drawn @ total) * shown).sum(axis=1) / np.where(numbers, numbers, np.nan)
        draws = draws + weight * means
    # Where not everybody saw everything, a draw may have no answer at all.
    return value, draws[np.isfinite(draws)]


def _accuracy(answers: Sequence[Answer]) -> Accuracy:
    counts = np.zeros((2, 2), int)  # (is synthetic, said synthetic)
    for answer in answers:
        counts[int(answer.is_synthetic), int(answer.said_synthetic)] += 1
    right, total = int(np.trace(counts)), len(answers)
    (rejected, alarms), (missed, hits) = counts.tolist()
    return Accuracy(
        right,
        total,
        right / total,
        clopper_pearson(right, total),
        d_prime(hits, missed, alarms, rejected),
    )


def _between(first: Sequence[Answer]) -> float | None:
    said = [
        [sum(not a.said_synthetic for a in given), sum(a.said_synthetic for a in given)]
        for given in _grouped(first, lambda answer: answer.item).values()
    ]
    shared = any(sum(counts) > 1 for counts in said)
    return fleiss_kappa(said) if shared else None


def _within(answers: Sequence[Answer]) -> dict[str, Repeated]:
    found = {}
    for reader, given in sorted(_grouped(answers, lambda answer: answer.reader).items()):
        first = {answer.item: answer.said_synthetic for answer in given if not answer.repeat}
        again = [answer for answer in given if answer.repeat]
        if again:
            before = np.array([first[answer.item] for answer in again])
            after = np.array([answer.said_synthetic for answer in again])
            agreed = float((before == after).mean())
            found[reader] = Repeated(len(again), agreed, cohen_kappa(before, after))
    return found


def _together(parts: Sequence[Equivalence]) -> Verdict:
    """Different where anything is; equivalent where all of it is."""
    verdicts = {part.verdict for part in parts}
    if "different" in verdicts:
        return "different"
    return "not shown" if "not shown" in verdicts else "equivalent"


def _sentences(
    verdict: Verdict, choice: Equivalence, rating: Equivalence | None, readers: int, answers: int
) -> list[str]:
    meaning = {
        "equivalent": "Equivalent: whatever difference there is lies within the limits set.",
        "different": "Different: readers do not judge synthetic and real images alike.",
        "not shown": "Not shown either way: neither a difference nor equivalence. That no "
        "difference was found does not mean that there is none.",
    }
    said = [meaning[verdict], f"Right answers: {_words(choice, 'chance')}."]
    if rating is not None:
        said.append(f"Ratings: {_words(rating, 'those of real items')}.")
    if verdict == "not shown":
        said.append(
            f"There are {answers} answers; of independent ones about {tost_answers(CHOICE_DELTA)} "
            "show equivalence four times in five, of some readers on the same items two to three "
            "times as many."
        )
    if readers == 1:
        said.append("With one reader this holds of that reader alone.")
    return said


def _words(part: Equivalence, than: str) -> str:
    low, high = part.interval90
    return (
        f"{part.estimate:+.3f} against {than}, 90 % interval [{low:+.3f}, {high:+.3f}], limits "
        f"±{part.delta:g}: {part.verdict}"
    )


def _grouped(answers: Iterable[Answer], key: Callable[[Answer], str]) -> dict[str, list[Answer]]:
    groups: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[key(answer)].append(answer)
    return dict(sorted(groups.items()))
