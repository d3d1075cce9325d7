"""API v1 over HTTP: who may ask, for what, and what comes back."""

# Ray Serve copies the routes' functions when the class is made: their annotations must not be
# texts, and what they call stands above.

import asyncio
import io
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from raysynth import __version__
from raysynth.condition import Condition
from raysynth.config import Diffusion, ExperimentConfig
from raysynth.errors import InputError
from raysynth.models.bundle import CARD, bundle_digest, read_facts
from raysynth.serving.jobs import Job, JobFolder
from raysynth.serving.runner import Busy
from raysynth.serving.schemas import (
    MAX_SEED,
    JobOut,
    ModelOut,
    Problem,
    SampleIn,
    condition_from,
    npz_of,
    png_of,
)
from raysynth.serving.tokens import FOLDER, load_tokens, owner_of

MAX_BODY_BYTES = 4_000_000
"""Of a request, refused before anything is decoded."""

MAX_TRIES = 5
"""Of one sample, where replicas are lost."""

RETRY_AFTER_S = 2

PNG, NPZ = "image/png", "application/x-npz"

api = FastAPI(
    title="raysynth",
    version="1",
    summary="Synthetic lung CT. Research only: whatever comes from here shows no patient.",
)


def _problem(status: int, title: str, detail: str, field: str | None = None) -> JSONResponse:
    content = Problem(title=title, status=status, detail=detail, field=field).model_dump()
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(content, status, headers, media_type="application/problem+json")


@api.exception_handler(InputError)
async def _bad_input(request: Request, error: InputError) -> JSONResponse:
    detail = str(getattr(error, "cause", error))  # a replica's comes wrapped
    first = detail.split(maxsplit=1)[0].rstrip(":")
    field = first if first in SampleIn.model_fields else None
    return _problem(422, "this cannot be drawn", detail, field)


@api.exception_handler(Busy)
async def _busy(request: Request, error: Busy) -> JSONResponse:
    return _problem(503, "busy", str(error))


@api.exception_handler(HTTPException)
async def _refused(request: Request, error: HTTPException) -> JSONResponse:
    return _problem(error.status_code, "refused", str(error.detail))


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    return _problem(422, "invalid request", f"{field}: {first['msg']}", field)


