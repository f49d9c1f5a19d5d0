"""Pages in a real browser: headless Chromium renders a page and says what it printed on its console."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--hide-scrollbars", "--enable-logging=stderr"]

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
