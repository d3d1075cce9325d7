"""Reader studies as their owners and readers meet them: over HTTP, and in a real browser."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from raysynth.cli import main
from raysynth.config import ExperimentConfig
from raysynth.serving.app import application
from raysynth.serving.client import Client, Refused
from raysynth.serving.study_items import ReaderStudyIn, choose_items
from raysynth.serving.tokens import Grant, add_token
from raysynth.session import connect
from tests.browser import FAINT, UNNAMED, Page, browser, needs_chromium
from tests.sampling.crashing_run import drawing_config, make_bundle
from tests.serving.study_store import RUN, make_store

pytestmark = pytest.mark.ray

PORT = 8129
URL = f"http://127.0.0.1:{PORT}"
CHANGING = ("date", "x-request-id", "content-length")
"""Headers that are of no kind of item: the length is compared by itself."""

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
    make_store(config)
    return config


@pytest.fixture(scope="module")
def client(config: ExperimentConfig) -> Iterator[Client]:
    folder = config.work_dir / "serving"
    token = add_token(folder, "someone")
    with connect(num_cpus=3):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(config), name="raysynth")
        yield Client(URL, token, timeout_s=60)
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
    items = choose_items(config, ReaderStudyIn(**wanted))
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
    seen, marks = [], {"real": set(), "synthetic": set()}
    while where["item"] is not None:
        item = where["item"]["id"]
        headers, image = reader.image(item)
        path = f"/v1/reader/items/{item}"
        status, told, content = reader.send("PUT", path, {"answer": "real"})
        answered = json.loads(content)
        if where["item"]["is_calibration"]:
            assert answered["truth"] == known[image]
        else:
            assert answered["truth"] is None
            assert b"synthetic" not in content
            shown = [
                sorted((name, value) for name, value in one.items() if name not in CHANGING)
                for one in (headers, told)
            ]
            length = len(content) - len(str(answered["reader"]["answered"]))
            marks[known[image]].add(str((shown, len(image), length, status)))
        seen.append((item, image))
        where = answered["reader"]
    # The last two answers are shorter: nothing comes after them. Their kinds are chance.
    assert len(marks["real"] | marks["synthetic"]) <= 3
    assert marks["real"] & marks["synthetic"]
    assert len({item for item, _ in seen}) == 17
    counted = {image for _, image in seen[2:]}
    assert [known[image] for image in counted].count("real") == 6
    assert len(counted) == 12
    assert reader.send("GET", f"/v1/reader/items/{seen[5][0]}/image")[0] == 404


def test_results_are_those_of_the_command_line(
    config: ExperimentConfig,
    client: Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = WANTED | {"task": "rating", "per_kind": 8}
    study, known = client.make_study(**wanted), truths(config, wanted)
    assert client.study(study["id"])["found"] is None
    told = links(study)
    read_all(told["anna"], lambda image, _: known[image], lambda _, place: 1 + place % 5)
    read_all(told["ben"], lambda _, place: ("real", "synthetic")[place % 2], lambda *_: 3)
    path = tmp_path / "answers.csv"
    path.write_text(client.study_answers(study["id"]))
    assert main(["reader-study", str(path), "--json"]) == 0
    shown = client.study(study["id"])
    assert shown["found"] == json.loads(capsys.readouterr().out)
    assert shown["found"]["readers"]["anna"]["share"] == 1
    assert shown["found"]["readers"]["ben"]["share"] < 1
    assert [one["answered"] for one in shown["study"]["progress"]] == [22, 22]


@pytest.mark.slow
def test_an_answer_outlives_the_gateway_and_a_link_leads_back(client: Client) -> None:
    link = links(client.make_study(**WANTED))["anna"]
    reader = ReaderClient(link)
    first = reader.where()["item"]["id"]
    after = reader.answer(first, "synthetic")["reader"]
    kill("gateway")
    for _ in range(100):
        try:
            assert ReaderClient(link).where() == after
            break
        except (AssertionError, OSError):  # it is not back yet
            time.sleep(0.3)
    assert ReaderClient(link).where() == after
    again = reader.answer(first, "real")
    assert (again["answer"], again["reader"]) == ("synthetic", after)


def kill(deployment: str) -> None:
    """Ends a process of the service, as a lost node would."""
    (actor,) = [
        one
        for one in ray.util.list_named_actors(all_namespaces=True)
        if f"#{deployment}#" in one["name"]
    ]
    ray.kill(ray.get_actor(actor["name"], actor["namespace"]), no_restart=False)


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"run": "nobody"}, "run", "the store has no 'nobody'"),
        ({"run": "../x"}, "run", "pattern"),
        ({"split": "all"}, "split", "'train', 'val' or 'test'"),
        ({"per_kind": 400}, "per_kind", "401 items of each kind are needed"),
        ({"per_kind": 0}, "per_kind", "greater than or equal to 1"),
        ({"readers": []}, "readers", "at least 1 item"),
        ({"readers": ["anna", "anna"]}, "readers", "twice"),
        ({"readers": ["=cmd()"]}, "readers.0", "pattern"),
        ({"repeat_share": 0.5}, "repeat_share", "0.3"),
        ({"match": ["colour"]}, "match.0", "has_nodule"),
        ({"task": "guess"}, "task", "'choice' or 'rating'"),
        ({"delta": 0.3}, "delta", "not permitted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_studies_are_refused_by_field(
    client: Client, changed: dict[str, Any], field: str, words: str
) -> None:
    before = len(client.studies())
    with pytest.raises(Refused, match=words) as refused:
        client.make_study(**WANTED | changed)
    assert (refused.value.status, refused.value.field) == (422, field)
    assert len(client.studies()) == before


def test_strangers_see_nothing(config: ExperimentConfig, client: Client) -> None:
    study = client.make_study(**WANTED)
    link = links(study)["anna"]
    for odd in ("#", f"#{study['id']}.", "#x.y", link[:-1], f"#{client.token}"):
        assert ReaderClient(odd).send("GET", "/v1/reader")[0] == 401
    another = Client(URL, add_token(config.work_dir / "serving", "another"))
    drawing = add_token(config.work_dir / "serving", "drawing", Grant(scopes=("draw",)))
    assert another.studies() == []
    calls = (another.study, another.study_answers, another.remove_study)
    for call in (*calls, lambda one: another.new_link(one, "anna")):
        with pytest.raises(Refused) as refused:
            call(study["id"])
        assert refused.value.status == 404
    with pytest.raises(Refused, match="does not have the scope study"):
        Client(URL, drawing).make_study(**WANTED)
    with pytest.raises(Refused) as refused:  # a reader is no owner
        Client(URL, link.partition("#")[2]).study(study["id"])
    assert refused.value.status == 401


def test_bad_answers_are_refused_and_nothing_is_kept(client: Client) -> None:
    told = links(client.make_study(**WANTED))
    anna, ben = ReaderClient(told["anna"]), ReaderClient(told["ben"])
    where = anna.where()
    own, after = (f"/v1/reader/items/{where[name]['id']}" for name in ("item", "after"))
    of_ben = f"/v1/reader/items/{ben.where()['item']['id']}"
    for path, body, status, words in (
        (of_ben, {"answer": "real"}, 409, "none of your items"),
        (after, {"answer": "real"}, 409, "answer those before it first"),
        ("/v1/reader/items/x", {"answer": "real"}, 422, "item_id"),
        (own, {"answer": "perhaps"}, 422, "answer"),
        (own, {"answer": "real", "rating": 3}, 422, "rating: this study asks for none"),
        (own, {}, 422, "answer"),
        (own, "hello", 422, "body"),
    ):
        told_status, _, content = anna.send("PUT", path, body)
        assert told_status == status, content
        assert words in content.decode()
    assert anna.where() == where
    assert anna.send("GET", f"{of_ben}/image")[0] == 404
    rated = ReaderClient(links(client.make_study(**WANTED | {"task": "rating"}))["anna"])
    path = f"/v1/reader/items/{rated.where()['item']['id']}"
    assert b"rating: give 1 to 5" in rated.send("PUT", path, {"answer": "real"})[2]
    assert rated.send("PUT", path, {"answer": "real", "rating": 6})[0] == 422


def test_a_lost_link_is_replaced_and_a_study_removed(client: Client) -> None:
    study = client.make_study(**WANTED)
    old = ReaderClient(links(study)["anna"])
    after = old.answer(old.where()["item"]["id"], "real")["reader"]
    new = ReaderClient(client.new_link(study["id"], "anna"))
    assert old.send("GET", "/v1/reader")[0] == 401
    assert new.where() == after
    with pytest.raises(Refused, match="carl is none of this study") as refused:
        client.new_link(study["id"], "carl")
    assert refused.value.field == "reader"
    client.remove_study(study["id"])
    assert new.send("GET", "/v1/reader")[0] == 401
    assert study["id"] not in [one["id"] for one in client.studies()]


def seen_well(page: Page) -> None:
    """Whatever is in sight has a name and can be read."""
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(FAINT) == []


def next_focus(page: Page) -> str:
    page.press("Tab")
    focused = "document.activeElement"
    return str(page.evaluate(f"{focused}.id || {focused}.dataset.answer || {focused}.tagName"))


def shown_item(page: Page) -> str:
    page.wait_for("document.body.dataset.item !== undefined")
    return str(page.evaluate("document.body.dataset.item"))


@pytest.mark.slow
@needs_chromium
def test_a_reader_answers_by_keyboard_and_the_owner_sees_what_it_shows(
    client: Client, tmp_path: Path
) -> None:
    wanted = WANTED | {"readers": ["anna"], "per_kind": 8, "title": "In a browser"}
    study = client.make_study(**wanted)
    link, total = links(study)["anna"], 22  # 2 for calibration, 16 that count, 4 of them twice
    with browser(tmp_path) as open_page:
        page = open_page()
        page.goto(URL + link)
        page.wait_for("document.body.dataset.ready")
        seen_well(page)
        assert "is not told" in page.text("#start")
        page.evaluate("document.querySelector('#consent').focus()")
        page.press(" ")
        assert next_focus(page) == "begin"
        page.press("Enter")
        for place in range(total):
            item = shown_item(page)
            if place in (0, 5):
                seen_well(page)
                assert [next_focus(page) for _ in range(2)] == ["real", "synthetic"]
            else:
                page.press("Enter")  # nothing is chosen: nothing happens
            if place == 9:
                where = page.text("#place")
                page.reload()
                assert shown_item(page) == item
                assert page.text("#place") == where == "Image 8 of 20"
                page.click("#pause")
                seen_well(page)
                assert "image 8 of 20" in page.text("#paused")
                page.press("Enter")
            page.press("s" if place % 3 else "r")
            page.press("Enter")
            if place < 2:
                page.wait_for("!document.querySelector('#truth').hidden")
                assert page.text("#truth").startswith("It is ")
                page.press("Enter")
            gone = f"document.body.dataset.item !== '{item}'"
            page.wait_for(f"{gone} || !document.querySelector('#finish').hidden")
        page.wait_for("!document.querySelector('#finish').hidden")
        seen_well(page)
        assert page.problems == []

        page.goto(f"{URL}/reader/results#token={client.token}&study={study['id']}")
        page.wait_for("document.querySelector('#verdict') !== null")
        seen_well(page)
        found = client.study(study["id"])["found"]
        right = f"{found['pooled']['share']:.3f} ({found['pooled']['right']} of 16)"
        assert right in page.text("#readers")
        assert found["sentences"][1] in page.text("#verdict")
        assert "token=" not in page.evaluate("location.href")
        page.click("#download")
        (saved,) = wait_for_files(tmp_path, "reader-study-*.csv")
        assert saved.read_text() == client.study_answers(study["id"])
        assert len(saved.read_text().splitlines()) == 1 + 20

        page.click("#new-study")
        page.wait_for("document.querySelector('#runs').children.length > 0")
        page.fill("[name=per_kind]", "400")
        page.click("#make-submit")
        page.wait_for("document.querySelector('#make-error').textContent !== ''")
        assert page.evaluate("document.activeElement.name") == "per_kind"
        assert [one for one in page.problems if "422" not in one] == []
        page.fill("[name=per_kind]", "4")
        page.click("#make-submit")
        page.wait_for("document.querySelector('dialog.links') !== null")
        seen_well(page)
        shown = str(page.evaluate("document.querySelector('.links input').value"))
        assert ReaderClient(shown).where()["total"] == 12
        hosts = {one.split("/")[2] for one in page.requests if one.startswith("http")}
        assert hosts == {f"127.0.0.1:{PORT}"}


def wait_for_files(folder: Path, pattern: str) -> list[Path]:
    for _ in range(100):
        if found := list(folder.glob(pattern)):
            return found
        time.sleep(0.1)
    return []
