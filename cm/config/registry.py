"""Everything that has a name, one row per name: objectives, samplers, networks, preconditionings, distances ...

A row says where the thing is (`module:attribute`, imported when it is first used), which options it brings (a
dataclass of flags), and the facts that other code asks for instead of the name. `cm.config.rows` holds the built-in
rows, `cm.register` adds rows from outside. Imports no torch.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cm.errors import UserError, choose


@dataclass(frozen=True, kw_only=True)
class Row:
    """One name. make: `module:attribute`, or the object itself. options: dataclass of flags that come with the name.

    origin: the plug-in that brought it; empty for built-in rows.
    """

    make: str | Callable[..., Any]
    options: type | None = None
    origin: str = ""

    def load(self) -> Any:
        """The object that `make` names."""
        return resolve(self.make) if isinstance(self.make, str) else self.make


@dataclass(frozen=True, kw_only=True)
class Objective(Row):
    """make(config) -> cm.objectives.base.Objective.

    consistency: its models are consistency functions, under the boundary condition. teacher: it needs one. sampler:
    how its models are sampled unless the command says otherwise. script: the training script that offers it. stages:
    the student becomes the teacher stage by stage. segments: its samples take --segments steps. target: it
    keeps a target network. continuous: no grid
    of noise levels. draws: its models draw images.
    learns_from: what its teacher is, `denoiser` or `consistency`. boundary: the --boundary that it needs; empty: any.
    compares: its loss is the distance of --loss_norm.
    lowest: its option that says from which noise level up its models are defined; empty: from sigma_min.
    recipe: what --preset auto chooses for it, a function (side, width, gpu) -> flags.
    two_times: its models are flow maps, whose networks have a second clock. told_guidance: its networks are told which
    guidance to follow and predict the velocity in more channels; its draws say which rows hide their class.
    """

    consistency: bool = False
    teacher: bool = False
    sampler: str = "heun"
    script: str = "cm_train"
    stages: bool = False
    segments: bool = False
    target: bool = False
    continuous: bool = False
    draws: bool = True
    learns_from: str = "denoiser"
    boundary: str = ""
    compares: bool = True
    lowest: str = ""
    recipe: str = "cm.config.auto:slow"
    two_times: bool = False
    told_guidance: bool = False

    @property
    def kind(self) -> str:
        """What its models are: `flow map`, `consistency` or `denoiser`."""
        return "flow map" if self.two_times else "consistency" if self.consistency else "denoiser"

    @property
    def teaches(self) -> str:
        """What its models are to a student: `denoiser`, `consistency`, `flow map`, or nothing.

        A multistep model leads to the start of a segment: what it predicts is no clean image.
        """
        return self.kind if self.draws and not self.segments else ""


@dataclass(frozen=True, kw_only=True)
class Sampler(Row):
    """make(denoise, x, sigmas, generator, progress, callback, **options) -> x: see `cm.sampling.driver`.

    grid: the row of GRIDS that it walks along. order: of convergence with fixed steps along the flow; 0: none.
    guidance: a classifier can steer it. other_grids: --time_steps may replace its grid. reads: what it asks of a flow
    map: `denoiser`, `consistency` (steps to no noise) or `jumps` (to any level, which no other model has). visits: how
    many of the levels it asks at, from the first on; 0: all.
    """

    grid: str = "karras"
    order: int = 0
    guidance: bool = True
    other_grids: bool = False
    reads: str = "denoiser"
    visits: int = 0


@dataclass(frozen=True, kw_only=True)
class Network(Row):
    """make(architecture, **options) -> module: forward(x, c_noise, y=None), images in, prediction out.

    clock: c_noise = clock * ln(sigma) / 4. half: it has `convert_torso(dtype)` and `.dtype`. levels: it halves the
    image from level to level (--channel_mult). augment: it takes augmentation labels. two_times: it takes a second
    clock, as `second=` (B,), where `architecture.two_times` asks for one. told_guidance: it takes a guidance, as
    `guidance_inputs=` (B, 3), and has twice the channels, where the architecture asks so. check: `module:attribute`, a
    function (architecture) that raises UserError where flags do not fit. classifier: the classifier that goes with it.
    A module with a method `project(params)` has its fp32 weights, by name, changed in place after each optimizer step.
    """

    clock: float = 1.0
    half: bool = True
    levels: bool = True
    augment: bool = False
    two_times: bool = False
    told_guidance: bool = False
    check: str | Callable[..., None] = ""
    classifier: str = ""


@dataclass(frozen=True, kw_only=True)
class Precond(Row):
    """make(sigma_data, time_scale) -> preconditioning of a denoiser; a column of EDM's Table 1 (Karras et al. 2022).

    span: the noise levels that its network can tell apart; None: as it was trained. model: flags of every training
    script that its range needs. training: its noise distribution and weighting, flags of edm_train. piecewise: Eq. 4 of
    the consistency paper is defined on it.
    """

    span: tuple[float, float] | None = None
    model: Mapping[str, Any] = None
    training: Mapping[str, Any] = None
    piecewise: bool = False

    def implied(self, script: str) -> dict[str, Any]:
        """Flags that choosing it sets for a training script; other scripts learn them from the model file."""
        if script not in ("edm_train", "cm_train"):
            return {}
        return {**(self.model or {}), **((self.training or {}) if script == "edm_train" else {})}


@dataclass(frozen=True, kw_only=True)
class Pairs(Row):
    """make(config) -> cm.objectives.pairs.Pairs. boundary: the --boundary that its lowest levels need; empty: any."""

    boundary: str = ""


@dataclass(frozen=True, kw_only=True)
class Distance(Row):
    """make(**options) -> cm.objectives.distances.Distance. curved: it has a second derivative, so a pseudo-loss."""

    curved: bool = True


@dataclass(frozen=True, kw_only=True)
class Weighting(Row):
    """make: a function of (snr, sigma_data), or, for pairs, of (t, r, sigma_data)."""

    pairs: bool = False


@dataclass(frozen=True, kw_only=True)
class NoiseLevels(Row):
    """make(config) -> sampler of noise levels. grid: it draws points of a grid."""

    grid: bool = False


@dataclass(frozen=True, kw_only=True)
class Task(Row):
    """make(config) -> what editing holds fixed of an image: LinearEdit, or None.

    first_level: the flag whose noise level the task begins at; empty: it walks down from sigma_max.
    """

    first_level: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSource(Row):
    """make(path) -> cm.data.sources.Source. matches: `module:attribute`, path -> whether this source reads it.

    named: its paths are names, of which no file exists.
    """

    matches: str | Callable[[str], bool] = ""
    named: bool = False


@dataclass(frozen=True, kw_only=True)
class Metric(Row):
    """make(measured) -> value, or (value, interval as a dict): see `evaluations.metrics.Measured`.

    title and digits: how it is printed; elsewhere: its title in the features of another network than Inception, where
    that differs. needs: what the reference must hold: "pool", "spatial", "images" or "".
    labels: the samples must say their classes. collective: all ranks call it, and it needs no features at once.
    """

    title: str = ""
    elsewhere: str = ""
    digits: int = 4
    needs: str = ""
    labels: bool = False
    collective: bool = False

    def title_in(self, features: str) -> str:
        """How it is called when `features` measured it: a distance is a FID in Inception's features only."""
        return self.title if features == "inception" else self.elsewhere or self.title


