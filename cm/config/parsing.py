"""Flags that are written as lists or words, turned into values. Pure Python: `--help` and presets stay fast."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cm.errors import UserError, escaped, listed, nearest

DEFAULT_ATTENTION = "32,16,8"
LONGEST_PROFILE = 0.2886  # relative length of the plain mean of all weights, 1 / sqrt(12), rounded down

# image_size -> channel multipliers per level, where --channel_mult is left empty
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    8: (1, 2),
    16: (1, 2, 2),
    28: (1, 2, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def str2bool(v: str | bool) -> bool:
    """True or False from yes/no, true/false, t/f, y/n, 1/0 in any case; ValueError otherwise."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError(f"expected True or False, got {v!r}")


def expanded(value: Any) -> Any:
    """Text that begins with ~ as the path it means, which shells leave alone in --flag=~/path; all else as it is.

    UserError where it means none: a folder named ~ would be made, or read.
    """
    if not (isinstance(value, str) and value.startswith("~")):
        return value
    path = os.path.expanduser(value)
    if path == value and value.startswith(("~/", "~\\")):
        raise NoHome(f"{value}: there is no home folder (HOME is not set)")
    return path


def printable(name: str) -> str:
    r"""The name of a file or class as it is printed and stored: bytes that are no UTF-8 become \xe9, a new line \n."""
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:  # not from a file system of this locale
        raw = name.encode("utf-8", "backslashreplace")
    return escaped(raw.decode("utf-8", "backslashreplace"))


class NoHome(UserError, argparse.ArgumentTypeError):
    """A path in a home folder that there is not; argparse shows its text."""


