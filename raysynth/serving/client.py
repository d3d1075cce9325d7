"""A typed client of API v1: ten lines from nothing to an array."""

from __future__ import annotations

import http.client
import io
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NPZ = "application/x-npz"
PROBLEM = "application/problem+json"

RETRY_S = 0.5
"""Until a request is sent again to a service that was not there."""


class Refused(Exception):
    """The service refused a request.

    Attributes:
        status: of HTTP.
        detail: why, in a line.
        field: of the request that is to blame.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.detail = str(problem.get("detail", problem))
        self.field = problem.get("field")
        super().__init__(f"{status}: {self.detail}")


@dataclass(frozen=True)
class Sample:
    """A drawn sample.

    Attributes:
        hu: int16 (y, x) or (z, y, x).
        facts: seed, bundle, batch shape, pixel size.
    """

    hu: NDArray[np.int16]
    facts: dict[str, Any]


class Client:
    """Talks to one service.

    >>> client = Client("http://localhost:8000", token)
    >>> client.sample(seed=7, box=(20, 24, 30, 34)).hu
    """

    def __init__(
        self, url: str, token: str, timeout_s: float = 300.0, patience_s: float = 60.0
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: of the service.
            token: yours.
            timeout_s: for one answer.
            patience_s: for how long to ask again while the service is full, or a process of it is
                replaced; 0: never.
        """
        self.url, self.token, self.timeout_s = url.rstrip("/"), token, timeout_s
        self.patience_s = patience_s

    def models(self) -> list[dict[str, Any]]:
        """What is served."""
        found: list[dict[str, Any]] = json.loads(self._send("GET", "/v1/models"))
        return found

    def sample(self, **request: Any) -> Sample:
        """Draws a slice and waits for it; see `SampleIn` for what may be asked.

        Raises:
            Refused: the service says why.
        """
        return _sample(self._send("POST", "/v1/samples", request, accept=NPZ))

    def submit(self, *, idempotency_key: str | None = None, **request: Any) -> str:
        """Asks for a sample to be drawn in the background; returns the job's id.

        Raises:
            Refused: the service says why.
        """
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        return str(json.loads(self._send("POST", "/v1/jobs", request, headers=headers))["id"])

    def upload(self, array: NDArray[Any]) -> str:
        """Sends labels, a region or HU ahead; returns the id by which requests name it.

        Raises:
            Refused: the service says why.
        """
        body = _npz(array=array)
        headers = {"Content-Type": NPZ}
        return str(json.loads(self._send("POST", "/v1/uploads", body, headers=headers))["id"])

    def batch(
        self,
        name: str,
        requests: Sequence[dict[str, Any]],
        *,
        idempotency_key: str | None = None,
    ) -> str:
        """Asks for many samples, which land in the recipe's store; returns the job's id.

        Raises:
            Refused: the service says why.
        """
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        body = {"name": name, "requests": list(requests)}
        return str(json.loads(self._send("POST", "/v1/batches", body, headers=headers))["id"])

    def wait(self, job_id: str, wait_s: float = 300.0) -> dict[str, Any]:
        """Waits for a job's end; its last state."""
        until = time.monotonic() + wait_s
        while (job := self.job(job_id))["state"] in ("waiting", "drawing"):
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        return job

    def make_metrics(self, name: str, reference: str = "store") -> dict[str, Any]:
        """Opens a stream of metrics, against the store's test patients or samples that are sent."""
        found: dict[str, Any] = json.loads(
            self._send("POST", f"/v1/metrics/{name}?reference={reference}", b"", once=True)
        )
        return found

    def push(self, name: str, role: str = "synthetic", **arrays: NDArray[Any]) -> int:
        """Counts samples in a stream: `hu`, and if known `layout`, `box`, and `patient`."""
        path = f"/v1/metrics/{name}/samples?role={role}"
        told = {"Content-Type": NPZ}
        sent = self._send("POST", path, _npz(**arrays), headers=told, once=True)
        return int(json.loads(sent)["new"])

    def count_run(self, name: str, run: str) -> int:
        """Counts a run of the store in a stream."""
        sent = self._send("POST", f"/v1/metrics/{name}/run?run={run}", b"")
        return int(json.loads(sent)["count"])

    def metrics(self, name: str) -> dict[str, Any]:
        """FID, KID and MMD of a stream by now."""
        found: dict[str, Any] = json.loads(self._send("GET", f"/v1/metrics/{name}"))
        return found

    def make_study(self, **wanted: Any) -> dict[str, Any]:
        """Makes a reader study; see `ReaderStudyIn`. The readers' `links` are told this once."""
        found: dict[str, Any] = json.loads(self._send("POST", "/v1/studies", wanted))
        return found

    def studies(self) -> list[dict[str, Any]]:
        """Your reader studies, the newest first."""
        found: list[dict[str, Any]] = json.loads(self._send("GET", "/v1/studies"))
        return found

    def study(self, study_id: str) -> dict[str, Any]:
        """How far a reader study is, and what it shows by now."""
        found: dict[str, Any] = json.loads(self._send("GET", f"/v1/studies/{study_id}"))
        return found

    def study_answers(self, study_id: str) -> str:
        """The answers of a reader study, as `raysynth reader-study` takes them."""
        return self._send("GET", f"/v1/studies/{study_id}/answers", accept="text/csv").decode()

    def new_link(self, study_id: str, reader: str) -> str:
        """Another link for a reader who lost theirs, which ends."""
        sent = self._send("POST", f"/v1/studies/{study_id}/links", {"reader": reader})
        return str(json.loads(sent)["link"])

    def remove_study(self, study_id: str) -> None:
        """Forgets a reader study, with its copies of images and all answers."""
        self._send("DELETE", f"/v1/studies/{study_id}")

    def job(self, job_id: str) -> dict[str, Any]:
        """How far a job is."""
        found: dict[str, Any] = json.loads(self._send("GET", f"/v1/jobs/{job_id}"))
        return found

    def jobs(self) -> list[dict[str, Any]]:
        """Your jobs, the newest first."""
        found: list[dict[str, Any]] = json.loads(self._send("GET", "/v1/jobs"))
        return found

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Gives a job up."""
        found: dict[str, Any] = json.loads(self._send("DELETE", f"/v1/jobs/{job_id}"))
        return found

    def result(self, job_id: str, wait_s: float = 300.0) -> Sample:
        """What a job has drawn; waits for it.

        Raises:
            Refused: it failed, was cancelled, or takes longer.
        """
        self.wait(job_id, wait_s)
        return _sample(self._send("GET", f"/v1/jobs/{job_id}/result", accept=NPZ))

    def events(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and content of what happens to a job, until it ends."""
        with self._open("GET", f"/v1/jobs/{job_id}/events") as answer:
            name = ""
            for line in answer:
                kind, _, content = line.decode().strip().partition(": ")
                if kind == "event":
                    name = content
                elif kind == "data":
                    yield name, json.loads(content)

    def _send(self, method: str, path: str, body: Any = None, **options: Any) -> bytes:
        content: bytes = self._open(method, path, body, whole=True, **options)
        return content

    def _open(
        self,
        method: str,
        path: str,
        body: Any = None,
        accept: str = "application/json",
        headers: dict[str, str] | None = None,
        once: bool = False,
        whole: bool = False,
    ) -> Any:
        """The answer, or all that it says.

        Asks again, unless that would count twice, while the service is not there.
        """
        told = {"Authorization": f"Bearer {self.token}", "Accept": accept, **(headers or {})}
        content = body if isinstance(body, bytes) else None
        if body is not None and content is None:
            content, told["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.url + path, content, told, method=method)
        until = time.monotonic() + self.patience_s
        while True:
            try:
                answer = urllib.request.urlopen(request, timeout=self.timeout_s)
                return answer.read() if whole else answer
            except urllib.error.HTTPError as error:
                # The gateway's own words are problems; of its death the proxy tells otherwise.
                is_cut = error.code == 500 and error.headers.get_content_type() != PROBLEM
                wait_s = float(error.headers.get("Retry-After", RETRY_S))
                may_ask = error.code == 503 or (is_cut and not once)
                if not may_ask or time.monotonic() + wait_s > until:
                    raise _refused(error) from None
            except (OSError, http.client.HTTPException) as error:  # a process is being replaced
                wait_s = RETRY_S
                if once or time.monotonic() + wait_s > until:
                    raise ConnectionError(f"{self.url} does not answer: {error}") from None
            time.sleep(wait_s)


def _refused(error: urllib.error.HTTPError) -> Refused:
    text = error.read().decode(errors="replace")
    try:
        problem = json.loads(text)
    except ValueError:
        problem = {"detail": text or error.reason}
    return Refused(error.code, problem)


def _npz(**arrays: NDArray[Any]) -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    return packed.getvalue()


def _sample(packed: bytes) -> Sample:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return Sample(arrays["hu"], json.loads(str(arrays["facts"])))