R = TypeVar("R", bound=Row)


class Registry(Mapping[str, R], Generic[R]):
    """The rows of one kind by name. what: how messages call the kind."""

    def __init__(self, what: str, rows: Mapping[str, R]):
        self.what = what
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> R:
        """UserError with all names, and the one most like it, where there is none."""
        return choose(self._rows, name, self.what)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def names(self) -> tuple[str, ...]:
        """All names, built-in ones first."""
        return tuple(self._rows)

    def load(self, name: str) -> Any:
        """The object that a name stands for."""
        return self[name].load()

    @property
    def kind(self) -> type[R]:
        """The class of its rows."""
        return type(next(iter(self._rows.values())))

    def check_new(self, name: str, origin: str) -> None:
        """UserError for a name that is taken by another origin, or that no command line could hold."""
        if not name or name.strip() != name or any(c in name for c in ", \t\n=") or name.startswith("-"):
            raise UserError(f"{self.what} {name!r}: a name must be one word without commas")
        taken = self._rows.get(name)
        if taken is not None and not (taken.origin and taken.origin == origin):
            raise UserError(
                f"{self.what} {name} is there already" + (f", from {taken.origin}" if taken.origin else "")
            )

    def add(self, name: str, row: R) -> None:
        """One more row, under a name that `check_new` lets pass."""
        self.check_new(name, row.origin)
        self._rows[name] = row

    def drop(self, name: str) -> None:
        """Take a row out that `add` put in; built-in ones stay."""
        if self._rows[name].origin:
            del self._rows[name]


def resolve(path: str) -> Any:
    """The object at `module:attribute`."""
    module, _, attribute = path.partition(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def simple(what: str, rows: Mapping[str, str]) -> Registry[Row]:
    """A registry of rows that say no more than where they are."""
    return Registry(what, {name: Row(make=path) for name, path in rows.items()})
