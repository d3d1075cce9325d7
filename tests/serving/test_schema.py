"""Requests made from the service's own description, sound and broken: it never fails by them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from ray import serve

from raysynth.config import ExperimentConfig
from raysynth.serving.app import application
from raysynth.serving.arrays import NIFTI, NPZ, PNG
from raysynth.serving.replica import service_folder
from raysynth.serving.tokens import Grant, add_token
from raysynth.session import connect
from tests.sampling.crashing_run import drawing_config, make_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PORT = 8125
URL = f"http://127.0.0.1:{PORT}"
EXAMPLES = 2000 if os.environ.get("RAYSYNTH_ALL_FAULTS") else 15
"""Of each operation and kind."""


@schemathesis.serializer(PNG, NPZ, NIFTI)
def as_bytes(context: object, value: object) -> bytes:
    """Whatever is sent in place of an array."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a running service, without quotas that would end the test."""
    config: ExperimentConfig = drawing_config(Path(tmp_path_factory.mktemp("described")))
    make_bundle(config)
    grant = Grant(requests_per_minute=10**9, max_unfinished=10**9, voxels_per_hour=10**15)
    told = add_token(service_folder(config), "someone", grant)
    with connect(num_cpus=3):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(config), name="raysynth")
        yield told
        serve.shutdown()


def test_no_request_makes_the_service_fail(token: str) -> None:
    schema = schemathesis.openapi.from_url(f"{URL}/openapi.json")
    session, sent, failed = requests.Session(), 0, []
    session.headers["Authorization"] = f"Bearer {token}"
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                nonlocal sent
                if case.path.endswith("/events"):
                    return  # streams of jobs that are not there are refused, and others do not end
                answer = case.call(base_url=URL, session=session, timeout=60)
                sent += 1
                if answer.status_code >= 500 and answer.status_code != 503:
                    failed.append(
                        (case.method, case.path, answer.status_code, case.as_curl_command())
                    )

            with suppress(Unsatisfiable):  # what takes nothing cannot be asked wrongly
                send()
    assert failed == []
    assert sent >= 10 * EXAMPLES
