"""Plug-ins: modules of the user's own that add rows to the registry, without a fork. Imports no torch by itself.

`--plugin` names files, installed modules, or entry points of the group `cm.plugins`. A checkpoint remembers the names
and hashes of its plug-ins' sources; only the user says what is imported, never a checkpoint.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from cm.config import choices, rows
from cm.config.registry import Registry
from cm.errors import UserError, choose, listed

GROUP = "cm.plugins"
LARGEST = 16 << 20  # bytes of a source file
REGISTRIES: tuple[Registry, ...] = tuple(
    value for module in (rows, choices) for value in vars(module).values() if isinstance(value, Registry)
)


@dataclass(frozen=True)
class Plugin:
    """A plug-in that was loaded: its name on the command line, the hash of its source, and what it added."""

    name: str
    sha256: str
    rows: tuple[str, ...]


_loaded: dict[str, Plugin] = {}
_origin = "python"


def origin() -> str:
    """Where rows that are registered now come from."""
    return _origin


def load(text: str) -> None:
    """Import every plug-in of a comma-separated list, each once; UserError when one cannot be had."""
    for name in filter(None, (part.strip() for part in text.split(","))):
        load_one(name)


def load_one(name: str, flag: str = "plugin") -> Plugin:
    """Import one plug-in. A file that has changed since is read again, and its old rows go. flag: what names it."""
    path = _find(name, flag)
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise UserError(f"--{flag} {name}: {path} is no source file")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--{flag} {name}: {path} cannot be read: {error.strerror or error}") from None
    known = _loaded.get(str(path))
    if known is not None and known.sha256 == sha256:
        return known
    forget(str(path))
    with _registering(str(path)):
        try:
            _import(name, path, sha256)
        except UserError:
            raise
        except Exception as error:
            forget(str(path))
            where = _line_in(error, path)
            raise UserError(f"--{flag} {name}{where}: {type(error).__name__}: {error}") from error
    added = tuple(f"{r.what} {n}" for r in REGISTRIES for n, row in r.items() if row.origin == str(path))
    _loaded[str(path)] = Plugin(name, sha256, added)
    return _loaded[str(path)]


def member(text: str, flag: str) -> Any:
    """What `FILE.py:NAME` stands for: the class or function NAME of the user's file."""
    file, _, name = text.rpartition(":")
    module = sys.modules[_module_name(_find(file, flag), load_one(file, flag).sha256)]
    known = {n: value for n, value in vars(module).items() if callable(value) and not n.startswith("_")}
    return choose(
        {n: v for n, v in known.items() if v.__module__ == module.__name__}, name, f"--{flag} {file}:"
    )


def _find(name: str, flag: str) -> Path:
    """The source file of a plug-in."""
    if name.endswith(".py") or "/" in name:
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"--{flag} {name}: no such file")
        return path
    module = next((e.module for e in entry_points(group=GROUP) if e.name == name), name)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        known = listed(e.name for e in entry_points(group=GROUP)) or "none"
        raise UserError(f"--{flag} {name}: no such file or module (installed plug-ins: {known})")
    return Path(spec.origin)


def _import(name: str, path: Path, sha256: str) -> None:
    if not (name.endswith(".py") or "/" in name):
        module = next((e.module for e in entry_points(group=GROUP) if e.name == name), name)
        if module in sys.modules:
            importlib.reload(sys.modules[module])
        else:
            importlib.import_module(module)
        return
    module_name = _module_name(path, sha256)
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def _module_name(path: Path, sha256: str) -> str:
    """A name of its own, so that classes in it can be found again by pickle in a worker process."""
    return f"cm_plugin_{path.stem}_{sha256[:8]}"


@contextmanager
def _registering(path: str) -> Iterator[None]:
    global _origin
    before, _origin = _origin, path
    try:
        yield
    finally:
        _origin = before


def _line_in(error: BaseException, path: Path) -> str:
    """`:12` where the plug-in's own source raised, for the message."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" line {line}" if line else ""


def forget(origin: str) -> None:
    """Drop the rows of a plug-in."""
    _loaded.pop(origin, None)
    for registry in REGISTRIES:
        for name in [n for n, row in registry.items() if row.origin == origin]:
            registry.drop(name)


def loaded() -> list[dict[str, Any]]:
    """What a checkpoint says of its plug-ins."""
    return [asdict(plugin) | {"rows": list(plugin.rows)} for plugin in _loaded.values()]


def require(stored: Mapping[str, Any], source: str) -> list[str]:
    """UserError where a model needs a plug-in that is not loaded; returns a note for each whose source has changed."""
    here = {row: plugin for plugin in _loaded.values() for row in plugin.rows}
    notes = []
    for plugin in stored.get("plugins", ()):
        missing = [row for row in plugin["rows"] if row not in here and row in _used(stored)]
        if missing:
            raise UserError(
                f"{source} was made with {missing[0]} of the plug-in {plugin['name']}: give --plugin"
            )
        changed = {
            here[row].name for row in plugin["rows"] if row in here and here[row].sha256 != plugin["sha256"]
        }
        notes += [
            f"note: {source} was made with another version of the plug-in {name}" for name in sorted(changed)
        ]
    return notes


def _used(stored: Mapping[str, Any]) -> set[str]:
    """`what name` of every row that a stored configuration names and that drawing samples needs."""
    needed = (rows.OBJECTIVES, rows.NETWORKS, rows.PRECONDS)
    return {f"{registry.what} {stored.get(registry.what)}" for registry in needed}