class BodyLimit:
    """Refuses large bodies while they come in."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Counts what is received (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Ray Serve's headers can be read once.
        scope = {**scope, "headers": list(scope["headers"])}
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if int(told) > MAX_BODY_BYTES if told.isdigit() else True:
            response = _problem(413, "too large", f"give {MAX_BODY_BYTES:,} bytes at most")
            await response(scope, receive, send)
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"give {MAX_BODY_BYTES:,} bytes at most")
            return message

        await self.app(scope, counted, send)


api.add_middleware(BodyLimit)

Problems = dict[int | str, dict[str, Any]]
REFUSALS: Problems = {code: {"model": Problem} for code in (401, 404, 409, 413, 422, 503)}


Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]


@dataclass(frozen=True)
class Order:
    """What a replica is told of a sample."""

    sample_id: str
    seed: int
    condition: Condition
    num_inference_steps: int | None
    guidance_scale: float | None


@dataclass
class Progress:
    """Of a job that is being drawn."""

    task: asyncio.Task[None]
    step: int = 0
    num_steps: int = 0


async def _closing(news: Any) -> AsyncGenerator[dict[str, Any]]:
    """What a replica tells; leaving it early gives the sample up there."""
    is_whole = False
    try:
        async for one in news:
            yield one
            is_whole = "hu" in one
    finally:
        if not is_whole:
            news.cancel()


def _seeded(body: SampleIn) -> SampleIn:
    """The body with a seed."""
    if body.seed is not None:
        return body
    return body.model_copy(update={"seed": secrets.randbelow(MAX_SEED)})


def _hu_of(packed: bytes) -> NDArray[np.int16]:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        hu: NDArray[np.int16] = arrays["hu"]
        return hu


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


@serve.deployment(name="gateway")
@serve.ingress(api)
class Gateway:
    """Checks requests and hands them to replicas; keeps jobs."""

    def __init__(self, replicas: DeploymentHandle[Any], config: ExperimentConfig) -> None:
        """Takes up the jobs that an earlier gateway left unfinished."""
        self.replicas, self.config = replicas.options(stream=True), config
        self.facts = read_facts(config.bundle_path)
        self.digest = bundle_digest(config.bundle_path)
        self.folder = config.work_dir / FOLDER
        self.jobs = JobFolder(self.folder / "jobs", config.serving.keep_results)
        self.going: dict[str, Progress] = {}
        for job in self.jobs.unfinished():
            self._begin(job)

    def _owner(self, bearer: Bearer) -> str:
        owner = None
        if (
            bearer is not None
        ):  # tokens are read each time: new ones are known, old ones end, at once
            owner = owner_of(load_tokens(self.folder), bearer.credentials)
        if owner is None:
            raise HTTPException(401, "give a token: `Authorization: Bearer ...`")
        return owner

    @api.get("/v1/health")
    async def health(self) -> dict[str, str]:
        """Whether the service is up; needs no token."""
        return {"status": "up", "version": __version__}

    @api.get("/v1/models", responses=REFUSALS)
    async def models(self, bearer: Bearer = None) -> list[ModelOut]:
        """The models that are served, with their cards."""
        self._owner(bearer)
        facts, path = self.facts, self.config.bundle_path
        return [
            ModelOut(
                name=path.name,
                family=facts.model.family,
                digest=self.digest,
                shape=facts.samples.shape,
                pixel_mm=facts.samples.pixel_mm,
                window_hu=facts.window_hu,
                intensity=facts.intensity,
                card=(path / CARD).read_text(encoding="utf-8"),
            )
        ]

    @api.post(
        "/v1/samples",
        responses=REFUSALS | {200: {"content": {PNG: {}, NPZ: {}}}},
        response_class=Response,
    )
    async def sample(
        self,
        body: SampleIn,
        accept: Annotated[str, Header()] = PNG,
        bearer: Bearer = None,
    ) -> Response:
        """Draws a slice while you wait: a PNG in the model's window, or an NPZ in HU."""
        self._owner(bearer)
        if self.facts.spatial_dims != 2:
            raise HTTPException(409, "volumes take long: ask for a job at /v1/jobs")
        order = self._order(secrets.token_hex(16), _seeded(body))
        hu, batch_shape = await self._drawn(order, lambda step, of: None)
        told = self._told(order, batch_shape)
        headers = {
            "X-Raysynth-Synthetic": "yes",
            "X-Raysynth-Seed": str(order.seed),
            "X-Raysynth-Bundle": self.digest,
            "X-Raysynth-Batch-Shape": str(batch_shape),
            "Cache-Control": "no-store",
        }
        if NPZ in accept:
            return Response(npz_of(hu, told), media_type=NPZ, headers=headers)
        return Response(png_of(hu, self.facts.window_hu), media_type=PNG, headers=headers)

    @api.post("/v1/jobs", status_code=202, responses=REFUSALS)
    async def submit(
        self,
        body: SampleIn,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
        bearer: Bearer = None,
    ) -> JobOut:
        """Accepts a sample to be drawn. What is accepted is on the disk, and is drawn."""
        owner = self._owner(bearer)
        seeded = _seeded(body)
        self._order("check", seeded)
        if len(self.going) >= self.config.serving.max_waiting * self.config.serving.num_replicas:
            raise Busy("as many jobs wait as may: try again later")
        job, is_new = await asyncio.to_thread(
            self.jobs.add, owner, seeded.model_dump(exclude_none=True), idempotency_key
        )
        if is_new:
            self._begin(job)
        return self._shown(job)

    @api.get("/v1/jobs", responses=REFUSALS)
    async def list_jobs(self, bearer: Bearer = None) -> list[JobOut]:
        """Your jobs, the newest first."""
        owner = self._owner(bearer)
        return [self._shown(job) for job in self.jobs.all_of(owner)]

    @api.get("/v1/jobs/{job_id}", responses=REFUSALS)
    async def job(self, job_id: str, bearer: Bearer = None) -> JobOut:
        """How far a job is."""
        return self._shown(self._own_job(job_id, bearer))

    @api.get(
        "/v1/jobs/{job_id}/result",
        responses=REFUSALS | {200: {"content": {PNG: {}, NPZ: {}}}},
        response_class=Response,
    )
    async def result(
        self,
        job_id: str,
        accept: Annotated[str, Header()] = NPZ,
        bearer: Bearer = None,
    ) -> Response:
        """What a job has drawn: an NPZ in HU, or a PNG."""
        job = self._own_job(job_id, bearer)
        if job.state != "done":
            raise HTTPException(
                409, f"the job is {job.state}" + (f": {job.error}" * bool(job.error))
            )
        packed = await asyncio.to_thread(self.jobs.result, job_id)
        headers = {"X-Raysynth-Synthetic": "yes", "Cache-Control": "no-store"}
        if PNG in accept and NPZ not in accept:
            hu = _hu_of(packed)
            return Response(png_of(hu, self.facts.window_hu), media_type=PNG, headers=headers)
        return Response(packed, media_type=NPZ, headers=headers)

    @api.get("/v1/jobs/{job_id}/events", responses=REFUSALS, response_class=StreamingResponse)
    async def events(self, job_id: str, bearer: Bearer = None) -> StreamingResponse:
        """Server-sent events: `step` while the job is drawn, then its last state."""
        self._own_job(job_id, bearer)
        return StreamingResponse(self._events(job_id), media_type="text/event-stream")

    @api.delete("/v1/jobs/{job_id}", responses=REFUSALS)
    async def cancel(self, job_id: str, bearer: Bearer = None) -> JobOut:
        """Gives a job up; one that has ended stays as it is."""
        self._own_job(job_id, bearer)
        job = await asyncio.to_thread(self.jobs.change, job_id, "cancelled")
        if job_id in self.going:
            self.going[job_id].task.cancel()
        return self._shown(job)

    def _own_job(self, job_id: str, bearer: Bearer) -> Job:
        job = self.jobs.of(self._owner(bearer), job_id)
        if job is None:
            raise HTTPException(404, "there is no such job of yours")
        return job

    def _shown(self, job: Job) -> JobOut:
        progress = self.going.get(job.id)
        steps = (progress.step, progress.num_steps) if progress else (0, 0)
        seed = job.body["seed"]
        return JobOut(
            id=job.id,
            state=job.state,
            step=steps[0],
            num_steps=steps[1],
            seed=seed,
            error=job.error,
        )

    def _order(self, sample_id: str, body: SampleIn) -> Order:
        """Checked: nothing that is refused reaches a replica."""
        assert body.seed is not None
        model, steps = self.facts.model, body.num_inference_steps
        assert isinstance(model, Diffusion)
        most = min(self.config.serving.max_steps, model.num_train_timesteps)
        if steps is not None and steps > most:
            raise InputError(f"num_inference_steps {steps}: give {most} at most")
        if body.guidance_scale not in (None, 1) and not model.condition_drop:
            raise InputError(
                f"guidance_scale {body.guidance_scale}: this model never learned what no condition "
                "looks like; leave it out"
            )
        condition = condition_from(body, self.facts)
        return Order(sample_id, body.seed, condition, steps, body.guidance_scale)

    async def _drawn(
        self, order: Order, on_step: Callable[[int, int], None]
    ) -> tuple[NDArray[np.int16], int]:
        """Draws a sample; where a replica is lost another draws it again, from its seed."""
        for left in reversed(range(MAX_TRIES)):
            try:
                news: Any = self.replicas.draw.remote(
                    order.sample_id,
                    order.seed,
                    order.condition,
                    order.num_inference_steps,
                    order.guidance_scale,
                )
                async with aclosing(_closing(news)) as told:
                    async for one in told:
                        if "hu" in one:
                            return one["hu"], one["batch_shape"]
                        on_step(one["step"], one["num_steps"])
            except RayActorError:
                if not left:
                    raise
                await asyncio.sleep(RETRY_AFTER_S)
        raise Busy("no replica drew this: try again later")

    def _told(self, order: Order, batch_shape: int) -> dict[str, object]:
        """What a result says of itself."""
        return {
            "synthetic": True,
            "seed": order.seed,
            "batch_shape": batch_shape,
            "bundle": self.digest,
            "pixel_mm": self.facts.samples.pixel_mm,
            "intensity": self.facts.intensity,
            "raysynth": __version__,
        }

    def _begin(self, job: Job) -> None:
        self.going[job.id] = Progress(asyncio.get_running_loop().create_task(self._draw_job(job)))

    async def _draw_job(self, job: Job) -> None:
        def on_step(step: int, num_steps: int) -> None:
            progress = self.going[job.id]
            progress.step, progress.num_steps = step, num_steps

        try:
            order = self._order(job.id, SampleIn.model_validate(job.body))
            while True:
                try:
                    hu, batch_shape = await self._drawn(order, on_step)
                    break
                except Busy:  # it was accepted: it waits
                    await asyncio.sleep(RETRY_AFTER_S)
            packed = await asyncio.to_thread(npz_of, hu, self._told(order, batch_shape))
            await asyncio.to_thread(self.jobs.put_result, job.id, packed)
            await asyncio.to_thread(self.jobs.change, job.id, "done")
        except Exception as error:
            cause = getattr(error, "cause", error)
            await asyncio.to_thread(self.jobs.change, job.id, "failed", str(cause).splitlines()[0])
        finally:
            self.going.pop(job.id, None)

    async def _events(self, job_id: str) -> AsyncIterator[str]:
        last = -1
        while (progress := self.going.get(job_id)) is not None:
            if progress.step != last:
                last = progress.step
                yield _event("step", {"step": last, "num_steps": progress.num_steps})
            await asyncio.sleep(0.1)
        job = self.jobs.jobs.get(job_id)
        if job is not None:
            yield _event(job.state, {"error": job.error})
