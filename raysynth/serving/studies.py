"""Reader studies on the disk: what is shown to whom in which order, and what they have answered."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raysynth.case import Intensity
from raysynth.errors import InputError
from raysynth.evaluation.reader_study import Answer
from raysynth.seeding import seed_of
from raysynth.serving.jobs import JOB_ID, write_synced
from raysynth.serving.study_items import Items, ReaderStudyIn
from raysynth.serving.tokens import hashed
from raysynth.training.checkpoints import sync_folder

MAX_STUDIES = 100
"""Of one owner."""

STUDY, IMAGES = "study.json", "images.npy"

Kind = Literal["real", "synthetic"]


class WrongItem(InputError):
    """A reader answers, or looks at, what is not shown now."""


@dataclass(frozen=True)
class Study:
    """What a study consists of.

    Attributes:
        id: random; nobody guesses another's.
        owner: whose token made it.
        made_at: in seconds since 1970.
        wanted: what was asked for.
        is_synthetic: of each item, those of calibration first.
        shape: of each image.
        pixel_mm: side of a pixel.
        depth_mm: between planes.
        intensity: what the values are.
        value_range: least and largest value that an image may have.
    """

    id: str
    owner: str
    made_at: float
    wanted: ReaderStudyIn
    is_synthetic: tuple[bool, ...]
    shape: tuple[int, ...]
    pixel_mm: float
    depth_mm: float
    intensity: Intensity
    value_range: tuple[int, int]

    @property
    def num_calibration(self) -> int:
        """Items of which readers are told what they were."""
        return 2 * self.wanted.calibration

    def kind(self, item: int) -> Kind:
        """What an item is."""
        return "synthetic" if self.is_synthetic[item] else "real"


@dataclass(frozen=True)
class Showing:
    """An item as one reader sees it.

    Attributes:
        id: random: nobody learns from it what the item is, or that it was shown before.
        item: number of the item in the study.
        repeat: 0; 1: it is shown for the second time.
    """

    id: str
    item: int
    repeat: int


@dataclass(frozen=True)
class Given:
    """An answer as it was given."""

    answer: Kind
    rating: int | None


@dataclass(frozen=True)
class Reader:
    """One who answers.

    Attributes:
        name: in the answers.
        hash: SHA-256 of the secret in the reader's link, in hex.
        showings: in the reader's order.
        given: the answers to the first showings; nothing is skipped.
    """

    name: str
    hash: str
    showings: tuple[Showing, ...]
    given: tuple[Given, ...] = ()

    @property
    def next(self) -> Showing | None:
        """What is to be answered now; None: everything is."""
        return self.showings[len(self.given)] if len(self.given) < len(self.showings) else None

    @property
    def after(self) -> Showing | None:
        """What comes then."""
        place = len(self.given) + 1
        return self.showings[place] if place < len(self.showings) else None

    def place(self, showing_id: str) -> int | None:
        """Of a showing in the order; None: it is none of this reader's."""
        places = (place for place, one in enumerate(self.showings) if one.id == showing_id)
        return next(places, None)