def at_least(low: int) -> Callable[[str], int]:
    """For argparse: the whole numbers from `low` on."""

    def number(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    number.__name__ = "whole number"
    return number


def _numbers(flag: str, text: str, kind: type[int] | type[float]) -> tuple:
    """The numbers of a comma-separated list."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        what = "integers" if kind is int else "numbers"
        raise UserError(f"--{flag} must be a comma-separated list of {what}, got {text!r}")
    return numbers


def parse_ints(flag: str, text: str) -> tuple[int, ...]:
    """Integers of a comma-separated list; the flag is named in the error."""
    return _numbers(flag, text, int)


def parse_channel_mult(text: str, image_size: int) -> tuple[float, ...]:
    """Width of each level in units of --num_channels, finest level first; empty text means the table above."""
    if text:
        mult = _numbers("channel_mult", text, float)
        if min(mult) <= 0:
            raise UserError(f"--channel_mult must be positive, got {text!r}")
        return tuple(int(m) if m == int(m) else m for m in mult)
    if image_size not in CHANNEL_MULT:
        known = ", ".join(map(str, CHANNEL_MULT))
        raise UserError(
            f"--channel_mult has no default for --image_size {image_size} (only for {known}): give one"
        )
    return CHANNEL_MULT[image_size]


def parse_attention(text: str, image_size: int, levels: int) -> tuple[int, ...]:
    """Down-sampling factors at which a network of `levels` levels has attention.

    Resolutions that the network does not have are an error, except in the default list, of which it takes those that
    it has. Empty text means none outside the middle.
    """
    if not text:
        return ()
    resolutions = {image_size // 2**level: 2**level for level in range(levels)}
    wanted = parse_ints("attention_resolutions", text)
    if text == DEFAULT_ATTENTION:
        return tuple(resolutions[r] for r in wanted if r in resolutions)
    for r in wanted:
        if r not in resolutions:
            raise UserError(
                f"--attention_resolutions {r} is not a resolution of the network ({', '.join(map(str, resolutions))})"
            )
    return tuple(resolutions[r] for r in wanted)


def parse_ema_rates(text: str) -> tuple[float, ...]:
    """Decay rates of the moving averages that are kept, each in [0, 1]; no rate twice."""
    rates = _numbers("ema_rate", text, float)
    if not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"--ema_rate must lie in [0, 1], got {text!r}")
    if len(set(rates)) < len(rates):
        raise UserError(f"--ema_rate names a rate twice: {text!r}")
    return rates


def parse_ema_profiles(text: str) -> tuple[float, ...]:
    """Relative lengths of the power-function averages that are kept, each in (0, LONGEST_PROFILE]; none twice."""
    profiles = _numbers("ema_profiles", text, float) if text else ()
    if not all(0 < length <= LONGEST_PROFILE for length in profiles):
        raise UserError(f"--ema_profiles must lie above 0 and not above {LONGEST_PROFILE}, got {text!r}")
    if len(set(profiles)) < len(profiles):
        raise UserError(f"--ema_profiles names a length twice: {text!r}")
    return profiles


def parse_ts(text: str, steps: int | None, flag: str = "ts") -> tuple[int, ...]:
    """Time points as indices of a grid of `steps` noise levels (0 = sigma_max): they may not decrease.

    None: the grid is not known yet. The last index is only the noise level at which sampling stops: `steps - 1`
    gives clean images.
    """
    ts = parse_ints(flag, text)
    if len(ts) < 2:
        raise UserError(f"--{flag} needs at least a start and an end, got {text!r}")
    if min(ts) < 0:
        raise UserError(f"--{flag} must not be negative, got {text!r}")
    if steps is not None and max(ts) >= steps:
        raise UserError(f"--{flag} {text} leaves the grid of --steps {steps}: indices are 0..{steps - 1}")
    if any(b < a for a, b in pairwise(ts)):
        raise UserError(f"--{flag} must not decrease (index 0 is sigma_max), got {text!r}")
    return ts


def parse_sigmas(text: str, sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """Noise levels at which the network is evaluated: decreasing, in (sigma_min, sigma_max].

    Sampling ends at sigma_min, which is not listed.
    """
    sigmas = _numbers("sigmas", text, float)
    if not all(sigma_min < s <= sigma_max for s in sigmas):
        raise UserError(
            f"--sigmas must lie above --sigma_min {sigma_min} and not above --sigma_max {sigma_max}, got {text!r}"
        )
    if any(b >= a for a, b in pairwise(sigmas)):
        raise UserError(f"--sigmas must decrease, got {text!r}")
    return sigmas


def parse_classes(
    text: str, num_classes: int = 0, names: Sequence[str] | None = None
) -> tuple[int | str, ...]:
    """Class labels of a list of numbers or names; a number that is a label is one, whatever classes are called.

    num_classes 0, names None: not known yet; then names are handed back as they are.
    """
    return tuple(_class_of(word.strip(), text, num_classes, names) for word in text.split(","))


def _class_of(word: str, text: str, num_classes: int, names: Sequence[str] | None) -> int | str:
    number = int(word) if word.removeprefix("-").isdecimal() else None
    if number is not None and number >= 0 and (not num_classes or number < num_classes):
        return number
    word = printable(word)
    if names is None and number is None and word:
        return word
    for candidates, wanted in ((names or (), word), ([n.lower() for n in names or ()], word.lower())):
        if wanted in candidates:
            return list(candidates).index(wanted)
    if names and number is None:
        shown = listed(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"--classes {word}: no class is called so{nearest(word, names)} (there are {shown})")
    last = f"..{num_classes - 1}" if num_classes else " and up"
    raise UserError(f"--classes must be labels 0{last}, got {text!r}")


@dataclass(frozen=True)
class Guidance:
    """--guidance: its scale, between `low` and `high` where it is drawn, and the noise levels at which it acts."""

    low: float = 1.0
    high: float = 1.0
    sigma_low: float = 0.0
    sigma_high: float = math.inf

    @property
    def drawn(self) -> bool:
        """Whether there is a range of scales instead of one."""
        return self.low < self.high

    @property
    def plain(self) -> bool:
        """Scale 1 throughout: a model as it is."""
        return self.low == self.high == 1


def parse_guidance(text: str) -> Guidance:
    """SCALE or LOW:HIGH, and perhaps the noise levels between which it acts: 2, 1:4, 2,0.3,5."""
    scale, *levels = text.split(",")
    try:
        low, _, high = scale.partition(":")
        found = Guidance(float(low), float(high or low), *map(float, levels))
    except (ValueError, TypeError):
        found = Guidance(math.nan)
    if len(levels) not in (0, 2) or not 0 <= found.low <= found.high < math.inf:
        raise UserError(
            f"--guidance must be a scale of at least 0, or LOW:HIGH, perhaps with the noise levels between which it "
            f"acts: 2 or 1:4 or 2,0.3,5; got {text!r}"
        )
    if not 0 <= found.sigma_low < found.sigma_high:
        raise UserError(f"--guidance {text}: its noise levels must increase, from 0 at least")
    return found


def parse_weights(text: str) -> tuple[str, float]:
    """Which weights of a checkpoint: ("raw" | "target" | "ema" | "posthoc" | "", number).

    The number is the rate of ema:RATE, and the relative length of posthoc:LENGTH.
    """
    kind, _, number = text.partition(":")
    if text in ("", "raw", "target"):
        return text, 0.0
    if kind in ("ema", "posthoc"):
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind == "posthoc" and not 0 < value <= LONGEST_PROFILE:
            raise UserError(f"--weights {text}: the length must lie above 0 and not above {LONGEST_PROFILE}")
        if math.isfinite(value):
            return kind, value
    raise UserError(f"--weights must be raw, ema:RATE, posthoc:LENGTH, target or empty, got {text!r}")
