"""What the web pages are served as."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from raysynth.serving.api import make_api
from raysynth.serving.pages import FILES


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(make_api())


@pytest.mark.parametrize(
    "path", ["/studio", "/reader", "/reader/results", *(f"/web/{name}" for name in FILES)]
)
def test_pages_run_nothing_but_their_own_files(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    text = answer.text
    assert "<style" not in text
    assert "<script>" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["..%2Fapi.py", "%2Fetc%2Fpasswd", "nothing.js", "../pages.py"])
def test_other_files_are_none_of_the_pages(client: TestClient, name: str) -> None:
    assert client.get(f"/web/{name}").status_code == 404
