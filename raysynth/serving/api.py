"""The HTTP application: problem descriptions, limits, and headers that every answer has."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.exceptions import HTTPException as StarletteHTTPException

from raysynth.errors import InputError
from raysynth.serving.pages import pages
from raysynth.serving.quotas import OverQuota
from raysynth.serving.runner import Busy
from raysynth.serving.schemas import BatchIn, Problem, SampleIn
from raysynth.serving.study_items import ReaderStudyIn

MAX_BODY_BYTES = 4_000_000
"""Of a request, refused before anything is decoded."""

MAX_UPLOAD_BYTES = 300_000_000
"""Of an array: 512^3 voxels of 16 bits."""

UPLOADS = ("/v1/uploads", "/v1/metrics")
"""Below these paths bodies are arrays."""

RETRY_AFTER_S = 2

PROBLEM = "application/problem+json"

LOST = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    NodeDiedError,
    DeploymentUnavailableError,
)
"""What is raised where a process of the service is lost; another takes its place."""

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""Of every answer: nobody guesses its type, frames it, or keeps it."""

_FIELDS = {
    *(name for body in (SampleIn, BatchIn, ReaderStudyIn) for name in body.model_fields),
    *("body", "content-type", "rating", "reader"),
}


def problem(
    status: int, title: str, detail: str, field: str | None = None, retry_after_s: int | None = None
) -> JSONResponse:
    """An answer that says what is wrong."""
    content = Problem(title=title, status=status, detail=detail, field=field).model_dump()
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse(content, status, headers, media_type=PROBLEM)


class Limits:
    """Refuses large bodies while they come in, and gives every answer its headers (ASGI)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Ray Serve's headers can be read once.
        scope = {**scope, "headers": list(scope["headers"])}
        most = MAX_UPLOAD_BYTES if scope["path"].startswith(UPLOADS) else MAX_BODY_BYTES

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                more = [
                    (name.encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.encode() not in there
                ]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        told = dict(scope["headers"]).get(b"content-length", b"0")
        if int(told) > most if told.isdigit() else True:
            response = problem(413, "too large", f"give {most:,} bytes at most", "body")
            await response(scope, receive, marked)
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, f"give {most:,} bytes at most")
            return message

        await self.app(scope, counted, marked)


def make_api() -> FastAPI:
    """An application with no routes but those of the web pages."""
    api = FastAPI(
        title="raysynth",
        version="1",
        summary="Synthetic lung CT. Research only: whatever comes from here shows no patient.",
    )
    api.add_middleware(Limits)
    api.include_router(pages)

    @api.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> JSONResponse:
        detail = str(getattr(error, "cause", error))  # a replica's comes wrapped
        first = detail.split(maxsplit=1)[0].rstrip(":")
        return problem(422, "this cannot be done", detail, first if first in _FIELDS else None)

    @api.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return problem(503, "busy", str(error), retry_after_s=RETRY_AFTER_S)

    async def lost(request: Request, error: Exception) -> JSONResponse:
        told = "a process of the service was lost and is started again: try again later"
        return problem(503, "busy", told, retry_after_s=RETRY_AFTER_S)

    for kind in LOST:
        api.add_exception_handler(kind, lost)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return problem(500, "failed", "the service made a mistake, which its log tells")

    @api.exception_handler(OverQuota)
    async def over_quota(request: Request, error: OverQuota) -> JSONResponse:
        return problem(429, "over quota", str(error), retry_after_s=error.retry_after_s)

    @api.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        answer = problem(error.status_code, "refused", str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return problem(422, "invalid request", f"{field}: {first['msg']}", field)

    return api