class StudyFolder:
    """Studies as folders: what it is, its images, and a file of each reader."""

    def __init__(self, path: Path) -> None:
        """Reads what is there.

        Args:
            path: the folder; it is made.
        """
        self.path = path
        self._lock = threading.Lock()  # of writers
        self._studies: dict[str, Study] = {}
        self._readers: dict[str, dict[str, Reader]] = {}
        path.mkdir(parents=True, exist_ok=True)
        for folder in path.iterdir():
            if (folder / STUDY).exists():
                study = _study_of(json.loads((folder / STUDY).read_text()))
                readers = [_reader_of(json.loads(file.read_text())) for file in _files(folder)]
                self._studies[study.id] = study
                self._readers[study.id] = {reader.name: reader for reader in readers}
            elif JOB_ID.fullmatch(folder.name):
                shutil.rmtree(folder)  # somebody was killed as it was made or removed

    def add(self, owner: str, wanted: ReaderStudyIn, items: Items) -> tuple[Study, dict[str, str]]:
        """A new study, durable when this returns.

        Returns:
            The study, and each reader's secret, which nobody can find out later.

        Raises:
            InputError: the owner has as many as they may.
        """
        self.check_room(owner)
        study = Study(
            secrets.token_hex(16),
            owner,
            time.time(),
            wanted,
            tuple(items.is_synthetic),
            items.images.shape[1:],
            items.pixel_mm,
            items.depth_mm,
            items.intensity,
            items.value_range,
        )
        folder = self.path / study.id
        folder.mkdir()
        with (folder / IMAGES).open("wb") as file:
            np.save(file, items.images.astype("<i2", copy=False), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        told = {name: secrets.token_urlsafe(16) for name in wanted.readers}
        readers = [Reader(name, hashed(told[name]), order(study, name)) for name in wanted.readers]
        for reader in readers:
            write_synced(_file(folder, reader.name), _packed(reader))
        # Last: without it there is no study.
        content = asdict(study) | {"wanted": wanted.model_dump()}
        write_synced(folder / STUDY, json.dumps(content).encode())
        sync_folder(self.path)
        with self._lock:
            self._readers[study.id] = {reader.name: reader for reader in readers}
            self._studies[study.id] = study
        return study, told

    def check_room(self, owner: str) -> None:
        """Whether an owner may have one more.

        Raises:
            InputError: they may not.
        """
        if (count := len(self.all_of(owner))) >= MAX_STUDIES:
            raise InputError(f"you have {count} studies, as many as may be: remove one first")

    def of(self, owner: str, study_id: str) -> Study | None:
        """An owner's study; None if there is none, or if it is another's."""
        study = self._studies.get(study_id)
        return study if study is not None and study.owner == owner else None

    def all_of(self, owner: str) -> list[Study]:
        """An owner's studies, the newest first."""
        own = [study for study in list(self._studies.values()) if study.owner == owner]
        return sorted(own, key=lambda study: -study.made_at)

    def readers(self, study: Study) -> list[Reader]:
        """Who answers, in the order in which they were named."""
        readers = self._readers.get(study.id, {})
        return [readers[name] for name in study.wanted.readers if name in readers]

    def reader_of(self, study_id: str, secret: str) -> tuple[Study, Reader] | None:
        """Whose secret this is; every hash is compared, in constant time."""
        study, mark, found = self._studies.get(study_id), hashed(secret), None
        for reader in list(self._readers.get(study_id, {}).values()):
            if hmac.compare_digest(mark, reader.hash):
                found = reader
        return None if study is None or found is None else (study, found)

    def new_secret(self, study: Study, name: str) -> str:
        """Another secret for a reader, who goes on where they were; the old one ends.

        Raises:
            InputError: the study has no such reader.
        """
        secret = secrets.token_urlsafe(16)
        with self._lock:
            reader = self._readers.get(study.id, {}).get(name)
            if reader is None:
                raise InputError(
                    f"reader: {name} is none of this study; there are "
                    f"{', '.join(study.wanted.readers)}"
                )
            self._keep(study, replace(reader, hash=hashed(secret)))
        return secret

    def answer(self, study: Study, name: str, showing_id: str, given: Given) -> tuple[Reader, int]:
        """Takes the answer to what is shown now; on the disk when this returns.

        The first answer stands: who could change it would change it for what they learn later.

        Returns:
            The reader, and the place of what was answered.

        Raises:
            WrongItem: it is none of this reader's, or its turn has not come.
        """
        with self._lock:
            reader = self._readers.get(study.id, {}).get(name)
            place = None if reader is None else reader.place(showing_id)
            if reader is None or place is None:
                raise WrongItem("item: none of your items has this id")
            if place > len(reader.given):
                raise WrongItem("item: answer those before it first")
            if place == len(reader.given):
                reader = replace(reader, given=(*reader.given, given))
                self._keep(study, reader)
            return reader, place

    def image(self, study: Study, item: int) -> bytes:
        """An item's values, int16 with the low byte first, in C order."""
        images = np.load(self.path / study.id / IMAGES, mmap_mode="r", allow_pickle=False)
        return bytes(images[item].tobytes())

    def remove(self, study: Study) -> None:
        """Forgets a study with its images and answers."""
        with self._lock:
            self._studies.pop(study.id, None)
            self._readers.pop(study.id, None)
            (self.path / study.id / STUDY).unlink(missing_ok=True)
            shutil.rmtree(self.path / study.id, ignore_errors=True)

    def answers(self, study: Study) -> list[Answer]:
        """All that count: those of calibration do not."""
        found = []
        for reader in self.readers(study):
            for showing, given in zip(reader.showings, reader.given, strict=False):
                if showing.item >= study.num_calibration:
                    found.append(
                        Answer(
                            reader.name,
                            f"item-{showing.item - study.num_calibration + 1:04d}",
                            study.is_synthetic[showing.item],
                            given.answer == "synthetic",
                            given.rating,
                            showing.repeat,
                        )
                    )
        return found

    def _keep(self, study: Study, reader: Reader) -> None:
        write_synced(_file(self.path / study.id, reader.name), _packed(reader))
        self._readers[study.id][reader.name] = reader


def order(study: Study, name: str) -> tuple[Showing, ...]:
    """A reader's items: calibration, then those that count, some of them again.

    What comes again is out of the first third, and comes in the last one: a third of all lies
    between at least. The order follows from the study's seed and the reader's name.
    """
    rng = np.random.default_rng(seed_of("reader order", study.wanted.seed, name))
    first = rng.permutation(study.num_calibration).tolist()
    items = (study.num_calibration + rng.permutation(2 * study.wanted.per_kind)).tolist()
    third = len(items) // 3
    num_repeated = int(study.wanted.repeat_share * len(items))
    repeated = rng.permutation(items[:third])[:num_repeated].tolist()
    last = [(item, 0) for item in items[2 * third :]] + [(item, 1) for item in repeated]
    shown = [(item, 0) for item in (*first, *items[: 2 * third])]
    shown += [last[place] for place in rng.permutation(len(last))]
    return tuple(Showing(secrets.token_hex(16), item, repeat) for item, repeat in shown)


def _file(folder: Path, name: str) -> Path:
    return folder / f"reader-{name}.json"


def _files(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("reader-*.json"))


def _packed(reader: Reader) -> bytes:
    return json.dumps(asdict(reader)).encode()


def _study_of(content: dict[str, Any]) -> Study:
    tuples = {name: tuple(content[name]) for name in ("is_synthetic", "shape", "value_range")}
    return Study(**content | tuples | {"wanted": ReaderStudyIn(**content["wanted"])})


def _reader_of(content: dict[str, Any]) -> Reader:
    showings = tuple(Showing(**one) for one in content["showings"])
    given = tuple(Given(**one) for one in content["given"])
    return Reader(content["name"], content["hash"], showings, given)
