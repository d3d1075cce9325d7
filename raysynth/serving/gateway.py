"""API v1 over HTTP: who may ask, for what, and what comes back."""

# Ray Serve copies the routes' functions when the class is made: their annotations must not be
# texts, and what they call stands above.

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import ray
from fastapi import Header, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge

from raysynth import __version__
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.serving.answers import (
    NAME,
    PICTURES,
    REFUSALS,
    Bearer,
    IdempotencyKey,
    Name,
    event,
    packed_sample,
    wanted_media,
)
from raysynth.serving.api import make_api
from raysynth.serving.arrays import (
    NIFTI,
    NPZ,
    PNG,
    npz_of,
    of_npz,
    packed_array,
    png_of,
    read_array,
    read_arrays,
)
from raysynth.serving.dispatch import Dispatcher
from raysynth.serving.jobs import Job, JobFolder
from raysynth.serving.landing import check_landing, land
from raysynth.serving.metrics import SERVICE
from raysynth.serving.quotas import Quotas
from raysynth.serving.replica import Order, service_folder
from raysynth.serving.runner import Busy
from raysynth.serving.schemas import (
    AdherenceOut,
    BatchIn,
    JobOut,
    MetricsOut,
    ModelOut,
    SampleIn,
    StreamOut,
    UploadOut,
)
from raysynth.serving.store_routes import StoreRoutes, store_routes
from raysynth.serving.studies import StudyFolder
from raysynth.serving.study_routes import StudyRoutes, study_routes
from raysynth.serving.tokens import Grant, Scope, load_tokens, owner_of
from raysynth.serving.uploads import UploadFolder

api = make_api()
api.include_router(store_routes)
api.include_router(study_routes)

METRICS = {
    "raysynth_gateway_requests_total": "Requests that were let in, by kind",
    "raysynth_gateway_unfinished_jobs": "Jobs under way",
}
"""What Prometheus sees of the gateway."""

SERVED = "served"
"""The stream of all that is drawn with the recipe's bundle: the service's own."""


@dataclass
class Progress:
    """Of a job that is being drawn."""

    task: asyncio.Task[None] | None = None
    step: int = 0
    num_steps: int = 0
    samples_done: int = 0
    preview: tuple[int, Any] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


