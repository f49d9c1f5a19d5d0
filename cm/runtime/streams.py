"""Standard output and error that may go away: the reader of a pipe ends, a terminal is closed, a disk is full."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


class Screen:
    """A text stream whose failures are nobody's error: what cannot be written any more is dropped.

    At the first failure the stream's descriptor is led to the null device, for what others still write to it.
    """

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it. Characters that the stream's encoding lacks are escaped."""
        try:
            return self.stream.write(text)
        except UnicodeEncodeError as error:
            escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            return self.write(escaped) if escaped != text else len(text)
        except (OSError, ValueError):
            self._silence()
            return len(text)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._silence()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _silence(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # not a stream of the system, or closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream.flush()


def screen(stream: IO[str] | None) -> IO[str]:
    """The stream as a `Screen`; None, which Python has for a closed one, is the null device."""
    if isinstance(stream, Screen):
        return stream
    return Screen(open(os.devnull, "w") if stream is None else stream)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """In the body, writing to sys.stdout and sys.stderr does not fail, whatever becomes of them."""
    before = sys.stdout, sys.stderr
    if None in before:
        _occupy()
    sys.stdout, sys.stderr = map(screen, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if None not in before:
            sys.stdout, sys.stderr = before


def _occupy() -> None:
    """Open the null device under the numbers of closed standard streams: else the next file would get their output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
