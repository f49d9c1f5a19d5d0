"""What a flag is: a dataclass field with its help, unit, choices and bounds. Imports no torch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from cm.errors import UserError, listed, nearest

Choices = Iterable[str] | Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Bounds:
    """Which numbers a flag may be; `unset` are values outside the bounds that stand for "not given"."""

    low: float = -math.inf  # at least
    above: float = -math.inf  # more than
    high: float = math.inf  # at most
    below: float = math.inf  # less than
    unset: tuple[float, ...] = ()
    finite: bool = True

    def problem(self, value: float) -> str:
        """What is wrong with a value, in words that follow `must be`; empty when nothing is."""
        if value in self.unset:
            return ""
        if math.isnan(value) or (math.isinf(value) and self.finite):
            return "a finite number"
        rules = {
            f"at least {self.low:g}": value >= self.low,
            "positive" if self.above == 0 else f"above {self.above:g}": value > self.above
            or self.above == -math.inf,
            f"at most {self.high:g}": value <= self.high,
            f"below {self.below:g}": value < self.below or self.below == math.inf,
        }
        wrong = next((rule for rule, holds in rules.items() if not holds), "")
        return wrong + "".join(f", or {u:g} for unset" for u in self.unset) if wrong else ""


@dataclass(frozen=True)
class Meta:
    """What a flag knows of itself.

    registry: the flag names a row of it, whose options become flags too. result False: it cannot change the result.
    main: `--help` shows it, not only `--help all`. argument: keyword of the library that it is handed to.
    """

    help: str
    unit: str = ""
    choices: Choices = ()
    registry: Any = None
    result: bool = True
    main: bool = False
    argument: str = ""
    bounds: Bounds = Bounds()

    @property
    def names(self) -> tuple[str, ...]:
        """The values that the flag may have; empty for any."""
        return tuple(self.choices() if callable(self.choices) else self.choices)


def flag(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Choices = (),
    registry: Any = None,
    result: bool = True,
    main: bool = False,
    argument: str = "",
    **bounds: Any,
) -> Any:
    """A field that is a flag; its type is the default's. The keywords are those of `Meta` and `Bounds`."""
    choices = choices or (registry.names if registry is not None else ())
    meta = Meta(help, unit, choices, registry, result, main, argument, Bounds(**bounds))
    return field(default=default, metadata={"flag": meta})


def fixed(value: Any) -> Any:
    """A field that a command inherits but does not offer: always this value, no flag."""
    return field(default=value, init=False, repr=False)


def is_fixed(cls: type, name: str) -> bool:
    """Whether a field of the class is one that its command does not offer."""
    return any(f.name == name and not f.init for f in fields(cls))


def meta_of(f: Field) -> Meta:
    """The description of a flag's field."""
    return f.metadata["flag"]


def flags_of(cls: type) -> dict[str, Field]:
    """name -> dataclass field of every flag of a class."""
    return {f.name: f for f in fields(cls) if "flag" in f.metadata}


def arguments_of(options: type | None, config: Any) -> dict[str, Any]:
    """The keyword arguments that a row's options are, from the configuration that holds them."""
    found = flags_of(options) if options else {}
    return {meta_of(f).argument or name: getattr(config, name) for name, f in found.items()}


def check_flag(f: Field, value: Any) -> None:
    """UserError unless a value is one of the choices and within the bounds of its flag."""
    meta = meta_of(f)
    if (names := meta.names) and value not in names:
        raise UserError(f"--{f.name} must be one of {listed(names)}, got {value!r}{nearest(value, names)}")
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (rule := meta.bounds.problem(value))
    ):
        raise UserError(f"--{f.name} must be {rule}, got {value}")


def help_text(f: Field) -> str:
    """One flag's line of `--help`."""
    meta = meta_of(f)
    unit = f" [{meta.unit}]" if meta.unit else ""
    choices = f"; one of {', '.join(c for c in meta.names if c)}" if meta.names else ""
    default = '""' if f.default == "" else f.default
    assert f.default is not MISSING
    return f"{meta.help}{unit}{choices} (default: {default})"
