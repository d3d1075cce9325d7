"""Reader studies over HTTP: their owner makes and evaluates them, readers answer by a link."""

# See `raysynth.serving.gateway`: annotations must not be texts.

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Path, Response
from pydantic import BaseModel, ConfigDict

from raysynth.case import Intensity
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.evaluation.reader_study import (
    CHOICE_DELTA,
    KINDS,
    RATING_DELTA,
    ReaderStudy,
    judge_answers,
    table_of,
)
from raysynth.serving.answers import REFUSALS, Bearer
from raysynth.serving.quotas import Quotas
from raysynth.serving.runner import Busy
from raysynth.serving.schemas import Score, Strict
from raysynth.serving.studies import Given, Kind, Reader, Study, StudyFolder, WrongItem
from raysynth.serving.study_items import ReaderName, ReaderStudyIn, choose_items
from raysynth.serving.tokens import Grant, Scope

RAW = "application/octet-stream"

READER = Grant(requests_per_minute=600)
"""What one reader may ask for."""

study_routes = APIRouter()

StudyId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
ItemId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]


class ReaderIn(Strict):
    """A reader of a study."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reader": "reader-1"}]})

    reader: ReaderName


class LinkOut(BaseModel):
    """A reader's way into a study, told this once: whoever has it answers as that reader."""

    reader: str
    link: str
    """Below the service's address."""


class ProgressOut(BaseModel):
    """How far a reader is."""

    reader: str
    answered: int
    """Calibration and repeated items included, as in the next one."""
    total: int


class StudyOut(BaseModel):
    """A study of yours."""

    id: str
    made_at: float
    """Seconds since 1970."""
    wanted: ReaderStudyIn
    progress: list[ProgressOut]


class MadeStudyOut(StudyOut):
    """A study that was made just now."""

    links: list[LinkOut]


class ResultsOut(BaseModel):
    """What a study shows by now."""

    study: StudyOut
    choice_delta: float
    """Differences that do not matter, fixed before anybody has answered."""
    rating_delta: float
    found: ReaderStudy | None
    """None: there are no answers yet on both real and synthetic items."""


class ItemOut(BaseModel):
    """What is shown: no more than its place."""

    id: str
    is_calibration: bool


class ReaderOut(BaseModel):
    """A study as its reader sees it."""

    title: str
    task: Literal["choice", "rating"]
    tells_share: bool
    """Whether half of the items are synthetic; else that is not told."""
    shape: tuple[int, ...]
    pixel_mm: float
    depth_mm: float
    intensity: Intensity
    value_range: tuple[int, int]
    num_calibration: int
    answered: int
    total: int
    item: ItemOut | None
    """To be answered now; None: all is done."""
    after: ItemOut | None
    """What comes then: its image may be fetched ahead."""


