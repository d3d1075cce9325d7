from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysynth.cli import main
from raysynth.errors import InputError
from raysynth.evaluation.reader_study import reader_study

HEADING = "reader,item,truth,answer,rating,repeat\n"


def _table(
    path: Path,
    share_right: float,
    readers: int,
    items: int,
    *,
    better: float = 0.0,
    repeats: int = 0,
    seed: int = 0,
) -> Path:
    """Answers of simulated readers; real items are rated `better` than synthetic ones."""

    def lines() -> Iterator[str]:
        rng = np.random.default_rng(seed)
        for reader in range(readers):
            for item in [*range(items), *range(-repeats, 0)]:
                truth = item % 2
                said = truth if rng.random() < share_right else 1 - truth
                rating = np.clip(round(rng.normal(3 + better * (truth == 0), 0.7)), 1, 5)
                kinds = ("real", "synthetic")
                yield (
                    f"r{reader},i{item % items},{kinds[truth]},{kinds[said]},{rating},"
                    f"{int(item < 0)}\n"
                )

    path.write_text(HEADING + "".join(lines()))
    return path


def test_guessing_is_equivalent_with_enough_answers(tmp_path: Path) -> None:
    found = reader_study(_table(tmp_path / "a.csv", 0.5, readers=5, items=200, repeats=20))
    assert found.verdict == "equivalent"
    assert found.sentences[0].startswith("Equivalent")
    assert found.pooled.answers == 1000  # repeats are not counted
    assert found.pooled.interval[0] < 0.5 < found.pooled.interval[1]
    assert abs(found.pooled.d_prime.value) < 0.2
    assert found.between_readers == pytest.approx(0, abs=0.1)
    assert found.within_reader["r0"].items == 20
    assert abs(found.within_reader["r0"].kappa) < 0.6
    assert found.ratings is not None
    assert found.ratings.n == 100


def test_few_answers_show_nothing_either_way(tmp_path: Path) -> None:
    found = reader_study(_table(tmp_path / "a.csv", 0.5, readers=2, items=20))
    assert found.verdict == "not shown"
    assert "does not mean that there is none" in found.sentences[0]
    assert any("214" in sentence for sentence in found.sentences)


def test_perfect_readers_tell_them_apart(tmp_path: Path) -> None:
    found = reader_study(_table(tmp_path / "a.csv", 1.0, readers=3, items=30, repeats=5))
    assert found.verdict == "different"
    assert found.choice.estimate == pytest.approx(0.5)
    assert found.between_readers == 1
    assert found.within_reader["r1"].kappa == 1
    assert found.readers["r0"].d_prime.interval[0] > 0


def test_worse_ratings_are_a_difference_even_if_choices_are_guesses(tmp_path: Path) -> None:
    found = reader_study(_table(tmp_path / "a.csv", 0.5, readers=5, items=200, better=1.0))
    assert found.choice.verdict == "equivalent"
    assert found.rating is not None
    assert found.rating.estimate == pytest.approx(-1, abs=0.2)
    assert found.ratings is not None
    assert found.ratings.effect < -0.5
    assert found.verdict == "different"


def test_a_habit_of_saying_real_is_no_skill(tmp_path: Path) -> None:
    rows = [f"a,i{i},{'synthetic' if i < 10 else 'real'},real\n" for i in range(100)]
    (tmp_path / "a.csv").write_text("reader,item,truth,answer\n" + "".join(rows))
    found = reader_study(tmp_path / "a.csv")
    assert found.pooled.share == 0.9
    assert found.choice.estimate == 0
    assert found.rating is None
    assert found.between_readers is None
    assert "With one reader" in found.sentences[-1]


def test_equivalence_is_seldom_claimed_at_the_limit(tmp_path: Path) -> None:
    # Right in .6 of all cases, the least that matters; 5 % of such studies may miss it.
    claimed = [
        reader_study(_table(tmp_path / "a.csv", 0.6, 3, 100, seed=s)).choice.verdict == "equivalent"
        for s in range(40)
    ]
    assert sum(claimed) <= 4


BAD = {
    "no column": ("reader,item,truth\na,1,real\n", "line 1: no column 'answer'"),
    "unknown column": ("reader,item,truth,answer,age\n", "line 1: unknown column 'age'"),
    "truth": ("reader,item,truth,answer\na,1,fake,real\n", "line 2: truth is 'fake'"),
    "no answer": ("reader,item,truth,answer\na,1,real\n", "line 2: answer is ''"),
    "rating": (HEADING + "a,1,real,real,3,\na,2,real,real,6,\n", "line 3: rating is '6'"),
    "repeat": (HEADING + "a,1,real,real,3,x\n", "line 2: repeat is 'x'"),
    "no reader": (HEADING + ",1,real,real,3,\n", "line 2: reader is empty"),
    "twice": (HEADING + "a,1,real,real,,\na,1,real,real,,\n", "line 3: .* in line 2 already"),
    "two truths": (HEADING + "a,1,real,real,,\nb,1,synthetic,real,,\n", "line 3: .* real before"),
    "only repeat": (
        HEADING + "a,1,real,real,,1\na,2,real,real,,\na,3,synthetic,real,,\n",
        "line 2: repeat 1",
    ),
    "one kind": (HEADING + "a,1,real,real,,\n", "no answers on synthetic items"),
    "nothing": (HEADING, "no answers on real and synthetic items"),
    "too long": (HEADING + "a,1,real,real,3,0,9\n", "line 2: more fields"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_named_by_line(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        reader_study(tmp_path / "a.csv")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(_table(tmp_path / "a.csv", 1.0, readers=2, items=30))
    assert main(["reader-study", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "different"
    assert main(["reader-study", path]) == 0
    assert "Different: readers do not judge" in capsys.readouterr().out
    assert main(["reader-study", str(tmp_path / "none.csv")]) == 2
    assert "No such file" in capsys.readouterr().err
