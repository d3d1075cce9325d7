"""A real browser that tests drive: Chromium without a window, over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)

KEYS = {"ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Enter": 13}
KEYS |= {"Escape": 27, "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34, " ": 32}

START_S = 30.0


class PageError(AssertionError):
    """Something that the page ran has failed, or did not come in time."""


class Page:
    """A tab.

    Attributes:
        problems: errors on its console, and exceptions that nobody caught.
        requests: addresses that it asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.problems: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                thrown = details.get("exception", {}).get("description", details["text"])
                self.problems.append(thrown)
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                told = [str(one.get("value", one.get("description"))) for one in params["args"]]
                self.problems.append(" ".join(told))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    def goto(self, url: str) -> None:
        """Opens an address, and waits until it is loaded; afresh, if only its fragment is new."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        """Loads the page anew."""
        self.evaluate("window.isOld = true")
        self.send("Page.reload")
        self.wait_for("!window.isOld && document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression, waited for where it is a promise."""
        answer = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait_for(self, script: str, within_s: float = 20.0) -> None:
        """Waits until an expression is true."""
        until = time.monotonic() + within_s
        while True:
            try:
                if self.evaluate(f"Boolean({script})"):
                    return
            except PageError as error:
                # The page may be between two documents.
                if time.monotonic() > until or "context" not in str(error).lower():
                    raise
            if time.monotonic() > until:
                raise PageError(f"not within {within_s:g} s: {script}; problems: {self.problems}")
            time.sleep(0.05)

    def place_of(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, scrolled into sight."""
        found = self.evaluate(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            " if (!one) return null; one.scrollIntoView({block: 'nearest'});"
            " const box = one.getBoundingClientRect();"
            " return [box.left, box.top, box.width, box.height]; })()"
        )
        if found is None or not found[2]:
            raise PageError(f"{selector}: nothing to be seen")
        left, top, width, height = found
        return left, top, width, height

    def click(self, selector: str, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Presses and releases the mouse at a share of an element's width and height."""
        self.drag(selector, at, at)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draws the mouse from one place of an element to another, both in shares of it."""
        left, top, width, height = self.place_of(selector)
        places = [(left + width * x, top + height * y) for x, y in (start, end)]
        (x0, y0), (x1, y1) = places
        self._mouse("mouseMoved", x0, y0, buttons=0)
        self._mouse("mousePressed", x0, y0, buttons=1)
        if start != end:
            for part in (0.25, 0.5, 0.75, 1.0):
                self._mouse("mouseMoved", x0 + (x1 - x0) * part, y0 + (y1 - y0) * part, buttons=1)
        self._mouse("mouseReleased", x1, y1, buttons=0)

    def _mouse(self, kind: str, x: float, y: float, buttons: int) -> None:
        button = "none" if kind == "mouseMoved" and not buttons else "left"
        self.send(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button=button,
            buttons=buttons,
            clickCount=int(kind != "mouseMoved"),
        )

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key; `modifiers` is 1 for Alt, 2 for Control, 8 for Shift."""
        code = KEYS.get(key) or ord(key.upper())
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        told: dict[str, Any] = {
            "key": key,
            "windowsVirtualKeyCode": code,
            "modifiers": modifiers,
        }
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **told)
        self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def fill(self, selector: str, value: str) -> None:
        """Puts a value into a field or a list, as somebody who types would."""
        self.evaluate(
            f"(() => {{ const field = document.querySelector({json.dumps(selector)});"
            f" field.focus(); field.value = {json.dumps(value)};"
            " for (const name of ['input', 'change'])"
            "   field.dispatchEvent(new Event(name, {bubbles: true})); })()"
        )

    def upload(self, selector: str, path: Path) -> None:
        """Chooses a file in a field."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def text(self, selector: str) -> str:
        """What an element shows."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def screenshot(self, path: Path) -> None:
        """A picture of what is in sight."""
        packed = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(packed))


@contextmanager
def browser(folder: Path, size: tuple[int, int] = (1280, 800)) -> Iterator[Callable[[], Page]]:
    """Starts Chromium, and ends it.

    Args:
        folder: of its profile and downloads.
        size: of the window.

    Yields:
        What opens a new tab.
    """
    assert CHROMIUM is not None
    width, height = size
    profile = folder / "profile"
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sockets = []
    try:
        port = _port(profile / "DevToolsActivePort", process)

        def open_page() -> Page:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new", method="PUT")
            with urllib.request.urlopen(request, timeout=30) as answer:
                address = json.load(answer)["webSocketDebuggerUrl"]
            sockets.append(connect(address, max_size=2**28))
            page = Page(sockets[-1])
            page.send(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
            page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
            return page

        yield open_page
    finally:
        for socket in sockets:
            socket.close()
        process.terminate()
        process.wait(20)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if file.exists() and (told := file.read_text().splitlines()):
            return int(told[0])
        time.sleep(0.05)
    raise PageError("chromium did not start")


UNNAMED = """(() => {
  const named = (one) => one.getAttribute("aria-label")?.trim() || one.title
    || (one.getAttribute("aria-labelledby") ?? "").split(" ").filter(Boolean)
         .map((id) => document.getElementById(id)?.textContent).join("").trim()
    || [...(one.labels ?? [])].map((label) => label.textContent).join("").trim()
    || (["BUTTON", "A", "SUMMARY"].includes(one.tagName) && one.textContent.trim());
  return [...document.querySelectorAll("button, a, input, select, textarea, canvas, summary")]
    .filter((one) => one.checkVisibility() && one.getAttribute("aria-hidden") !== "true"
      && one.type !== "hidden" && !named(one))
    .map((one) => one.outerHTML.slice(0, 120));
})()"""
"""Controls in sight that have no name."""

FAINT = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((one) => {
      const part = one / 255;
      return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const over = (front, back) => {
    const share = front[3] ?? 1;
    return [0, 1, 2].map((at) => front[at] * share + back[at] * (1 - share));
  };
  const ground = (one) => {
    const stack = [];
    for (let at = one; at; at = at.parentElement)
      stack.push(parse(getComputedStyle(at).backgroundColor));
    return stack.reverse().reduce((back, front) => over(front, back), [255, 255, 255]);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const one = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !one.checkVisibility()) continue;
    if (one.closest("option, :disabled")) continue;
    const back = ground(one);
    const text = over(parse(getComputedStyle(one).color), back);
    const [low, high] = [light(text), light(back)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    const words = walk.currentNode.data.trim().slice(0, 40);
    if (contrast < 4.5) found.push(`${contrast.toFixed(2)} ${words}`);
  }
  return found;
})()"""
"""Text in sight whose contrast with what lies behind it is less than 4.5."""
