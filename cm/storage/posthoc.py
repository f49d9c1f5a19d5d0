"""Averages of any length from snapshots of a few (Karras et al. 2024, EDM2, section 3 and App. C).

A power-function average of a run of length t weighs the weights at time tau by p(tau) = (gamma + 1) tau^gamma /
t^(gamma + 1). Its relative length sigma_rel is the standard deviation of p over t. Training keeps a few such profiles
and leaves a snapshot of each at every checkpoint; the profile of any other length is a linear combination of those,
nearly, and the average of that length is the same combination of the snapshots.

A snapshot is a file `posthoc_<sigma_rel>_<step>.pt` in a checkpoint, `posthoc_<sigma_rel>_from_<start>_<step>.pt` where
the averages began anew at a step. When --keep_last deletes the checkpoint, its snapshots move to RUN/posthoc and stay:
each one left out makes every other length coarser.
"""

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cm.config.parsing import LONGEST_PROFILE
from cm.errors import UserError
from cm.runtime.inputs import listed
from cm.storage.weights import file_sha256, load_weights

FOLDER = "posthoc"
WORST_FIT = 0.1  # how far a combined profile may be off, as a part of the wanted one's norm
_FILE = re.compile(r"posthoc_(\d[\d.e-]*)_(?:from_(\d+)_)?(\d+)\.pt")


def exponent(sigma_rel: float) -> float:
    """gamma of a relative length: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, App. C)."""
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"a relative length must lie in (0, {12**-0.5:.4f}], got {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def relative_length(gamma: float) -> float:
    """The inverse of `exponent`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def decay(t: float, gamma: float, step: float = 1.0) -> float:
    """beta of the update to time t by a step of this length: (1 - step / t)^(gamma + 1) (EDM2, section 3)."""
    return (1 - step / t) ** (gamma + 1)


def products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integral of p_a p_b over all times: (A, B) of profiles (A,) and (B,) (EDM2, App. C)."""
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + gamma_b + 1) * np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** power / scale


