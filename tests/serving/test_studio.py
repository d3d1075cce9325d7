"""The studio as somebody uses it: a real service, and a real browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from imagecodecs import png_decode, png_encode
from ray import serve

from jobs.benchmarks.random_bundle import make_bundle as make_random_bundle
from raysynth.condition import Condition
from raysynth.config import ExperimentConfig
from raysynth.config.serving import ServingConfig
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.prompt import WORDS
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.planner import NO_SOURCE, PlannedSample
from raysynth.serving.app import application
from raysynth.serving.arrays import NIFTI, NPZ, PNG, npz_of, read_array
from raysynth.serving.client import Client, Refused
from raysynth.serving.landing import land
from raysynth.serving.replica import Order, service_folder
from raysynth.serving.tokens import Grant, add_token
from raysynth.session import connect
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from tests.browser import FAINT, UNNAMED, Page, browser, needs_chromium
from tests.sampling.crashing_run import drawing_config, make_bundle
from tests.serving.test_gateway import of_volumes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PORT = 8127
URL = f"http://127.0.0.1:{PORT}"
BOX = (12, 14, 18, 20)
RUN = "shown"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    config = drawing_config(Path(tmp_path_factory.mktemp("studio")))
    make_bundle(config)
    volumes = of_volumes(config)
    make_random_bundle(volumes, volumes.bundle_path)
    serving = ServingConfig(bundles=(volumes.bundle_path,), preview_every=2)
    return config.model_copy(update={"serving": serving})


@pytest.fixture(scope="module")
def client(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Of a service whose store has a run of six samples, four of them with a nodule."""
    token = add_token(service_folder(config), "someone")
    with connect(num_cpus=4):
        ingest(config)
        shard(config)
        land_run(config, tmp_path_factory.mktemp("drawn"))
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(config), name="raysynth")
        yield Client(URL, token, timeout_s=60)
        serve.shutdown()