def _reason(error: BaseException) -> str:
    """Why something failed, in one line; a replica's error comes wrapped."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    cause = getattr(error, "cause", error)
    return (str(cause) or type(cause).__name__).splitlines()[0]


@ray.remote(num_cpus=0.25)
def _land(config: ExperimentConfig, name: str, orders: list[Order], paths: list[Any]) -> str:
    return land(config, name, orders, paths)


@serve.deployment(name="gateway")
@serve.ingress(api)
class Gateway(StoreRoutes, StudyRoutes):
    """Checks requests and hands them to replicas; keeps jobs, uploads and reader studies."""

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        keeper: DeploymentHandle[Any],
        config: ExperimentConfig,
    ) -> None:
        """Takes up the jobs that an earlier gateway left unfinished."""
        self.config, self.keeper = config, keeper
        self.dispatcher = Dispatcher(replicas, config)
        self.folder = service_folder(config)
        self.jobs = JobFolder(self.folder / "jobs", config.serving.keep_results)
        self.uploads = UploadFolder(self.folder / "uploads", config.serving.keep_results)
        self.studies = StudyFolder(self.folder / "studies")
        self.making = asyncio.Lock()
        self.quotas = Quotas()
        self.going: dict[str, Progress] = {}
        self.num_awaited = 0
        self.room = asyncio.Semaphore(self._most_at_once())
        self.streaming: set[asyncio.Task[None]] = set()
        requests, unfinished = METRICS
        self.requests_count = Counter(requests, METRICS[requests], ("kind",))
        self.unfinished_gauge = Gauge(unfinished, METRICS[unfinished])
        for job in self.jobs.unfinished():
            self._begin(job)

    # Who may ask.

    def _admitted(self, bearer: Bearer, *scopes: Scope) -> tuple[str, Grant]:
        """The owner of a token that has one of the scopes; counts the request."""
        owner, grants = None, {}
        if bearer is not None:
            # Tokens are read each time: new ones are known, old ones end, at once.
            grants = load_tokens(self.folder)
            owner = owner_of(grants, bearer.credentials)
        if owner is None:
            raise HTTPException(
                401, "give a token: `Authorization: Bearer ...`", {"WWW-Authenticate": "Bearer"}
            )
        grant = grants[owner]
        if not set(scopes) & set(grant.scopes):
            raise HTTPException(403, f"your token does not have the scope {scopes[0]}")
        self.quotas.request(owner, grant)
        self.requests_count.inc(1, {"kind": scopes[0]})
        return owner, grant

    # What there is.

    @api.get("/v1/health")
    async def health(self) -> dict[str, str]:
        """Whether the service is up; needs no token."""
        return {"status": "up", "version": __version__}

    @api.get("/v1/models", responses=REFUSALS)
    async def models(self, bearer: Bearer = None) -> list[ModelOut]:
        """The models that are served, with their cards."""
        self._admitted(bearer, "draw")
        return self.dispatcher.models()

    @api.post(
        "/v1/uploads",
        responses=REFUSALS,
        status_code=201,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    media: {"schema": {"type": "string", "format": "binary"}}
                    for media in (PNG, NPZ, NIFTI)
                },
            }
        },
    )
    async def upload(
        self,
        request: Request,
        content_type: Annotated[str, Header()] = "",
        bearer: Bearer = None,
    ) -> UploadOut:
        """Takes an array for later requests: labels, a region, or HU of a reference."""
        owner, _ = self._admitted(bearer, "draw")
        packed = await request.body()
        sent = await asyncio.to_thread(read_array, packed, content_type)
        in_use = frozenset(
            str(one.get(part))
            for job in self.jobs.unfinished()
            for one in job.requests
            for part in ("layout", "reference", "region")
        )
        upload = await asyncio.to_thread(self.uploads.add, owner, sent, in_use)
        return UploadOut(id=upload.id, shape=upload.shape, dtype=upload.dtype)

    @api.get(
        "/v1/uploads/{upload_id}",
        responses=REFUSALS | {200: {"content": {NPZ: {}}}},
        response_class=Response,
    )
    async def sent(self, upload_id: str, bearer: Bearer = None) -> Response:
        """An array of yours as it was understood, an NPZ of `array`."""
        owner, _ = self._admitted(bearer, "draw")
        found = await asyncio.to_thread(self.uploads.read, owner, upload_id, "upload")
        return Response(await asyncio.to_thread(packed_array, found.values), media_type=NPZ)

    # Samples and jobs.

    @api.post("/v1/samples", responses=PICTURES, response_class=Response)
    async def sample(
        self,
        body: SampleIn,
        accept: Annotated[str, Header()] = PNG,
        bearer: Bearer = None,
    ) -> Response:
        """Draws a slice while you wait: a PNG in the model's window, an NPZ in HU, or a NIfTI."""
        owner, grant = self._admitted(bearer, "draw")
        self._check_room(self.num_awaited, "samples")
        facts = self.dispatcher.facts_of(body)
        if facts.spatial_dims != 2:
            raise HTTPException(409, "volumes take long: ask for a job at /v1/jobs")
        body = self.dispatcher.seeded(body)
        order = await self._order(secrets.token_hex(16), owner, body)
        self.quotas.check_unfinished(owner, grant, 1)
        self.quotas.draw(owner, grant, int(np.prod(facts.samples.shape)))
        with self.quotas.unfinished(owner, 1), self._awaited():
            hu, batch_shape = await self.dispatcher.draw(order)
        self._stream(order, hu)
        return packed_sample(
            wanted_media(accept, PNG), hu, self.dispatcher.about(order, batch_shape)
        )

    @api.post("/v1/jobs", status_code=202, responses=REFUSALS)
    async def submit(
        self, body: SampleIn, idempotency_key: IdempotencyKey = None, bearer: Bearer = None
    ) -> JobOut:
        """Accepts a sample to be drawn. What is accepted is on the disk, and is drawn."""
        owner, grant = self._admitted(bearer, "draw")
        body = self.dispatcher.seeded(body)
        await self._order("check", owner, body)
        shape = self.dispatcher.facts_of(body).samples.shape
        content = body.model_dump(exclude_none=True)
        return await self._accept(
            owner, grant, "sample", content, idempotency_key, 1, int(np.prod(shape))
        )

    @api.post("/v1/batches", status_code=202, responses=REFUSALS)
    async def batch(
        self, body: BatchIn, idempotency_key: IdempotencyKey = None, bearer: Bearer = None
    ) -> JobOut:
        """Accepts many samples of the recipe's model; they land in its store as one run."""
        owner, grant = self._admitted(bearer, "batch")
        if len(body.requests) > self.config.serving.max_batch:
            raise InputError(
                f"requests: {len(body.requests)} of them; give {self.config.serving.max_batch} at "
                "most, and the rest in another batch"
            )
        seeded = [self.dispatcher.seeded(one) for one in body.requests]
        if any(one.model not in (None, self.dispatcher.default) for one in seeded):
            raise InputError(f"model: a batch is of {self.dispatcher.default} alone")
        if self.jobs.with_key(owner, idempotency_key) is None:
            await asyncio.to_thread(check_landing, self.config, body.name)
        for one in seeded:
            await self._order("check", owner, one)
        content = {
            "name": body.name,
            "requests": [one.model_dump(exclude_none=True) for one in seeded],
        }
        voxels = int(np.prod(self.dispatcher.facts[self.dispatcher.default].samples.shape))
        count = len(seeded)
        return await self._accept(
            owner, grant, "batch", content, idempotency_key, count, count * voxels
        )

    @api.get("/v1/jobs", responses=REFUSALS)
    async def list_jobs(self, bearer: Bearer = None) -> list[JobOut]:
        """Your jobs, the newest first."""
        owner, _ = self._admitted(bearer, "draw", "batch")
        return [self._shown(job) for job in self.jobs.all_of(owner)]

    @api.get("/v1/jobs/{job_id}", responses=REFUSALS)
    async def job(self, job_id: str, bearer: Bearer = None) -> JobOut:
        """How far a job is."""
        return self._shown(self._own_job(job_id, bearer))

    @api.get("/v1/jobs/{job_id}/request", responses=REFUSALS)
    async def asked(self, job_id: str, bearer: Bearer = None) -> SampleIn:
        """What a job of one sample was asked for, with its seed."""
        job = self._own_job(job_id, bearer)
        if job.kind == "batch":
            raise HTTPException(409, "this job is a batch of many requests")
        return SampleIn.model_validate(job.body)

    @api.get("/v1/jobs/{job_id}/adherence", responses=REFUSALS)
    async def adherence(self, job_id: str, bearer: Bearer = None) -> AdherenceOut:
        """Whether a job's sample shows a nodule where one was asked for, measured in HU."""
        _, about = await self._drawn(job_id, bearer)
        if about.get("adherence") is None:
            raise HTTPException(
                409, "nothing was measured: no box was asked for, or there are no HU"
            )
        return AdherenceOut(**about["adherence"])

    @api.get("/v1/jobs/{job_id}/result", responses=PICTURES, response_class=Response)
    async def result(
        self, job_id: str, accept: Annotated[str, Header()] = NPZ, bearer: Bearer = None
    ) -> Response:
        """What a job has drawn: an NPZ in HU, a PNG, or a NIfTI."""
        hu, about = await self._drawn(job_id, bearer)
        return await asyncio.to_thread(packed_sample, wanted_media(accept, NPZ), hu, about)

    @api.get("/v1/jobs/{job_id}/events", responses=REFUSALS, response_class=StreamingResponse)
    async def events(self, job_id: str, bearer: Bearer = None) -> StreamingResponse:
        """Server-sent events: `step`, `preview` if asked for (a PNG in base64), the last state."""
        self._own_job(job_id, bearer)
        return StreamingResponse(self._events(job_id), media_type="text/event-stream")

    @api.delete("/v1/jobs/{job_id}", responses=REFUSALS)
    async def cancel(self, job_id: str, bearer: Bearer = None) -> JobOut:
        """Gives a job up; one that has ended stays as it is."""
        self._own_job(job_id, bearer)
        job = await asyncio.to_thread(self.jobs.change, job_id, "cancelled")
        if (progress := self.going.get(job_id)) is not None and progress.task is not None:
            progress.task.cancel()
        if job.state == "cancelled":
            await asyncio.to_thread(self.jobs.clear, job_id)
        return self._shown(job)

    # Running metrics.

    @api.get("/v1/metrics", responses=REFUSALS)
    async def streams(self, bearer: Bearer = None) -> list[StreamOut]:
        """The streams that you can read: yours, and the service's own."""
        owner, _ = self._admitted(bearer, "metrics")
        own = [StreamOut(**one) for one in await self.keeper.names.remote(owner)]
        served = [StreamOut(name=SERVED, reference="store")] * self.config.serving.metrics
        return [*served, *own]

    @api.post("/v1/metrics/{name}", responses=REFUSALS)
    async def make_metrics(
        self,
        name: Name,
        reference: Annotated[Literal["store", "sent"], Query()] = "store",
        bearer: Bearer = None,
    ) -> MetricsOut:
        """Opens a stream, against the store's test patients or real samples that you send."""
        owner = self._metrics_owner(bearer, name, writes=True)
        return MetricsOut(**await self.keeper.create.remote(owner, name, reference))

    @api.post(
        "/v1/metrics/{name}/samples",
        responses=REFUSALS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {NPZ: {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def push_samples(
        self,
        request: Request,
        name: Name,
        role: Annotated[Literal["real", "synthetic"], Query()] = "synthetic",
        first_row: Annotated[int | None, Query(ge=0, le=10**9)] = None,
        bearer: Bearer = None,
    ) -> dict[str, int]:
        """Counts samples: an NPZ of `hu`, and if known `layout`, `box`, and `patient` of real ones.

        What is acknowledged is kept; rows that were counted before change nothing.
        """
        owner = self._metrics_owner(bearer, name, writes=True)
        packed = await request.body()
        arrays = await asyncio.to_thread(
            read_arrays, packed, {"hu": True, "layout": False, "box": False, "patient": False}
        )
        new = await self.keeper.push.remote(owner, name, role, first_row, **arrays)
        return {"new": new}

    @api.post("/v1/metrics/{name}/run", responses=REFUSALS)
    async def count_run(
        self, name: Name, run: Annotated[str, Query(pattern=NAME)], bearer: Bearer = None
    ) -> dict[str, int]:
        """Counts a synthetic run of the recipe's store."""
        owner = self._metrics_owner(bearer, name, writes=True)
        return {"count": await self.keeper.count_run.remote(owner, name, run)}

    @api.get("/v1/metrics/{name}", responses=REFUSALS)
    async def metrics(self, name: Name, bearer: Bearer = None) -> MetricsOut:
        """FID, KID and MMD by now, with intervals and floors."""
        owner = self._metrics_owner(bearer, name)
        return MetricsOut(**await self.keeper.read.remote(owner, name))

    @api.get("/v1/metrics/{name}/events", responses=REFUSALS, response_class=StreamingResponse)
    async def metrics_events(self, name: Name, bearer: Bearer = None) -> StreamingResponse:
        """Server-sent events: the values whenever samples have come."""
        owner = self._metrics_owner(bearer, name)
        first = await self.keeper.read.remote(owner, name)
        told = self._metrics_events(owner, name, first)
        return StreamingResponse(told, media_type="text/event-stream")

    # How it is done.

    async def _order(
        self, sample_id: str, owner: str, body: SampleIn, preview_every: int | None = None
    ) -> Order:
        read_upload = partial(self.uploads.read, owner)
        make = self.dispatcher.order
        return await asyncio.to_thread(make, sample_id, body, read_upload, preview_every)

    async def _accept(
        self,
        owner: str,
        grant: Grant,
        kind: Literal["sample", "batch"],
        content: dict[str, Any],
        key: str | None,
        count: int,
        voxels: int,
    ) -> JobOut:
        if (known := self.jobs.with_key(owner, key)) is not None:
            return self._shown(known)
        self._check_room(len(self.going), "jobs")
        if kind == "sample":
            self.quotas.check_unfinished(owner, grant, count)
        self.quotas.draw(owner, grant, voxels)
        job, is_new = await asyncio.to_thread(self.jobs.add, owner, kind, content, key)
        if is_new:
            self._begin(job)
        return self._shown(job)

    def _check_room(self, count: int, what: str) -> None:
        """What no replica could take is refused before anything is done for it."""
        serving = self.config.serving
        if count >= serving.max_waiting * (serving.max_replicas or serving.num_replicas):
            raise Busy(f"as many {what} wait as may: try again later")

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """A sample that a client waits for."""
        self.num_awaited += 1
        try:
            yield
        finally:
            self.num_awaited -= 1

    def _own_job(self, job_id: str, bearer: Bearer) -> Job:
        owner, _ = self._admitted(bearer, "draw", "batch")
        job = self.jobs.of(owner, job_id)
        if job is None:
            raise HTTPException(404, "there is no such job of yours")
        return job

    async def _drawn(self, job_id: str, bearer: Bearer) -> tuple[Any, dict[str, Any]]:
        """A job's sample, and what is known of it."""
        job = self._own_job(job_id, bearer)
        if job.state != "done":
            raise HTTPException(
                409, f"the job is {job.state}" + (f": {job.error}" * bool(job.error))
            )
        if job.kind == "batch":
            raise HTTPException(409, f"its samples are in the store: synthetic/{job.body['name']}")
        packed = await asyncio.to_thread(self.jobs.sample_path(job_id, 0).read_bytes)
        return await asyncio.to_thread(of_npz, packed)

    def _shown(self, job: Job) -> JobOut:
        progress, count = self.going.get(job.id) or Progress(), len(job.requests)
        state = "drawing" if job.state == "waiting" and progress.step else job.state
        return JobOut(
            id=job.id,
            kind=job.kind,
            model=job.body.get("model") or self.dispatcher.default,
            state=state,
            asked_at=job.asked_at,
            step=progress.step,
            num_steps=progress.num_steps,
            samples_done=count if job.state == "done" else progress.samples_done,
            num_samples=count,
            seed=job.body.get("seed"),
            run=f"synthetic/{job.body['name']}" if job.kind == "batch" else None,
            error=job.error,
        )

    def _most_at_once(self) -> int:
        """Samples of batches that are with the replicas: enough to fill them, and few who wait."""
        serving = self.config.serving
        replicas = serving.max_replicas or serving.num_replicas
        return 2 * self.config.sampling.batch_size * replicas

    def _begin(self, job: Job) -> None:
        progress = self.going[job.id] = Progress()
        progress.task = asyncio.get_running_loop().create_task(self._run_job(job))
        self.unfinished_gauge.set(len(self.going))

    async def _run_job(self, job: Job) -> None:
        progress = self.going[job.id]
        count = 1 if job.kind == "sample" else 0  # batches have their own limit
        try:
            with ExitStack() as stack:
                stack.enter_context(self.quotas.unfinished(job.owner, count))
                requests = [SampleIn.model_validate(one) for one in job.requests]
                if job.kind == "sample":
                    await self._draw_row(job, 0, requests[0], progress)
                else:
                    await self._draw_batch(job, requests, progress)
            await asyncio.to_thread(self.jobs.change, job.id, "done")
        except Exception as error:
            await asyncio.to_thread(self.jobs.change, job.id, "failed", _reason(error))
        finally:
            self.going.pop(job.id, None)
            self.unfinished_gauge.set(len(self.going))
            progress.changed.set()

    async def _draw_row(self, job: Job, row: int, body: SampleIn, progress: Progress) -> None:
        """Draws one sample of a job, unless an earlier gateway has."""
        path = self.jobs.sample_path(job.id, row)
        if not path.exists():
            every = self.config.serving.preview_every if body.previews else None
            order = await self._order(f"{job.id}-{row}", job.owner, body, preview_every=every)

            def on_news(told: dict[str, Any]) -> None:
                progress.step = told["step"]
                progress.num_steps = told.get("num_steps", progress.num_steps)
                if "preview" in told:
                    window_hu = self.dispatcher.facts[order.model].window_hu
                    progress.preview = (told["step"], png_of(told["preview"], window_hu))
                progress.changed.set()

            hu, batch_shape = await self.dispatcher.draw_at_last(
                order, on_news if job.kind == "sample" else None
            )
            self._stream(order, hu)
            about = self.dispatcher.about(order, batch_shape)
            if job.kind == "sample":
                measure = self.dispatcher.adherence
                about["adherence"] = await asyncio.to_thread(measure, order, hu)
            packed = await asyncio.to_thread(npz_of, hu, about)
            await asyncio.to_thread(self.jobs.put_sample, job.id, row, packed)
        progress.samples_done += 1
        progress.changed.set()

    async def _draw_batch(self, job: Job, requests: list[SampleIn], progress: Progress) -> None:
        """Draws a batch's samples beside whatever else is asked for, then lets them land."""

        async def draw(row: int, body: SampleIn) -> None:
            async with self.room:
                await self._draw_row(job, row, body, progress)

        async with asyncio.TaskGroup() as group:
            for row, body in enumerate(requests):
                group.create_task(draw(row, body))
        orders = [
            await self._order(f"{job.id}-{row}", job.owner, body)
            for row, body in enumerate(requests)
        ]
        paths = [self.jobs.sample_path(job.id, row) for row in range(len(requests))]
        await _land.remote(self.config, job.body["name"], orders, paths)
        await asyncio.to_thread(self.jobs.clear, job.id)

    async def _events(self, job_id: str) -> AsyncIterator[str]:
        shown: tuple[Any, ...] = ()
        shown_preview = None
        while (progress := self.going.get(job_id)) is not None:
            progress.changed.clear()
            told = (progress.step, progress.num_steps, progress.samples_done)
            if told != shown:
                shown = told
                names = ("step", "num_steps", "samples_done")
                yield event("step", dict(zip(names, told, strict=True)))
            if progress.preview is not None and progress.preview != shown_preview:
                step, picture = shown_preview = progress.preview
                content = base64.b64encode(picture).decode()
                yield event("preview", {"step": step, "png": content})
            await progress.changed.wait()
        job = self.jobs.jobs.get(job_id)
        if job is not None:
            yield event(job.state, {"error": job.error})

    def _stream(self, order: Order, hu: Any) -> None:
        """Counts a sample in the service's own stream, and waits for nothing."""
        if not self.config.serving.metrics or order.model != self.dispatcher.default:
            return

        layout, none = order.condition.layout, (-1,) * (2 * hu.ndim)
        arrays = {
            "hu": hu[None],
            "layout": None if layout is None else layout[None],
            "box": np.array([order.condition.box or none], np.int16),
        }

        async def push() -> None:
            await self.keeper.push.remote(SERVICE, SERVED, "synthetic", None, **arrays)

        task = asyncio.get_running_loop().create_task(push())
        self.streaming.add(task)
        task.add_done_callback(self.streaming.discard)

    def _metrics_owner(self, bearer: Bearer, name: str, *, writes: bool = False) -> str:
        """Whose stream is meant: the service's own can be read by all, and written by none."""
        owner, _ = self._admitted(bearer, "metrics")
        if name != SERVED:
            return owner
        if writes:
            raise HTTPException(409, f"{SERVED} is the service's own stream: take another name")
        return SERVICE

    async def _metrics_events(
        self, owner: str, name: str, values: dict[str, Any]
    ) -> AsyncIterator[str]:
        shown = None
        while True:
            if values["counts"] != shown:
                shown = values["counts"]
                yield event("metrics", values)
            await asyncio.sleep(1)
            values = await self.keeper.read.remote(owner, name)
