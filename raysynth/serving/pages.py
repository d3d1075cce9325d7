"""The service's web pages: files of the package, the same for everybody, with no data in them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Response

MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

FILES = {
    path.name: path.read_bytes()
    for path in sorted(Path(__file__).with_name("web").iterdir())
    if path.suffix in MEDIA
}
"""Read once: whatever a client names is looked up here, and no path is made of it."""

POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Of the pages: nothing but the service's own files runs or is asked for."""

pages = APIRouter(include_in_schema=False)

KnownTag = Annotated[str, Header(alias="if-none-match")]


@pages.get("/studio")
async def studio(known: KnownTag = "") -> Response:
    """Where one draws, looks, and compares."""
    return page("studio.html", known)


@pages.get("/reader")
async def reader(known: KnownTag = "") -> Response:
    """Where a reader of a study answers: all that is told of them stands behind the address's #."""
    return page("reader.html", known)


@pages.get("/reader/results")
async def results(known: KnownTag = "") -> Response:
    """Where the owner of reader studies makes and evaluates them."""
    return page("results.html", known)


@pages.get("/web/{name}")
async def part(name: str, known: KnownTag = "") -> Response:
    """A script, a style or a picture of a page."""
    return page(name, known)


def page(name: str, known: str = "") -> Response:
    """One of the files; nothing but a note where the browser has it already.

    Args:
        name: of the file.
        known: the tag of the browser's copy.

    Raises:
        HTTPException: there is no such file.
    """
    content = FILES.get(name)
    if content is None:
        raise HTTPException(404, "there is no such page")
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    if tag in known:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=MEDIA[Path(name).suffix])
