"""Add rows to the registry from outside: what a plug-in calls, and what a notebook may call.

    from dataclasses import dataclass
    from cm import register

    @dataclass(frozen=True)
    class Options:
        width: float = register.flag(0.03, "width of the quadratic part", above=0)

    @register.distance("charbonnier", options=Options)
    def charbonnier(a, b, width):
        return ((a - b).square() + width**2).sqrt().flatten(1).mean(1) - width

Every function takes the name, the facts of its row (`cm.config.registry`), and `options`: a dataclass whose fields
become flags. Each returns a decorator. docs/extend.md has an example of each kind.
"""

from collections.abc import Callable
from dataclasses import field, fields, make_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from cm.config import rows
from cm.config.fields import Meta, flag, flags_of, meta_of
from cm.config.plugins import origin
from cm.config.registry import Registry, resolve
from cm.errors import UserError

__all__ = [
    "data_source",
    "distance",
    "flag",
    "metric",
    "network",
    "noise_levels",
    "objective",
    "pairs",
    "precond",
    "sampler",
    "weighting",
]

F = TypeVar("F", bound=Callable[..., Any])


def _adder(registry: Registry, name: str, facts: dict, adapt: Callable[[F], Any] | None = None):
    """A decorator that adds what it decorates, adapted to the row's contract, and returns it unchanged."""
    registry.check_new(name, origin())
    options = as_flags(facts.pop("options", None), name)

    def add(make: F) -> F:
        registry.add(
            name,
            registry.kind(make=adapt(make) if adapt else make, options=options, origin=origin(), **facts),
        )
        return make

    return add


def objective(
    name: str, *, consistency: bool = False, sampler: str = "", options: type | None = None, **facts: Any
) -> Callable[[F], F]:
    """A loss: (config) -> cm.objectives.base.Objective; for cm_train, which offers it as --training_mode `name`."""
    sampler = sampler or ("onestep" if consistency else "heun")
    facts |= {"consistency": consistency, "sampler": sampler, "options": options}
    return _adder(rows.OBJECTIVES, name, facts)


def sampler(name: str, *, options: type | None = None, **facts: Any) -> Callable[[F], F]:
    """A sampler: a generator function (denoise, x, sigmas, noise, **options), see `cm.sampling.driver`."""
    from cm.sampling.driver import sampler as driven

    return _adder(rows.SAMPLERS, name, {"options": options, **facts}, driven)


def network(name: str, *, options: type | None = None, **facts: Any) -> Callable[[F], F]:
    """A network: (architecture, **options) -> module with forward(x, c_noise, y=None)."""
    return _adder(rows.NETWORKS, name, {"options": options, **facts})


def distance(name: str, *, options: type | None = None, **facts: Any) -> Callable[[F], F]:
    """A distance: (a, b, **options) -> (B,) for images a, b (B, C, H, W); or a subclass of `Distance`."""

    def adapt(make: F) -> Callable[..., Any]:
        from cm.objectives.distances import Distance as Base
        from cm.objectives.distances import FunctionDistance

        if isinstance(make, type) and issubclass(make, Base):
            return make
        return lambda **own: FunctionDistance(partial(make, **own))

    return _adder(rows.DISTANCES, name, {"options": options, **facts}, adapt)


def noise_levels(name: str, *, options: type | None = None, **facts: Any) -> Callable[[F], F]:
    """A law of noise levels for teachers: (config) -> cm.diffusion.noise_levels.NoiseSampler."""
    return _adder(rows.NOISE_LEVELS, name, {"options": options, **facts})


def pairs(name: str, *, options: type | None = None, **facts: Any) -> Callable[[F], F]:
    """A law of pairs t > r for consistency losses: (config) -> cm.objectives.pairs.Pairs."""
    return _adder(rows.PAIRS, name, {"options": options, **facts})


def weighting(name: str, **facts: Any) -> Callable[[F], F]:
    """A weighting of the loss: (snr, sigma_data) -> (B,), or with pairs=True (t, r, sigma_data) -> (B,)."""
    return _adder(rows.WEIGHTINGS, name, facts)


def precond(name: str, **facts: Any) -> Callable[[F], F]:
    """A preconditioning: (sigma_data, time_scale) -> cm.diffusion.precond.Precond."""
    return _adder(rows.PRECONDS, name, facts)


def data_source(name: str, *, matches: Callable[[str], bool]) -> Callable[[F], F]:
    """A source of images, (path) -> source, for the paths that `matches`; asked before ours.

    A source is a `cm.data.sources.Source`, or a map-style torch.utils.data.Dataset of images or (image, label): Pillow
    images, uint8 arrays, or floats in [0, 1]; its `targets` and `classes` are used where it has them.
    """
    return _adder(rows.DATA_SOURCES, name, {"matches": matches}, _as_source)


def _as_source(make: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda path: resolve("cm.data.libraries:as_source")(make(path), path)


def metric(name: str, **facts: Any) -> Callable[[F], F]:
    """A metric: (evaluations.metrics.Measured) -> value, or (value, {"std": ...})."""
    return _adder(rows.METRICS, name, {"title": name, **facts})


def as_flags(options: type | None, name: str) -> type | None:
    """A dataclass as a frozen group of flags that `--help` shows; plain fields get no help text but their name."""
    if options is None:
        return None
    try:
        known = fields(options)
    except TypeError:
        raise UserError(f"the options of {name} must be a dataclass") from None
    flags, made = flags_of(options), []
    for f in known:
        if f.name not in flags and type(f.default) not in (bool, int, float, str):
            raise UserError(f"option {f.name} of {name} needs a default that is a bool, a number or text")
        meta = meta_of(f) if f.name in flags else Meta(f"option of {name}")
        made.append(
            (f.name, type(f.default), field(default=f.default, metadata={"flag": replace(meta, main=True)}))
        )
    made_class = make_dataclass(options.__name__, made, frozen=True)
    made_class.__doc__ = f"Options of {name}"
    return made_class