class ItemAnswerIn(Strict):
    """What a reader takes an item for."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"answer": "real", "rating": 4}]})

    answer: Kind
    rating: Score | None = None
    """How real it looks: 1, not at all, to 5. Where the study asks for it."""


class AnsweredOut(BaseModel):
    """What is kept of an answer: the first one to an item stands."""

    answer: Kind
    rating: int | None
    truth: Kind | None
    """Of calibration items alone."""
    reader: ReaderOut


class StudyRoutes:
    """Routes of reader studies.

    Readers are told nothing of what an item is: ids are random, images are equally many bytes out
    of one file, and all headers are the same.
    """

    config: ExperimentConfig
    studies: StudyFolder
    quotas: Quotas
    making: asyncio.Lock

    def _admitted(self, bearer: Bearer, *scopes: Scope) -> tuple[str, Grant]:
        raise NotImplementedError

    # Of the owner.

    @study_routes.post("/v1/studies", responses=REFUSALS, status_code=201)
    async def make_study(self, body: ReaderStudyIn, bearer: Bearer = None) -> MadeStudyOut:
        """Makes a study out of the recipe's store; the readers' links are told this once.

        Whoever has a link sees real samples of the store: give links to people who may.
        """
        owner, _ = self._admitted(bearer, "study")
        self.studies.check_room(owner)
        if self.making.locked():
            raise Busy("another study is being made: try again later")
        async with self.making:  # its images are in memory meanwhile
            items = await asyncio.to_thread(choose_items, self.config, body)
            study, told = await asyncio.to_thread(self.studies.add, owner, body, items)
        links = [_link(study, reader, secret) for reader, secret in told.items()]
        return MadeStudyOut(**self._shown_study(study).model_dump(), links=links)

    @study_routes.get("/v1/studies", responses=REFUSALS)
    async def list_studies(self, bearer: Bearer = None) -> list[StudyOut]:
        """Your studies, the newest first."""
        owner, _ = self._admitted(bearer, "study")
        return [self._shown_study(study) for study in self.studies.all_of(owner)]

    @study_routes.get("/v1/studies/{study_id}", responses=REFUSALS)
    async def study(self, study_id: StudyId, bearer: Bearer = None) -> ResultsOut:
        """How far a study is, and what its answers show by now."""
        study = self._own_study(study_id, bearer)
        answers = self.studies.answers(study)
        kinds = {answer.is_synthetic for answer in answers if not answer.repeat}
        found = None
        if len(kinds) == len(KINDS):
            found = await asyncio.to_thread(judge_answers, answers)
        return ResultsOut(
            study=self._shown_study(study),
            choice_delta=CHOICE_DELTA,
            rating_delta=RATING_DELTA,
            found=found,
        )

    @study_routes.get(
        "/v1/studies/{study_id}/answers",
        responses=REFUSALS | {200: {"content": {"text/csv": {}}}},
        response_class=Response,
    )
    async def study_answers(self, study_id: StudyId, bearer: Bearer = None) -> Response:
        """The answers as `raysynth reader-study` takes them; those of calibration do not count."""
        study = self._own_study(study_id, bearer)
        return Response(table_of(self.studies.answers(study)), media_type="text/csv")

    @study_routes.post("/v1/studies/{study_id}/links", responses=REFUSALS, status_code=201)
    async def new_link(self, study_id: StudyId, body: ReaderIn, bearer: Bearer = None) -> LinkOut:
        """Another link for a reader who lost theirs, which ends; answers stay."""
        study = self._own_study(study_id, bearer)
        secret = await asyncio.to_thread(self.studies.new_secret, study, body.reader)
        return _link(study, body.reader, secret)

    @study_routes.delete("/v1/studies/{study_id}", responses=REFUSALS, status_code=204)
    async def remove_study(self, study_id: StudyId, bearer: Bearer = None) -> None:
        """Forgets a study, with its copies of images and all answers."""
        study = self._own_study(study_id, bearer)
        await asyncio.to_thread(self.studies.remove, study)

    # Of a reader, whose bearer token is what their link says.

    @study_routes.get("/v1/reader", responses=REFUSALS)
    async def reader(self, bearer: Bearer = None) -> ReaderOut:
        """Where you are in a study."""
        return _seen(*self._own_reader(bearer))

    @study_routes.get(
        "/v1/reader/items/{item_id}/image",
        responses=REFUSALS | {200: {"content": {RAW: {}}}},
        response_class=Response,
    )
    async def reader_image(self, item_id: ItemId, bearer: Bearer = None) -> Response:
        """What is shown now, or next: int16 with the low byte first, in C order, and no more."""
        study, reader = self._own_reader(bearer)
        shown = [one for one in (reader.next, reader.after) if one is not None]
        item = next((one.item for one in shown if one.id == item_id), None)
        if item is None:
            raise HTTPException(404, "this item is not shown to you now")
        # No mark says what is synthetic, unlike in all else that the service gives: it would be the
        # answer. These bytes are no picture file, and go to readers of a study alone.
        return Response(await asyncio.to_thread(self.studies.image, study, item), media_type=RAW)

    @study_routes.put("/v1/reader/items/{item_id}", responses=REFUSALS)
    async def answer_item(
        self, item_id: ItemId, body: ItemAnswerIn, bearer: Bearer = None
    ) -> AnsweredOut:
        """Answers what is shown now. It is kept once this returns; the first answer stands."""
        study, reader = self._own_reader(bearer)
        if (body.rating is not None) != (study.wanted.task == "rating"):
            raise InputError(
                "rating: give 1 to 5" if body.rating is None else "rating: this study asks for none"
            )
        given = Given(body.answer, body.rating)
        try:
            reader, place = await asyncio.to_thread(
                self.studies.answer, study, reader.name, item_id, given
            )
        except WrongItem as error:
            raise HTTPException(409, str(error)) from error
        item, kept = reader.showings[place].item, reader.given[place]
        return AnsweredOut(
            answer=kept.answer,
            rating=kept.rating,
            truth=study.kind(item) if item < study.num_calibration else None,
            reader=_seen(study, reader),
        )

    # How it is done.

    def _own_study(self, study_id: str, bearer: Bearer) -> Study:
        owner, _ = self._admitted(bearer, "study")
        study = self.studies.of(owner, study_id)
        if study is None:
            raise HTTPException(404, "there is no such study of yours")
        return study

    def _own_reader(self, bearer: Bearer) -> tuple[Study, Reader]:
        study_id, _, secret = (bearer.credentials if bearer else "").partition(".")
        found = self.studies.reader_of(study_id, secret)
        if found is None:
            raise HTTPException(
                401,
                "this link is not known, or has ended: ask whoever sent it for another",
                {"WWW-Authenticate": "Bearer"},
            )
        study, reader = found
        self.quotas.request(f"reader {study.id} {reader.name}", READER)
        return study, reader

    def _shown_study(self, study: Study) -> StudyOut:
        progress = [
            ProgressOut(reader=one.name, answered=len(one.given), total=len(one.showings))
            for one in self.studies.readers(study)
        ]
        return StudyOut(id=study.id, made_at=study.made_at, wanted=study.wanted, progress=progress)


def _link(study: Study, reader: str, secret: str) -> LinkOut:
    return LinkOut(reader=reader, link=f"/reader#{study.id}.{secret}")


def _seen(study: Study, reader: Reader) -> ReaderOut:
    shown = [
        None if one is None else ItemOut(id=one.id, is_calibration=one.item < study.num_calibration)
        for one in (reader.next, reader.after)
    ]
    return ReaderOut(
        title=study.wanted.title,
        task=study.wanted.task,
        tells_share=study.wanted.tell_share,
        shape=study.shape,
        pixel_mm=study.pixel_mm,
        depth_mm=study.depth_mm,
        intensity=study.intensity,
        value_range=study.value_range,
        num_calibration=study.num_calibration,
        answered=len(reader.given),
        total=len(reader.showings),
        item=shown[0],
        after=shown[1],
    )
