"""The service as its clients meet it: a real Ray Serve on this machine, spoken to over HTTP."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import ray
from imagecodecs import png_decode, png_encode
from ray import serve

from jobs.benchmarks.random_bundle import make_bundle as make_random_bundle
from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config import ExperimentConfig
from raysynth.config.serving import ServingConfig
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.export.verify import verify
from raysynth.models.bundle import bundle_digest
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.planner import NO_SOURCE, PlannedSample
from raysynth.serving.api import MAX_BODY_BYTES
from raysynth.serving.app import application
from raysynth.serving.arrays import DICOM
from raysynth.serving.client import Client, Refused
from raysynth.serving.quotas import OverQuota, Quotas
from raysynth.serving.tokens import Grant, add_token, load_tokens, owner_of
from raysynth.session import connect
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.validate import validate
from tests.sampling.crashing_run import drawing_config, make_bundle

pytestmark = pytest.mark.ray

PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
BOX, SCORES = (12, 14, 18, 20), {"margin": 4, "texture": 2}
VOLUMES = {
    "samples": {"kind": "patches", "name": "cubes", "size": 16, "field_of_view_mm": 32.0},
    "model": {
        "family": "layout_diffusion",
        "channels": (8, 8),
        "attention_levels": (False, False),
        "num_res_blocks": 1,
        "num_head_channels": 8,
        "norm_num_groups": 4,
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    config = drawing_config(Path(tmp_path_factory.mktemp("service")))
    make_bundle(config)
    other = config.bundle_path.with_name("other")
    shutil.copytree(config.bundle_path, other)
    volumes = of_volumes(config)
    make_random_bundle(volumes, volumes.bundle_path)
    serving = ServingConfig(bundles=(other, volumes.bundle_path), metrics=True)
    return config.model_copy(update={"serving": serving})


def of_volumes(config: ExperimentConfig) -> ExperimentConfig:
    """The same recipe for cubes of 16 voxels along a side."""
    values = config.model_dump()
    values["data"]["samples"] = VOLUMES["samples"]
    return ExperimentConfig.model_validate(
        values | {"model": VOLUMES["model"], "bundle": str(config.bundle_path.with_name("volumes"))}
    )


@pytest.fixture(scope="module")
def client(config: ExperimentConfig) -> Iterator[Client]:
    token = add_token(config.work_dir / "serving", "someone")
    add_token(config.work_dir / "serving", "another")
    with connect(num_cpus=3):
        ingest(config)
        shard(config)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(config), name="raysynth")
        yield Client(URL, token, timeout_s=60)
        serve.shutdown()


def alone(config: ExperimentConfig, seed: int) -> np.ndarray:
    """What a batch run draws for the same request."""
    attributes = (0, 4, 0, 0, 2)
    planned = PlannedSample("x", seed, Condition(box=BOX, attributes=attributes), NO_SOURCE)
    return BundleSampler(config.bundle_path, config.sampling, config.seed).draw([planned])[0]


def test_a_seed_gives_the_sample_of_a_batch_run(config: ExperimentConfig, client: Client) -> None:
    drawn = client.sample(seed=7, box=BOX, attributes=SCORES)
    assert np.abs(drawn.hu.astype(int) - alone(config, 7)).max() <= 1
    pinned = client.sample(seed=7, box=BOX, attributes=SCORES, batch_shape=8)
    np.testing.assert_array_equal(pinned.hu, alone(config, 7))
    assert pinned.facts["batch_shape"] == 8
    assert drawn.facts["seed"] == 7
    assert drawn.facts["synthetic"] is True
    assert drawn.facts["bundle"] == bundle_digest(config.bundle_path)
    # As many slots as pay on this machine; other batch shapes round otherwise, unless pinned.
    assert drawn.facts["batch_shape"] in (1, 2, 4, 8)
    assert client.sample().facts["seed"] != client.sample().facts["seed"]


def asked(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_a_picture_in_the_window_says_that_it_is_synthetic(
    config: ExperimentConfig, client: Client
) -> None:
    body = json.dumps({"seed": 7, "box": BOX, "attributes": SCORES, "batch_shape": 8})
    status, headers, content = asked(
        "POST",
        "/v1/samples",
        body,
        Authorization=f"Bearer {client.token}",
        **{"Content-Type": "application/json"},
    )
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert headers["X-Raysynth-Synthetic"] == "yes"
    hu = alone(config, 7).astype(float)
    grey = np.clip((hu + 1000) / 3500, 0, 1) * 255
    np.testing.assert_allclose(png_decode(content), grey, atol=0.51)


def test_a_layout_is_a_picture(client: Client) -> None:
    layout = np.full((32, 32), 4, np.uint8)
    layout[8:28, 8:28] = 1
    packed = base64.b64encode(png_encode(layout)).decode()
    assert client.sample(seed=1, layout_png=packed, box=BOX).hu.shape == (32, 32)


def test_a_job_is_drawn_told_of_and_kept(config: ExperimentConfig, client: Client) -> None:
    job = client.submit(seed=7, box=BOX, attributes=SCORES, batch_shape=8, idempotency_key="once")
    assert client.submit(seed=9, idempotency_key="once") == job
    told = list(client.events(job))
    np.testing.assert_array_equal(client.result(job).hu, alone(config, 7))
    assert told[-1][0] == "done"
    shown = client.job(job)
    assert (shown["state"], shown["seed"]) == ("done", 7)
    assert client.jobs()[0]["id"] == job


def test_a_cancelled_job_ends_and_others_go_on(client: Client) -> None:
    long = client.submit(seed=1, num_inference_steps=250)
    assert client.cancel(long)["state"] == "cancelled"
    assert client.sample(seed=2).hu.shape == (32, 32)
    with pytest.raises(Refused, match="the job is cancelled"):
        client.result(long)


def test_nobody_sees_what_is_another_s(config: ExperimentConfig, client: Client) -> None:
    job = client.submit(seed=1)
    stranger = Client(URL, "wrong")
    for call in (stranger.models, stranger.jobs, lambda: stranger.sample(seed=1)):
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.status == 401
    assert asked("GET", "/v1/health")[0] == 200
    for odd in ("0" * 32, "..", "%2e%2e%2ftokens", job[:-1]):
        with pytest.raises(Refused) as refused:
            client.job(odd)
        assert refused.value.status == 404


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"box": [0, 0, 900, 900]}, "box"),
        ({"box": [1, 2, 3]}, "box"),
        ({"box": [40, 40, 20, 20]}, "box"),
        ({"attributes": {"colour": 3}}, "attributes"),
        ({"attributes": {"margin": 9}}, "attributes.margin"),
        ({"num_inference_steps": 251}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"layout_png": "%%%"}, "layout_png"),
        ({"layout_png": base64.b64encode(b"GIF89a" * 9).decode()}, "layout_png"),
        (
            {"layout_png": base64.b64encode(png_encode(np.zeros((9, 9), "u1"))).decode()},
            "layout_png",
        ),
        ({"file": "/etc/passwd"}, "file"),
        ({"seed": -1}, "seed"),
        ({"model": "nobody"}, "model"),
        ({"layout": "0" * 32}, "layout"),
        ({"layout": "../tokens"}, "layout"),
        ({"region": "0" * 32}, "region"),
        ({"sampler": "magic"}, "sampler"),
        ({"guidance_scale": 3, "batch_shape": 3}, "batch_shape"),
    ],
)
def test_bad_requests_name_the_field_at_once(
    client: Client, request_: dict[str, Any], field: str
) -> None:
    client.models()  # a connection of the client's making is not what is timed
    started = time.monotonic()
    for call in (client.sample, client.submit):
        with pytest.raises(Refused) as refused:
            call(**request_)
        assert refused.value.status == 422
        assert refused.value.field == field
    assert time.monotonic() - started < 1


def test_large_bodies_are_refused_unread(client: Client) -> None:
    told = {"Authorization": f"Bearer {client.token}", "Content-Type": "application/json"}
    status, headers, content = asked("POST", "/v1/jobs", b" " * (MAX_BODY_BYTES + 1), **told)
    assert status == 413
    assert headers["Content-Type"] == "application/problem+json"
    assert json.loads(content)["title"] == "too large"


def test_the_api_describes_itself(client: Client) -> None:
    status, _, content = asked("GET", "/openapi.json")
    paths = json.loads(content)["paths"]
    assert status == 200
    assert {"/v1/samples", "/v1/jobs", "/v1/jobs/{job_id}/events"} <= set(paths)
    model, other, volumes = client.models()
    assert other["name"] == "other"
    assert model["shape"] == [32, 32]
    assert (volumes["shape"], volumes["depth_mm"]) == ([16, 16, 16], 2.0)
    assert "Research only" in model["card"]


def kill(deployment: str) -> None:
    """Ends a process of the service, as a lost node would."""
    (actor,) = [
        one
        for one in ray.util.list_named_actors(all_namespaces=True)
        if f"#{deployment}#" in one["name"]
    ]
    ray.kill(ray.get_actor(actor["name"], actor["namespace"]), no_restart=False)


def test_an_accepted_job_outlives_the_gateway(config: ExperimentConfig, client: Client) -> None:
    jobs = [
        client.submit(seed=7, box=BOX, attributes=SCORES, num_inference_steps=steps, batch_shape=8)
        for steps in (4, 200)
    ]
    kill("gateway")
    for _ in range(100):
        try:
            drawn = [client.result(job, wait_s=60) for job in jobs]
            break
        except (Refused, OSError):  # it is not back yet
            time.sleep(0.5)
    np.testing.assert_array_equal(drawn[0].hu, alone(config, 7))
    assert [one["state"] for one in client.jobs()[:2]] == ["done", "done"]


def test_what_a_lost_replica_had_is_drawn_again(config: ExperimentConfig, client: Client) -> None:
    job = client.submit(seed=7, box=BOX, attributes=SCORES, num_inference_steps=200, batch_shape=8)
    while client.job(job)["step"] == 0:
        time.sleep(0.05)
    kill("replica")
    drawn = client.result(job, wait_s=60)
    planned = PlannedSample("x", 7, Condition(box=BOX, attributes=(0, 4, 0, 0, 2)), NO_SOURCE)
    sampling = config.sampling.model_copy(update={"num_inference_steps": 200})
    expected = BundleSampler(config.bundle_path, sampling, config.seed).draw([planned])[0]
    np.testing.assert_array_equal(drawn.hu, expected)


def test_another_model_and_sampler_may_be_asked_for(client: Client) -> None:
    one = client.sample(seed=3, model="other", sampler="unipc", batch_shape=8)
    assert one.facts["model"] == "other"
    same = client.sample(seed=3, sampler="unipc", batch_shape=8)
    np.testing.assert_array_equal(one.hu, same.hu)
    assert (one.hu != client.sample(seed=3, sampler="ddim", batch_shape=8).hu).any()


def test_a_reference_stays_but_for_the_region(client: Client) -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(-1000, 300, (32, 32)).astype(np.int16)
    region = np.zeros((32, 32), np.uint8)
    region[10:20, 12:22] = 1
    sent = {"reference": client.upload(reference), "region": client.upload(region)}
    drawn = client.sample(seed=1, **sent)
    np.testing.assert_array_equal(drawn.hu[region == 0], reference[region == 0])
    assert (drawn.hu[region == 1] != reference[region == 1]).any()
    assert drawn.facts["copied_fraction"] == pytest.approx(1 - 100 / 1024)
    with pytest.raises(Refused, match="no such upload of yours"):
        client.sample(reference="0" * 32, region=sent["region"])


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("image/png", b"GIF89a" * 9),
        ("application/x-npz", b"PK" + b"x" * 99),
        ("application/x-nifti", b"\x1f\x8b" + b"x" * 99),
        ("application/x-nifti", b""),
        ("text/plain", b"hello"),
    ],
)
def test_what_is_no_array_is_refused(client: Client, content_type: str, body: bytes) -> None:
    told = {"Authorization": f"Bearer {client.token}", "Content-Type": content_type}
    status, _, content = asked("POST", "/v1/uploads", body, **told)
    assert status == 422
    assert json.loads(content)["field"] in ("body", "content-type")


def test_a_volume_is_drawn_around_what_is_known(
    config: ExperimentConfig, client: Client, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(-1000, 300, (16, 16, 16)).astype(np.int16)
    layout = np.zeros((16, 16, 16), np.uint8)
    layout[4:12, 3:11, 2:10] = Label.LEFT_LUNG
    sent = {"layout": client.upload(layout), "reference": client.upload(reference)}
    with pytest.raises(Refused, match="/v1/jobs"):
        client.sample(model="volumes", **sent)
    job = client.submit(model="volumes", seed=5, batch_shape=2, **sent)
    drawn = client.result(job)
    np.testing.assert_array_equal(drawn.hu[layout == 0], reference[layout == 0])
    assert drawn.facts["copied_fraction"] == pytest.approx(1 - 8**3 / 16**3)
    known = Condition(layout=layout, known_hu=reference, known_mask=layout == 0)
    sampler = BundleSampler(of_volumes(config).bundle_path, config.sampling, config.seed)
    (alone,) = sampler.with_slots(2).draw([PlannedSample("x", 5, known, NO_SOURCE)])
    np.testing.assert_array_equal(drawn.hu, alone)
    told = {"Authorization": f"Bearer {client.token}", "Accept": "application/x-nifti"}
    status, _, content = asked("GET", f"/v1/jobs/{job}/result", **told)
    assert status == 200
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, drawn.hu)
    assert image.header.get_zooms() == (2.0, 2.0, 2.0)
    status, _, content = asked("GET", f"/v1/jobs/{job}/result", **told | {"Accept": DICOM})
    assert status == 200
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
    assert [one.verdict for one in verify(tmp_path)] == ["valid"] * 16
    planes = [pydicom.dcmread(path) for path in sorted(tmp_path.iterdir())]
    np.testing.assert_array_equal(np.stack([one.pixel_array for one in planes]), drawn.hu)
    assert {one.SyntheticData for one in planes} == {"YES"}


def test_results_come_as_nifti(client: Client) -> None:
    body = json.dumps({"seed": 7})
    told = {"Authorization": f"Bearer {client.token}", "Content-Type": "application/json"}
    status, headers, content = asked(
        "POST", "/v1/samples", body, Accept="application/x-nifti", **told
    )
    assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    assert image.shape == (32, 32, 1)
    assert b"synthetic" in image.header["descrip"].item()
    hu = client.sample(seed=7).hu
    np.testing.assert_array_equal(np.asarray(image.dataobj)[..., 0].T, hu)


def test_previews_come_while_a_job_is_drawn(client: Client) -> None:
    job = client.submit(seed=1, num_inference_steps=100, previews=True)
    told = list(client.events(job))
    assert {name for name, _ in told} >= {"step", "preview", "done"}
    picture = next(content["png"] for name, content in told if name == "preview")
    assert png_decode(base64.b64decode(picture)).shape == (32, 32)


def test_a_batch_lands_in_the_store(config: ExperimentConfig, client: Client) -> None:
    requests = [{"seed": seed, "box": BOX, "attributes": SCORES} for seed in range(12)]
    job = client.batch("asked", requests, idempotency_key="twelve")
    assert client.batch("asked", requests, idempotency_key="twelve") == job
    ended = client.wait(job)
    assert (ended["state"], ended["error"]) == ("done", None)
    assert (ended["samples_done"], ended["run"]) == (12, "synthetic/asked")
    run = SampleSet(open_group(open_root(config.store_url), "synthetic/asked"))
    assert run.index["seed"].tolist() == list(range(12))
    assert (run.index["attributes"] == (0, 4, 0, 0, 2)).all()
    shape = int(run.index["batch_shape"][0])
    again = client.sample(seed=3, box=BOX, attributes=SCORES, batch_shape=shape)
    np.testing.assert_array_equal(run.read("hu", 3, 4)[0], again.hu)
    assert validate(config.store_url, full=True) == []
    with pytest.raises(Refused, match="has such a run already") as refused:
        client.batch("asked", requests)
    assert refused.value.field == "name"


def test_metrics_are_pushed_read_and_kept(config: ExperimentConfig, client: Client) -> None:
    rng = np.random.default_rng(0)
    real, other = (rng.normal(mean, 200, (40, 32, 32)).astype(np.int16) for mean in (0, 300))
    client.make_metrics("trial", "sent")
    assert client.push("trial", "real", hu=real) == 40
    assert client.push("trial", hu=other[:20]) == 20
    first = client.metrics("trial")
    assert first["counts"] == {"real": 40, "synthetic": 20}
    keys = {key.split("/")[0] for key in first["metrics"]}
    assert keys == {"fid", "kid", "mmd2"}
    fid = next(value for key, value in first["metrics"].items() if key.startswith("fid/"))
    assert fid["low"] < fid["value"] < fid["high"]
    assert fid["value"] > fid["floor"]
    kill("metrics")
    for _ in range(60):
        try:
            assert client.metrics("trial") == first
            break
        except (Refused, OSError):
            time.sleep(0.5)
    assert client.push("trial", hu=other[20:]) == 20
    assert client.metrics("trial")["counts"]["synthetic"] == 40
    with pytest.raises(Refused, match="give \\(n, 32, 32\\)"):
        client.push("trial", hu=other[:, :16])
    with pytest.raises(Refused, match="no such stream"):
        client.metrics("nothing")


def test_what_is_served_is_measured(client: Client) -> None:
    before = client.metrics("served")["counts"]
    assert before["real"] > 0
    client.sample(seed=99)
    for _ in range(50):
        if client.metrics("served")["counts"]["synthetic"] > before["synthetic"]:
            break
        time.sleep(0.1)
    assert client.metrics("served")["counts"]["synthetic"] > before["synthetic"]
    with pytest.raises(Refused) as refused:
        client.push("served", hu=np.zeros((1, 32, 32), np.int16))
    assert refused.value.status == 409


def test_scopes_and_quotas_hold(config: ExperimentConfig, client: Client) -> None:
    folder = config.work_dir / "serving"
    few = Client(URL, add_token(folder, "few", Grant(scopes=("draw",), requests_per_minute=3)))
    with pytest.raises(Refused, match="scope metrics") as refused:
        few.metrics("served")
    assert refused.value.status == 403
    for _ in range(3):
        few.models()
    with pytest.raises(Refused, match="requests_per_minute") as refused:
        few.models()
    assert refused.value.status == 429
    small = Client(URL, add_token(folder, "small", Grant(voxels_per_hour=1500)))
    small.sample(seed=1)
    with pytest.raises(Refused, match="voxels_per_hour"):
        small.sample(seed=1)
    narrow = Client(URL, add_token(folder, "narrow", Grant(max_unfinished=1)))
    long = narrow.submit(seed=1, num_inference_steps=250)
    with pytest.raises(Refused, match="max_unfinished"):
        narrow.submit(seed=2)
    narrow.cancel(long)


def test_tokens_are_kept_as_hashes(tmp_path: Path) -> None:
    token = add_token(tmp_path, "a")
    other = add_token(tmp_path, "b")
    tokens = load_tokens(tmp_path)
    text = (tmp_path / "tokens.json").read_text()
    assert token not in text
    assert (tmp_path / "tokens.json").stat().st_mode & 0o077 == 0
    assert owner_of(tokens, token) == "a"
    assert owner_of(tokens, other) == "b"
    assert [owner_of(tokens, one) for one in ("", token[:-1], token + " ")] == [None] * 3
    again = add_token(tmp_path, "a")
    assert owner_of(load_tokens(tmp_path), token) is None
    assert owner_of(load_tokens(tmp_path), again) == "a"


def test_quotas_come_back_with_time() -> None:
    now = 0.0
    quotas, grant = Quotas(lambda: now), Grant(requests_per_minute=2)
    for _ in range(2):
        quotas.request("a", grant)
    with pytest.raises(OverQuota) as over:
        quotas.request("a", grant)
    assert over.value.retry_after_s == 30
    quotas.request("b", grant)
    now = 30.0
    quotas.request("a", grant)
    with pytest.raises(OverQuota):
        quotas.request("a", grant)