def land_run(config: ExperimentConfig, folder: Path) -> None:
    rng, asked = np.random.default_rng(0), [(0, 2 + row % 2, 0, 0, 0) for row in range(4)]
    conditions = [*(Condition(box=BOX, attributes=scores) for scores in asked), *[Condition()] * 2]
    orders, paths = [], []
    for row, condition in enumerate(conditions):
        orders.append(Order(config.bundle_path.name, f"s{row}", row, condition))
        paths.append(folder / f"{row}.npz")
        hu = rng.integers(-1000, 400, (32, 32)).astype(np.int16)
        paths[-1].write_bytes(npz_of(hu, {"batch_shape": 8}))
    land(config, RUN, orders, paths)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where downloads land."""
    return Path(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def tab(client: Client, folder: Path) -> Iterator[Page]:
    """A tab of a browser. What its pages did wrong, or asked elsewhere, shows at the end."""
    with browser(folder) as open_page:
        page = open_page()
        yield page
        page.evaluate("0")
        assert {address.split("/")[2] for address in page.requests if "//" in address} == {
            f"127.0.0.1:{PORT}"
        }
        # A refusal is told in the page, and by the browser itself, too.
        assert [one for one in page.problems if "Failed to load resource" not in one] == []


@pytest.fixture
def page(tab: Page, client: Client) -> Page:
    """The studio with a token, fresh."""
    tab.goto(f"{URL}/studio#token={client.token}")
    tab.wait_for("document.body.dataset.ready")
    return tab


def get(client: Client, path: str, accept: str = "application/json") -> requests.Response:
    headers = {"Authorization": f"Bearer {client.token}", "Accept": accept}
    return requests.get(URL + path, headers=headers, timeout=60)


# What the pages ask of the service.


def test_pages_of_a_run_are_those_of_the_store(config: ExperimentConfig, client: Client) -> None:
    shown = {run["name"]: run for run in get(client, "/v1/runs").json()}
    assert shown[RUN]["num_samples"] == 6
    assert shown[RUN]["shape"] == [32, 32]
    path = f"/v1/runs/{RUN}/samples"
    boxed = get(client, f"{path}?has_nodule=true&margin=3").json()
    assert [one["row"] for one in boxed["samples"]] == [1, 3]
    assert boxed["samples"][0]["box"] == list(BOX)
    assert boxed["samples"][0]["attributes"] == {"margin": 3}
    second = get(client, f"{path}?count=2&first=2").json()
    assert (second["num_fitting"], [one["row"] for one in second["samples"]]) == (6, [2, 3])
    found = get(client, f"{path}?found=true").json()["num_fitting"]
    assert found + get(client, f"{path}?found=false").json()["num_fitting"] == 4
    for refused in ("count=101", "first=-1", "margin=6", "by=copy_score", "other=1"):
        assert get(client, f"{path}?{refused}").status_code == 422
    run = SampleSet(open_group(open_root(config.store_url), f"synthetic/{RUN}"))
    whole = read_array(get(client, f"{path}/2", NIFTI).content, NIFTI)
    np.testing.assert_array_equal(whole.values, run.read("hu", 2, 3)[0])
    assert get(client, f"{path}/2").headers["X-Raysynth-Synthetic"] == "yes"
    assert get(client, f"{path}/6").status_code == 422
    assert get(client, "/v1/runs/nothing/samples").status_code == 422


def test_references_are_not_called_synthetic(config: ExperimentConfig, client: Client) -> None:
    samples = SampleSet(open_group(open_root(config.store_url), f"samples/{config.samples.name}"))
    assert get(client, "/v1/references").json()["num_samples"] == samples.count
    page = get(client, "/v1/references/samples?count=3&has_nodule=true").json()
    row = page["samples"][0]["row"]
    given = samples.index["ratings"][row]
    margins = given[given[:, 4] > 0, 4]
    assert page["samples"][0]["attributes"]["margin"] == int(np.median(margins))
    picture = get(client, f"/v1/references/samples/{row}", PNG)
    assert picture.headers["X-Raysynth-Synthetic"] == "no"
    assert png_decode(picture.content).shape == (32, 32)


def test_the_store_is_shown_to_those_who_may_see_it(
    config: ExperimentConfig, client: Client
) -> None:
    few = Client(URL, add_token(service_folder(config), "few", Grant(scopes=("draw",))))
    for path in ("/v1/runs", "/v1/references/samples/0", f"/v1/runs/{RUN}/samples"):
        assert get(few, path).status_code == 403


def test_a_job_tells_what_was_asked_and_what_was_measured(
    config: ExperimentConfig, client: Client
) -> None:
    job = client.submit(seed=7, box=BOX, attributes={"margin": 4}, batch_shape=8)
    drawn = client.result(job)
    asked = get(client, f"/v1/jobs/{job}/request").json()
    assert (asked["seed"], asked["box"], asked["attributes"]) == (7, list(BOX), {"margin": 4})
    sampler = BundleSampler(config.bundle_path, config.sampling, config.seed)
    planned = PlannedSample("x", 7, Condition(box=BOX), NO_SOURCE)
    (own,) = sampler.measure(drawn.hu[None], [planned])
    told = get(client, f"/v1/jobs/{job}/adherence").json()
    assert told["found"] == own.found
    assert told["contrast_hu"] == pytest.approx(own.contrast_hu)
    assert told["requested_diameter_mm"] == pytest.approx(6 * config.samples.pixel_mm)
    if own.mask is not None:
        assert told["diameter_mm"] == pytest.approx(own.diameter_mm)
        assert told["mean_hu"] == pytest.approx(drawn.hu[own.mask].mean())
    plain = client.submit(seed=1)
    client.result(plain)
    with pytest.raises(Refused, match="no box was asked for"):
        client._send("GET", f"/v1/jobs/{plain}/adherence")


def test_models_say_what_they_follow(client: Client) -> None:
    slices, volumes = client.models()
    assert slices["hears"] == ["box", "attributes", "layout", "reference"]
    assert volumes["hears"] == ["layout", "reference"]
    assert slices["words"]["texture"][0] == WORDS["texture"][0][0]
    assert slices["num_inference_steps"] == 4


def test_an_upload_comes_back_as_it_was_understood(client: Client) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (32, 32)).astype(np.int16)
    sent = client.upload(hu)
    np.testing.assert_array_equal(
        read_array(get(client, f"/v1/uploads/{sent}", NPZ).content, NPZ).values, hu
    )
    assert get(client, f"/v1/uploads/{'0' * 32}").status_code == 422


def test_own_streams_are_listed(config: ExperimentConfig, client: Client) -> None:
    client.make_metrics("mine", "sent")
    other = Client(URL, add_token(service_folder(config), "another"))
    other.make_metrics("theirs", "sent")
    assert get(client, "/v1/metrics").json() == [{"name": "mine", "reference": "sent"}]


# The pages.


@needs_chromium
def test_it_opens_at_once_and_asks_for_a_token(tab: Page, client: Client) -> None:
    tab.goto(f"{URL}/studio")
    tab.evaluate("sessionStorage.clear()")
    tab.reload()
    tab.wait_for("document.querySelector('#token-dialog[open]')")
    first = "performance.getEntriesByName('first-contentful-paint')[0]"
    tab.wait_for(first)
    assert tab.evaluate(f"{first}.startTime") <= 1000
    tab.fill("#token-field", "wrong")
    tab.press("Enter")
    tab.wait_for("document.querySelector('#token-dialog[open]')?.textContent.includes('not know')")
    tab.fill("#token-field", client.token)
    tab.press("Enter")
    tab.wait_for("document.body.dataset.ready")
    assert "not for diagnosis" in tab.text("header .notice").lower()
    # One in the address is kept, and taken out of sight.
    tab.goto(f"{URL}/studio#token={client.token}")
    assert "token" not in tab.evaluate("location.href")


@needs_chromium
def test_a_sample_is_asked_for_watched_compared_and_saved(
    page: Page, client: Client, folder: Path
) -> None:
    page.click("[name=reference][value=store]")
    page.wait_for("document.querySelector('#reference-facts').textContent")
    assert "reference (real or uploaded)" in page.text("#stage figcaption")
    page.click("[data-tool=box]")
    page.drag("#stage canvas", (0.5, 0.5), (0.58, 0.6))
    side = int(page.evaluate("document.querySelector('#box-side').value"))
    assert 2 <= side <= 8
    page.fill("#score-margin", "4")
    page.fill("#steps", "60")
    page.click("#sample")
    page.wait_for("document.querySelector('#progress').position > 0")
    page.wait_for("document.querySelector('#stage').innerText.includes('What it would be by now')")
    page.wait_for("document.querySelector('#cancel').hidden")
    page.wait_for("!document.querySelector('#has-result').hidden")
    job = client.jobs()[0]
    asked = get(client, f"/v1/jobs/{job['id']}/request").json()
    y0, x0, y1, x1 = asked["box"]
    assert (y1 - y0, x1 - x0) == (side, side)
    assert asked["attributes"] == {"margin": 4}
    assert "synthetic · research only, not for diagnosis" in page.text("#stage figcaption")
    told = get(client, f"/v1/jobs/{job['id']}/adherence").json()
    assert ("not found" not in page.text("#adherence-facts")) == told["found"]
    for way, words in (("difference", "orange"), ("swipe", "left: reference"), ("beside", "")):
        page.click(f"[data-compare={way}]")
        page.wait_for(f"document.querySelector('#stage').innerText.includes('{words}')")
    assert page.evaluate("document.querySelectorAll('#stage canvas').length") == 2
    # Outside the box the reference stays.
    reference = get(client, "/v1/references/samples/0", NIFTI).content
    drawn = client.result(job["id"]).hu
    outside = np.ones(drawn.shape, bool)
    outside[y0:y1, x0:x1] = False
    np.testing.assert_array_equal(drawn[outside], read_array(reference, NIFTI).values[outside])
    page.click("[data-download='image/png']")
    path = folder / f"synthetic_{job['model']}_{job['seed']}.png"
    until = time.monotonic() + 10
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert path.read_bytes() == get(client, f"/v1/jobs/{job['id']}/result", PNG).content


@needs_chromium
def test_a_painted_layout_is_what_the_service_gets(page: Page, client: Client) -> None:
    page.click("#paint-layout")
    page.drag("#stage canvas", (0.4, 0.4), (0.6, 0.4))
    page.click("[data-label='5']")
    page.drag("#stage canvas", (0.5, 0.7), (0.52, 0.7))
    page.drag("#stage canvas", (0.3, 0.7), (0.32, 0.7))
    page.press("z")
    page.click("#sample")
    page.wait_for("!document.querySelector('#has-result').hidden")
    asked = get(client, f"/v1/jobs/{client.jobs()[0]['id']}/request").json()
    layout = read_array(get(client, f"/v1/uploads/{asked['layout']}", NPZ).content, NPZ).values
    assert layout.shape == (32, 32)
    assert set(np.unique(layout)) == {0, 1, 5}
    assert (layout[22, 16], layout[22, 9]) == (5, 0)


@needs_chromium
def test_a_running_job_is_found_again_and_can_be_given_up(page: Page, client: Client) -> None:
    page.fill("#steps", "250")
    page.click("#sample")
    page.wait_for("document.querySelector('#progress').position > 0")
    job = client.jobs()[0]["id"]
    page.reload()
    page.wait_for("document.querySelector('#progress').position > 0")
    assert page.evaluate("document.querySelector('#steps').value") == "250"
    page.click("#cancel")
    page.wait_for("document.querySelector('#progress-words').textContent === 'Cancelled.'")
    assert client.job(job)["state"] == "cancelled"


@needs_chromium
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("words.png", b"no picture", "This is no PNG"),
        ("words.txt", b"no picture", "is no PNG, NPZ or NIfTI"),
        ("large.png", png_encode(np.zeros((40, 40), np.uint8)), "resample or crop it"),
    ],
    ids=["no-png", "no-image", "other-size"],
)
def test_a_bad_file_is_told_beside_its_field(
    page: Page, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    page.click("[name=reference][value=file]")
    page.upload("#file", path)
    page.wait_for("document.querySelector('#reference-error').textContent")
    assert message in page.text("#reference-error")
    assert page.evaluate("document.querySelector('#file').getAttribute('aria-invalid')") == "true"


@needs_chromium
def test_the_gallery_shows_what_fits(page: Page) -> None:
    shown = "document.querySelectorAll('#thumbnails img[src]').length"
    page.click("#to-gallery")
    page.wait_for(f"{shown} === 6")
    page.fill("#filter-margin", "3")
    page.wait_for(f"{shown} === 2")
    assert "2 of 6 samples" in page.text("#gallery-count")
    assert "not for diagnosis" in page.text("#gallery-count")
    page.click("#thumbnails li:nth-child(2) button")
    page.wait_for("document.querySelector('dialog.large')")
    page.click("dialog.large [value=ask]")
    page.wait_for("!document.querySelector('#draw').hidden")
    fields = "['y', 'x', 'side'].map((one) => Number(document.querySelector(`#box-${one}`).value))"
    assert page.evaluate(fields) == [BOX[0], BOX[1], BOX[2] - BOX[0]]
    assert page.evaluate("document.querySelector('#score-margin').value") == "3"


@needs_chromium
def test_volumes_show_three_planes_that_keys_step_through(
    page: Page, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "volume.npz"
    np.savez(path, array=np.arange(16**3, dtype=np.int16).reshape(16, 16, 16) - 1000)
    name = client.models()[1]["name"]
    page.fill("#model", name)
    assert page.evaluate("document.querySelector('#has-result').hidden")
    page.click("[name=reference][value=file]")
    page.upload("#file", path)
    page.wait_for("document.querySelectorAll('#stage canvas').length === 3")
    page.wait_for("document.querySelector('#reference-facts').textContent.includes('volume.npz.')")
    page.click("#paint-layout")
    page.drag("#stage canvas", (0.4, 0.5), (0.6, 0.5))
    page.evaluate("document.querySelector('#stage canvas').focus()")
    before = int(page.evaluate("document.querySelector('#plane').value"))
    page.press("ArrowUp")
    assert int(page.evaluate("document.querySelector('#plane').value")) == before + 1
    page.press("b")
    page.press("ArrowRight")
    page.press("ArrowRight", modifiers=8)
    corners = "['z', 'y', 'x', 'side'].map((one) => document.querySelector(`#box-${one}`).value)"
    z, y, x, side = map(int, page.evaluate(corners))
    page.click("#sample")
    page.wait_for("!document.querySelector('#has-result').hidden", within_s=60)
    job = client.jobs()[0]
    asked = get(client, f"/v1/jobs/{job['id']}/request").json()
    assert asked["box"] == [z, y, x, z + side, y + side, x + side]
    assert client.result(job["id"]).hu.shape == (16, 16, 16)


@needs_chromium
def test_metrics_come_as_samples_do(page: Page, client: Client) -> None:
    client.make_metrics("live", "sent")
    rng = np.random.default_rng(0)
    real = rng.integers(-900, 100, (12, 32, 32)).astype(np.int16)
    client.push("live", "real", hu=real)
    page.click("#to-metrics")
    page.wait_for(
        "[...document.querySelectorAll('#stream option')].some((o) => o.value === 'live')"
    )
    page.fill("#stream", "live")
    page.wait_for("document.querySelector('#metrics-counts').textContent.includes('0 synthetic')")
    client.push("live", hu=real[::-1].copy())
    page.wait_for("document.querySelectorAll('.metric').length > 0")
    values = client.metrics("live")["metrics"]
    assert page.evaluate("document.querySelectorAll('.metric').length") == len(values)
    assert "12 synthetic and 12 real" in page.text("#metrics-counts")


@needs_chromium
@pytest.mark.parametrize("view", ["draw", "gallery", "metrics"])
def test_everything_is_named_legible_and_in_order(page: Page, view: str) -> None:
    page.click(f"#to-{view}")
    page.wait_for(f"!document.querySelector('#{view}').hidden")
    if view == "draw":
        page.click("#has-box")
        page.click("[data-tool=paint]")
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(FAINT) == []
    page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    page.evaluate("document.body.tabIndex = -1, document.body.focus()")
    places = []
    for _ in range(40):
        page.press("Tab")
        place = page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        if places and place <= places[-1]:
            break
        places.append(place)
    reachable = page.evaluate(
        "new Set([...document.querySelectorAll('button, select, input, textarea, canvas, a')]"
        ".filter((one) => one.checkVisibility() && !one.disabled)"
        ".map((one) => one.type === 'radio' ? one.name : one)).size"
    )
    assert len(places) >= min(40, reachable)


@needs_chromium
def test_written_arrays_are_read_by_numpy_and_back(page: Page, client: Client) -> None:
    script = """(async () => {
      const { writeNpz, readNpz } = await import("/web/npz.js");
      const values = Int16Array.from({ length: 24 }, (_, at) => at * 1000 - 12000);
      const packed = writeNpz("array", { values, shape: [2, 3, 4] });
      const { array } = await readNpz(packed);
      return [[...packed], [...array.values], array.shape];
    })()"""
    packed, values, shape = page.evaluate(script)
    expected = (np.arange(24) * 1000 - 12000).astype(np.int16).reshape(2, 3, 4)
    np.testing.assert_array_equal(read_array(bytes(packed), NPZ).values, expected)
    assert (values, shape) == (expected.ravel().tolist(), [2, 3, 4])
