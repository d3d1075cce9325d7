"""A few of the faults that a release is put to: what holds whatever the machine's speed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.benchmarks.serving_faults import Service, deployed, disconnects, kills, repeats

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with deployed(Path(tmp_path_factory.mktemp("faults"))) as service:
        yield service


def test_one_key_starts_one_job(service: Service) -> None:
    assert repeats(service, 10).broken == []


def test_slots_of_lost_clients_are_freed(service: Service) -> None:
    figures = disconnects(service, 25).figures
    # A slot that was kept would be busy for 25 times as long as the sample after it takes.
    assert figures["late_ms"]["p50"] < 10 * figures["probe_ms"]


def test_no_accepted_job_is_lost(service: Service) -> None:
    figures = kills(service, 2, every_s=8).figures
    assert figures["jobs"] > 0
    assert (figures["lost"], figures["wrong"], figures["asked_again_failed"]) == (0, 0, 0)