def coefficients(
    times: np.ndarray, gammas: np.ndarray, t: np.ndarray, gamma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(weights (N, M) of N snapshots for M profiles, error (M,) of each fit relative to the profile's norm).

    The least-squares fit of the profiles, scaled to the sum 1.
    """
    times, gammas, t, gamma = (np.asarray(a, dtype=np.float64) for a in (times, gammas, t, gamma))
    own, mixed = products(times, gammas, times, gammas), products(times, gammas, t, gamma)
    weights = np.linalg.solve(own, mixed)
    weights = weights / weights.sum(axis=0)
    size = np.diag(products(t, gamma, t, gamma))
    squared = size - 2 * (weights * mixed).sum(axis=0) + (weights * (own @ weights)).sum(axis=0)
    return weights, np.sqrt(np.maximum(squared, 0) / size)


@dataclass(frozen=True)
class Snapshot:
    """One average on disk. step: of the run; start: step at which the average began anew, 0 in most runs."""

    path: Path
    sigma_rel: float
    step: int
    start: int = 0


def stem(sigma_rel: float, start: int = 0) -> str:
    """Name of a snapshot's file, but for the step."""
    return f"posthoc_{sigma_rel:g}_" + (f"from_{start:06d}_" if start else "")


def find_snapshots(run: str | os.PathLike) -> list[Snapshot]:
    """All snapshots of a run directory, in its checkpoints and beside them, oldest first."""
    run, found = Path(run), {}
    checkpoints = listed(run / "checkpoints", "step_*")
    for path in chain.from_iterable(
        listed(folder, "posthoc_*.pt") for folder in (run / FOLDER, *checkpoints)
    ):
        if match := _FILE.fullmatch(path.name):
            found[path.name] = Snapshot(path, float(match[1]), int(match[3]), int(match[2] or 0))
    return sorted(found.values(), key=lambda s: (s.step, s.sigma_rel))


def keep_snapshots(checkpoint: Path, run: str | os.PathLike) -> None:
    """Before a checkpoint is deleted: its snapshots get a second name in the run's folder for them."""
    for path in listed(checkpoint, "posthoc_*.pt"):
        folder = Path(run) / FOLDER
        folder.mkdir(exist_ok=True)
        kept = folder / path.name
        if not kept.exists():
            try:
                os.link(path, kept)
            except OSError:  # a file system without hard links
                temporary = kept.with_suffix(".tmp")
                shutil.copyfile(path, temporary)
                os.replace(temporary, kept)


def plan(run: str | os.PathLike, sigma_rel: float, step: int = 0) -> list[tuple[Snapshot, float]]:
    """Snapshots of a run and their weights in the average of this relative length at `step`, 0 for the last one.

    Those up to `step` take part, so that the average stays what it is while the run goes on. A profile ends with a
    jump, so one of the snapshots must be of that step. UserError where there is none, or they do not give the length.
    """
    if not Path(run).is_dir():
        raise UserError(f"{run}: there is no such run directory")
    snapshots = find_snapshots(run)
    if not snapshots:
        raise UserError(f"{run} has no snapshots: averages of any length need a run with --ema_profiles")
    if not 0 < sigma_rel <= LONGEST_PROFILE:
        raise UserError(
            f"a length must lie above 0 and not above {LONGEST_PROFILE}, got {sigma_rel:g} (--sigma_rel)"
        )
    step = step or snapshots[-1].step
    steps = sorted({s.step for s in snapshots})
    if step not in steps:
        near = ", ".join(map(str, sorted(sorted(steps, key=lambda other: abs(other - step))[:3])))
        raise UserError(f"{run} has no snapshot of step {step}; the nearest are of steps {near} (--step)")
    start = max(s.start for s in snapshots if s.step == step)
    used = [s for s in snapshots if s.step <= step and s.start == start]
    weights, error = coefficients(
        np.array([s.step - s.start for s in used]),
        np.array([exponent(s.sigma_rel) for s in used]),
        np.array([step - start]),
        np.array([exponent(sigma_rel)]),
    )
    if error[0] > WORST_FIT:
        lengths = ", ".join(f"{length:g}" for length in sorted({s.sigma_rel for s in used}))
        raise UserError(
            f"{run}: the {len(used)} snapshots of lengths {lengths} up to step {step} do not span an average of length "
            f"{sigma_rel:g} (they miss {error[0]:.0%} of it): choose one nearer to them"
        )
    return list(zip(used, weights[:, 0].tolist(), strict=True))


@torch.no_grad()
def combine(parts: Iterable[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    """The weighted sum of state dicts, in float64, in the types of the last one.

    A tensor that is the same in all of them, such as a buffer, stays as it is; so do integers of the last one.
    """
    total: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    constant: set[str] = set()
    for last, weight in parts:
        if not first:
            first, constant = last, set(last)
        if last.keys() != first.keys():
            raise ValueError("snapshots of different networks")
        constant = {name for name in constant if torch.equal(first[name], last[name])}
        for name, tensor in last.items():
            term = weight * tensor.double()
            total[name] = total[name].add_(term) if name in total else term
    return {
        name: tensor if name in constant or not tensor.is_floating_point() else total[name].to(tensor.dtype)
        for name, tensor in last.items()
    }


def reconstruct(
    run: str | os.PathLike, sigma_rel: float, step: int = 0
) -> tuple[dict[str, Tensor], dict | None, list[tuple[Snapshot, float]]]:
    """(state dict, meta of the newest snapshot, `plan`) of an average; step 0 is that of the last snapshots."""
    chosen, metas = plan(run, sigma_rel, step), []
    shapes: dict[str, dict[str, torch.Size | None]] = {}

    def parts():
        for snapshot, weight in chosen:
            state, meta = load_weights(snapshot.path)
            found = {name: t.shape if isinstance(t, Tensor) else None for name, t in state.items()}
            if None in found.values() or found != shapes.setdefault("first", found):
                raise UserError(f"{snapshot.path} is no snapshot of the same network as those before it")
            metas.append(meta)
            yield state, weight

    return combine(parts()), metas[-1], chosen


def fingerprint(run: str | os.PathLike, sigma_rel: float, step: int = 0) -> str:
    """Hash of what `reconstruct` is made of."""
    lines = [f"{file_sha256(snapshot.path)} {weight!r}" for snapshot, weight in plan(run, sigma_rel, step)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
