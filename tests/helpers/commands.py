"""A command of `cm` in this process."""

import io
import sys
from collections.abc import Iterable
from typing import Any

from cm.commands.main import main
from cm.runtime import logger


def run(argv: Iterable[Any], monkeypatch) -> tuple[int, str]:
    """(exit code, standard error) of a command; exceptions that it lets through are the test's."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    try:
        main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code or 0, sys.stderr.getvalue()
    finally:
        logger.reset()
    return 0, sys.stderr.getvalue()


def refused(argv: Iterable[Any], monkeypatch) -> str:
    """The line of a command that is refused with exit code 2."""
    code, text = run(argv, monkeypatch)
    assert code == 2, (code, text)
    lines = [line for line in text.splitlines() if line.startswith("error: ") or ": error: " in line]
    assert len(lines) == 1 and lines[0].isprintable() and "Traceback" not in text, text
    return lines[0]
