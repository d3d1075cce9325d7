"""Studies on the disk: orders, answers that outlive their process, what simulated readers show."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysynth.errors import InputError
from raysynth.evaluation.reader_study import judge_answers, read_answers, table_of
from raysynth.serving.studies import MAX_STUDIES, Given, Kind, Study, StudyFolder, WrongItem, order
from raysynth.serving.study_items import Items, ReaderStudyIn

READERS = ("anna", "ben")
SIZE = 4


def wanted(**more: object) -> ReaderStudyIn:
    return ReaderStudyIn.model_validate({"run": "r", "readers": READERS, "per_kind": 30} | more)


def items_of(asked: ReaderStudyIn) -> Items:
    """Images that differ in every pixel, real and synthetic in turn."""
    count = 2 * (asked.calibration + asked.per_kind)
    images = np.arange(count * SIZE * SIZE, dtype=np.int16).reshape(count, SIZE, SIZE)
    drawn = [bool(number % 2) for number in range(count)]
    return Items(images, drawn, 0.7, 1.0, "hu", (0, count * SIZE * SIZE - 1))


def made(path: Path, **more: object) -> tuple[StudyFolder, Study, dict[str, str]]:
    folder, asked = StudyFolder(path / "studies"), wanted(**more)
    return folder, *folder.add("someone", asked, items_of(asked))


def answer_all(
    folder: StudyFolder, study: Study, say: Callable[[bool], Kind], rating: int | None = None
) -> None:
    for reader in folder.readers(study):
        while (showing := reader.next) is not None:
            given = Given(say(study.is_synthetic[showing.item]), rating)
            reader, _ = folder.answer(study, reader.name, showing.id, given)


def test_orders_differ_between_readers_and_follow_from_the_seed(tmp_path: Path) -> None:
    _, study, _ = made(tmp_path, repeat_share=0.3)
    shown = {name: [(one.item, one.repeat) for one in order(study, name)] for name in READERS}
    assert shown["anna"] == [(one.item, one.repeat) for one in order(study, "anna")]
    assert shown["anna"] != shown["ben"]
    other = replace(study, wanted=study.wanted.model_copy(update={"seed": 1}))
    assert shown["anna"] != [(one.item, one.repeat) for one in order(other, "anna")]
    for sequence in shown.values():
        assert sorted(item for item, _ in sequence[:4]) == [0, 1, 2, 3]  # calibration
        assert sorted(item for item, repeat in sequence if not repeat) == list(range(64))
        again = [(place, item) for place, (item, repeat) in enumerate(sequence) if repeat]
        assert len(again) == 18
        for place, item in again:
            assert place - sequence.index((item, 0)) > 20  # a third of 60
    ids = {one.id for name in READERS for one in order(study, name)}
    assert len(ids) == 2 * (64 + 18)


def test_runs_of_one_kind_are_as_long_as_chance_has_them(tmp_path: Path) -> None:
    _, study, _ = made(tmp_path, per_kind=500, calibration=0, repeat_share=0)
    kinds = np.array([study.is_synthetic[one.item] for one in order(study, "anna")])
    changes = int((kinds[1:] != kinds[:-1]).sum())
    assert abs(changes - 500) < 4 * 250**0.5  # of 999 places, each with a chance of one half


def test_an_acknowledged_answer_outlives_its_process(tmp_path: Path) -> None:
    made(tmp_path)
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from raysynth.serving.studies import Given, StudyFolder\n"
        "folder = StudyFolder(Path(sys.argv[1])); study, = folder.all_of('someone')\n"
        "for answer in ('real', 'synthetic', 'real'):\n"
        "    reader = folder.readers(study)[0]\n"
        "    folder.answer(study, 'anna', reader.next.id, Given(answer, None))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "studies")]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    folder = StudyFolder(tmp_path / "studies")
    (study,) = folder.all_of("someone")
    anna, ben = folder.readers(study)
    assert [one.answer for one in anna.given] == ["real", "synthetic", "real"]
    assert ben.given == ()
    assert anna.next == anna.showings[3]


def test_what_was_not_finished_is_gone_and_hurts_nothing(tmp_path: Path) -> None:
    folder, study, told = made(tmp_path)
    (folder.path / study.id / ".reader-anna.json").write_text("{half")  # killed as it was written
    (folder.path / ("0" * 32)).mkdir()  # killed as the study was made
    again = StudyFolder(folder.path)
    assert not (folder.path / ("0" * 32)).exists()
    found = again.reader_of(study.id, told["anna"])
    assert found is not None
    assert found[0] == study
    assert found[1] == folder.readers(study)[0]


def test_the_first_answer_stands_and_none_is_skipped(tmp_path: Path) -> None:
    folder, study, _ = made(tmp_path)
    anna, ben = folder.readers(study)
    first, second = anna.showings[:2]
    with pytest.raises(WrongItem, match="answer those before it first"):
        folder.answer(study, "anna", second.id, Given("real", None))
    with pytest.raises(WrongItem, match="none of your items"):
        folder.answer(study, "anna", ben.showings[0].id, Given("real", None))
    folder.answer(study, "anna", first.id, Given("real", None))
    reader, place = folder.answer(study, "anna", first.id, Given("synthetic", None))
    assert (place, reader.given) == (0, (Given("real", None),))


def test_only_hashes_of_links_are_kept(tmp_path: Path) -> None:
    folder, study, told = made(tmp_path)
    kept = b"".join(path.read_bytes() for path in folder.path.rglob("*") if path.is_file())
    for name, secret in told.items():
        assert len(secret) >= 22  # 128 bits in base64
        assert secret.encode() not in kept
        found = folder.reader_of(study.id, secret)
        assert found is not None
        assert found[1].name == name
    assert folder.reader_of(study.id, "") is None
    assert folder.reader_of("..", told["anna"]) is None
    new = folder.new_secret(study, "anna")
    assert folder.reader_of(study.id, told["anna"]) is None
    assert folder.reader_of(study.id, new) is not None
    with pytest.raises(InputError, match="reader: carl is none of this study; there are anna, ben"):
        folder.new_secret(study, "carl")


def test_perfect_readers_are_right(tmp_path: Path) -> None:
    folder, study, _ = made(tmp_path)
    answer_all(folder, study, lambda drawn: "synthetic" if drawn else "real")
    found = judge_answers(folder.answers(study))
    assert (found.pooled.share, found.pooled.answers) == (1.0, 120)
    assert found.verdict == "different"
    assert found.between_readers == 1
    assert found.within_reader["anna"].items == 6
    assert found.within_reader["anna"].kappa == 1


@pytest.mark.parametrize(("per_kind", "verdict"), [(10, "not shown"), (400, "equivalent")])
def test_guessers_show_equivalence_only_with_enough_answers(
    tmp_path: Path, per_kind: int, verdict: str
) -> None:
    rng = np.random.default_rng(2)
    folder, study, _ = made(tmp_path, per_kind=per_kind)
    # On the disk each answer would be synced: what is tested here is what they show.
    for reader in folder.readers(study):
        said = rng.random(len(reader.showings)) < 0.5
        given = tuple(Given("real" if real else "synthetic", None) for real in said)
        folder._keep(study, replace(reader, given=given))
    found = judge_answers(folder.answers(study))
    assert found.pooled.answers == 4 * per_kind
    assert found.verdict == verdict


def test_answers_come_back_from_their_table(tmp_path: Path) -> None:
    folder, study, _ = made(tmp_path, task="rating", per_kind=3, repeat_share=0.3)
    answer_all(folder, study, lambda drawn: "real", rating=4)
    answers = folder.answers(study)
    assert len(answers) == 2 * (6 + 1)
    (tmp_path / "answers.csv").write_text(table_of(answers))
    assert read_answers(tmp_path / "answers.csv") == answers


def test_a_removed_study_leaves_nothing(tmp_path: Path) -> None:
    folder, study, told = made(tmp_path)
    assert folder.image(study, 3) == items_of(study.wanted).images[3].tobytes()
    folder.remove(study)
    assert list(folder.path.iterdir()) == []
    assert folder.reader_of(study.id, told["anna"]) is None
    assert folder.of("someone", study.id) is None


def test_studies_are_their_owner_s_and_not_without_end(tmp_path: Path) -> None:
    folder, study, _ = made(tmp_path, per_kind=1, calibration=0)
    assert folder.of("another", study.id) is None
    asked = study.wanted
    for _ in range(MAX_STUDIES - 1):
        folder.add("someone", asked, items_of(asked))
    with pytest.raises(InputError, match="as many as may be"):
        folder.add("someone", asked, items_of(asked))
    folder.add("another", asked, items_of(asked))
