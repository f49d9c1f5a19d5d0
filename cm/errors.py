"""The exceptions that mean "the user can fix this", the one way to say that a name is unknown, and what is not said."""

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TypeVar

T = TypeVar("T")
PACKAGE = "consistency-models"
LONGEST = 1000  # characters of an error


class UserError(ValueError):
    """A mistake in a flag, a file or a data set.

    The message is one line and names the flag or the file. `cm.runtime.job.run_main` prints it
    without a traceback and exits with code 2.
    """


class BadNumbers(UserError):
    """Training ended because losses or gradients were not finite for too many steps in a row."""


def choose(known: Mapping[str, T], name: str, what: str) -> T:
    """known[name]; UserError with all names, and the one most like it, when there is none. what: flag or argument."""
    if name not in known:
        raise UserError(f"{what} must be one of {listed(known)}, got {name!r}{nearest(name, known)}")
    return known[name]


def listed(names: Iterable[str]) -> str:
    """Names for a message, the empty one as ""."""
    return ", ".join(name or '""' for name in names)


def nearest(name: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """`; did you mean X?`, or nothing when no known name resembles `name`."""
    matches = difflib.get_close_matches(str(name), [k for k in known if k], n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def extra(name: str) -> str:
    """How packages of setup.py's extra `name` are installed, beside an installed wheel or in a checkout."""
    try:
        metadata.distribution(PACKAGE)
    except (
        metadata.PackageNotFoundError
    ):  # another package may have that name where packages are fetched from
        return f"pip install '.[{name}]' in the checkout"
    return f"pip install '{PACKAGE}[{name}]'"


# User and password, and values such as signatures and tokens, in URLs
_USER = re.compile(r"(\w:/{1,2})[^\s/@?#\"']+@")  # one slash: as a path is written
_VALUE = re.compile(
    r"([?&;][\w.\-%]*(?:sig|token|key|secret|passw|pwd|credential|auth)[\w.\-%]*=)[^\s&;#\"')]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text with *** for user and password, and for values such as signatures and tokens, of the URLs in it."""
    if ":/" not in text:
        return text
    return _VALUE.sub(r"\1***", _USER.sub(r"\1***@", text))


def one_line(text: str) -> str:
    """The text in one line; what a terminal would obey, from a file's name or content, is escaped.

    Of a very long one, which repeats such content, the ends are kept.
    """
    line = " ".join(text.splitlines())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 4 :]}"
    return escaped(line)


def escaped(text: str) -> str:
    """The text with escapes for what a terminal would obey, or nothing can print."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
