"""Pages in a real browser: headless Chromium renders a page and says what it printed on its console."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--hide-scrollbars", "--enable-logging=stderr"]

DRIVER = shutil.which("chromedriver")

needs_driver = pytest.mark.skipif(
    not (PROGRAM and DRIVER),
    reason="no Chromium with its driver on the path: apt-get install chromium-driver",
)
needs_browser = pytest.mark.skipif(not PROGRAM, reason="no Chromium on the path: apt-get install chromium")


def rendered(url: str, *flags: str) -> str:
    """The document after its scripts have run; AssertionError when the console shows anything."""
    output, console = _run("--dump-dom", *flags, url)
    assert not console, console
    return output


def screenshot(url: str, path: Path, width: int = 1300, height: int = 1600) -> None:
    """A picture of the page."""
    _run(f"--window-size={width},{height}", f"--screenshot={path}", url)


def _run(*arguments: str) -> tuple[str, list[str]]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Browser:
    """A page that is used: elements are found by CSS selectors, clicked and painted on (W3C WebDriver)."""

    def __init__(self, port: int):
        self._place = f"http://127.0.0.1:{port}/session"
        # The console is read at the end.
        options = {"binary": PROGRAM, "args": [*FLAGS, "--window-size=1200,1400"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._place += f"/{session['sessionId']}"

    def _ask(self, method: str, path: str, content: dict | None = None) -> Any:
        data = json.dumps(content or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            self._place + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        """Go to a page."""
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait for a script to return something true."""
        return eventually(lambda: self.run(script), seconds)

    def click(self, selector: str) -> None:
        """Click an element once it is there."""
        found = eventually(lambda: self._find(selector))
        self._ask("POST", f"/element/{found}/click")

    def _find(self, selector: str) -> str:
        found = self._ask("POST", "/elements", {"using": "css selector", "value": selector})
        return next(iter(found[0].values())) if found else ""

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press the mouse at the first point of the window, move through the others, and let go."""
        moves = [{"type": "pointerMove", "duration": 60, "x": round(x), "y": round(y)} for x, y in points]
        strokes = [
            moves[0],
            {"type": "pointerDown", "button": 0},
            *moves[1:],
            {"type": "pointerUp", "button": 0},
        ]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": strokes}
        self._ask("POST", "/actions", {"actions": [mouse]})

    def screenshot(self, path: Path) -> None:
        """A picture of the window."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def console(self) -> list[str]:
        """Errors that the page has reported so far."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def quit(self) -> None:
        """Close the window."""
        self._ask("DELETE", "")


def eventually(ask: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true answer; AssertionError when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.1)
    return answer


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is closed at the end of the block."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.PIPE, text=True)
    try:
        eventually(lambda: "started successfully" in driver.stdout.readline())
        opened = Browser(port)
        try:
            yield opened
        finally:
            opened.quit()
    finally:
        driver.terminate()
        driver.wait()
