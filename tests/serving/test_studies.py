"""Reader studies as their owners and readers meet them: over HTTP, and in a real browser."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve

from raysynth.cli import main
from raysynth.config import ExperimentConfig
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.errors import InputError
from raysynth.evaluation.reader_study import reader_study
from raysynth.serving.app import application
from raysynth.serving.client import Client, Refused
from raysynth.serving.studies import Given, Study, StudyFolder, WrongItem, order
from raysynth.serving.study_items import StudyIn, choose_items
from raysynth.serving.tokens import Grant, add_token
from raysynth.session import connect
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from storage_schema.v1 import SPLITS
from tests.sampling.crashing_run import drawing_config, make_bundle

pytestmark = pytest.mark.ray

PORT = 8127
URL = f"http://127.0.0.1:{PORT}"
RUN, BOX = "shown", (12, 14, 18, 20)
WANTED: dict[str, Any] = {
    "run": RUN,
    "readers": ["anna", "ben"],
    "per_kind": 6,
    "calibration": 1,
    "repeat_share": 0.25,
    "seed": 3,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    config = drawing_config(Path(tmp_path_factory.mktemp("studied")))
    make_bundle(config)
    return config


@pytest.fixture(scope="module")
def client(config: ExperimentConfig) -> Iterator[Client]:
    """Of a service whose store has a run of 40 samples."""
    folder = config.work_dir / "serving"
    token = add_token(folder, "someone")
    with connect(num_cpus=3):
        ingest(config)
        shard(config)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(config), name="raysynth")
        client = Client(URL, token, timeout_s=60)
        requests = [{"seed": seed, **({"box": BOX} if seed % 2 else {})} for seed in range(40)]
        assert client.wait(client.batch(RUN, requests))["state"] == "done"
        yield client
        serve.shutdown()


class ReaderClient:
    """One who has a link."""

    def __init__(self, link: str) -> None:
        self.secret = link.partition("#")[2]

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        told = {"Authorization": f"Bearer {self.secret}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), told)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.headers), content

    def where(self) -> dict[str, Any]:
        status, _, content = self.send("GET", "/v1/reader")
        assert status == 200, content
        return dict(json.loads(content))

    def image(self, item: str) -> tuple[dict[str, str], bytes]:
        status, headers, content = self.send("GET", f"/v1/reader/items/{item}/image")
        assert status == 200, content
        return headers, content

    def answer(self, item: str, answer: str, **more: Any) -> dict[str, Any]:
        status, _, content = self.send(
            "PUT", f"/v1/reader/items/{item}", {"answer": answer, **more}
        )
        assert status == 200, content
        return dict(json.loads(content))


def links(study: dict[str, Any]) -> dict[str, str]:
    return {one["reader"]: one["link"] for one in study["links"]}


def truths(config: ExperimentConfig, wanted: dict[str, Any]) -> dict[bytes, str]:
    """What each image of a study is, by its bytes."""
    items = choose_items(config, StudyIn(**wanted))
    kinds = ("real", "synthetic")
    return {
        image.tobytes(): kinds[drawn]
        for image, drawn in zip(items.images, items.is_synthetic, strict=True)
    }


def read_all(link: str, say: Any, rate: Any = None) -> list[dict[str, Any]]:
    """Answers everything; `say(image, place)` gives the answer, `rate` likewise."""
    reader, told = ReaderClient(link), []
    where = reader.where()
    while where["item"] is not None:
        item, place = where["item"]["id"], where["answered"]
        _, image = reader.image(item)
        more = {} if rate is None else {"rating": rate(image, place)}
        told.append(reader.answer(item, say(image, place), **more))
        where = told[-1]["reader"]
    return told


def test_readers_learn_nothing_of_what_they_see(config: ExperimentConfig, client: Client) -> None:
    known = truths(config, WANTED)
    reader = ReaderClient(links(client.make_study(**WANTED))["anna"])
    where = reader.where()
    assert (where["total"], where["num_calibration"]) == (17, 2)  # 12 that count, 3 of them twice
    seen, shapes = [], {"real": set(), "synthetic": set()}
    while where["item"] is not None:
        item = where["item"]["id"]
        headers, image = reader.image(item)
        kind = known[image]
        status, told, content = reader.send("PUT", f"/v1/reader/items/{item}", {"answer": "real"})
        answered = json.loads(content)
        if where["item"]["is_calibration"]:
            assert answered["truth"] == kind
        else:
            assert answered["truth"] is None
            assert b"synthetic" not in content
            marks = [name for name in headers if name.lower() not in ("date", "x-request-id")]
            digits = len(str(answered["reader"]["answered"]))
            shapes[kind].add((tuple(sorted(marks)), len(image), digits, status))
        seen.append((item, image))
        where = answered["reader"]
    assert shapes["real"] == shapes["synthetic"]
    assert len({item for item, _ in seen}) == 17
    assert len({image for _, image in seen}) == 14
    counting = [known[image] for _, image in dict.fromkeys(seen[2:])]
    assert {kind: counting.count(kind) for kind in shapes} != {}
    assert reader.send("GET", f"/v1/reader/items/{seen[5][0]}/image")[0] == 404


def test_items_are_real_and_drawn_ones_of_the_store(
    config: ExperimentConfig, client: Client
) -> None:
    items = choose_items(config, StudyIn(**WANTED))
    root = open_root(config.store_url)
    real = SampleSet(open_group(root, f"samples/{config.samples.name}"))
    rows = np.flatnonzero(real.index["split"] == SPLITS.index("test"))
    low, high = items.value_range
    stored = {
        "real": [real.read("hu", row, row + 1)[0].clip(low, high).tobytes() for row in rows],
        "synthetic": [
            one.clip(low, high).tobytes()
            for one in SampleSet(open_group(root, f"synthetic/{RUN}")).read("hu")
        ],
    }
    for image, kind in truths(config, WANTED).items():
        assert image in stored[kind]
        assert image not in stored["real" if kind == "synthetic" else "synthetic"]
    assert items.is_synthetic[:2].count(True) == 1
    assert items.is_synthetic[2:].count(True) == 6
    again = choose_items(config, StudyIn(**WANTED))
    np.testing.assert_array_equal(items.images, again.images)
    other = choose_items(config, StudyIn(**WANTED | {"seed": 4}))
    assert (items.images != other.images).any()


def test_matched_items_have_the_same_properties(config: ExperimentConfig, client: Client) -> None:
    wanted = WANTED | {"match": ["has_nodule"], "per_kind": 4, "calibration": 0}
    items = choose_items(config, StudyIn(**wanted))
    root, counts = open_root(config.store_url), []
    for is_synthetic, path in enumerate((f"samples/{config.samples.name}", f"synthetic/{RUN}")):
        stored = SampleSet(open_group(root, path))
        known = {
            hu.clip(*items.value_range).tobytes(): int(has)
            for hu, has in zip(stored.read("hu"), stored.index["has_nodule"], strict=True)
        }
        shown = np.array(items.is_synthetic) == bool(is_synthetic)
        counts.append(sorted(known[image.tobytes()] for image in items.images[shown]))
    assert counts[0] == counts[1]
    assert set(counts[0]) == {0, 1}
