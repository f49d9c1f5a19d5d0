"""Which checkpoint a run goes on from, and whether it may: same flags, same data, undamaged files."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cm.errors import UserError
from cm.runtime import distributed
from cm.storage import mirror
from cm.storage.checkpoint import checkpoint_directories, newest_checkpoint, read_state, verify_checkpoint
from cm.storage.filesystem import is_remote
from cm.storage.weights import Damaged
from cm.training.learning_rate import LearningRate
from cm.training.trainer import Trainer


@dataclass(frozen=True)
class Identity:
    """What makes a run the same run: flags that change its result, images per step, fingerprint of the data set.

    rate: where --total_training_steps may grow, the learning rate, which decays to that end.
    """

    flags: dict[str, Any]
    global_batch: int
    data: str
    rate: LearningRate | None = None


def find_checkpoint(
    directory: str, identity: Identity, resume: str = "auto", *, allow_changes: bool = False
) -> tuple[Path | None, int, list[str]]:
    """(newest undamaged checkpoint of a run directory, its step, lines for the log); (None, 0, []) for a new run.

    Rank 0 looks, every rank gets the answer. resume: auto, must or never. UserError where the checkpoint has another
    identity and changes are not allowed.
    """
    return distributed.on_main(lambda: _find(directory, identity, resume, allow_changes))


def _find(
    directory: str, identity: Identity, resume: str, allow_changes: bool
) -> tuple[Path | None, int, list[str]]:
    found = checkpoint_directories(directory)
    if not found:
        if resume == "must":
            raise UserError(f"{directory} holds no checkpoint (--resume must)")
        return None, 0, []
    if resume == "never":
        raise UserError(
            f"{directory} already holds {found[-1].name}: give another --out_dir (--resume never)"
        )
    newest, damaged = _newest_intact(found)
    state = read_state(newest)
    identity, grown = _grown(identity, state)
    changes = _changes(directory, identity, state)
    if changes and not allow_changes:
        raise UserError(
            f"{directory} holds a run with other flags ({', '.join(changes[:5])}); "
            "give another --out_dir, or --resume_with_changes True"
        )
    notes = [_set_aside(path, problem) for path, problem in damaged.items()]
    return (
        newest,
        state["step"],
        notes + grown + [f"changed (--resume_with_changes): {change}" for change in changes],
    )


def _grown(identity: Identity, state: dict) -> tuple[Identity, list[str]]:
    """The identity without the end of the run, where that may move and is later than planned; a line that says so."""
    name, rate, step = "total_training_steps", identity.rate, state["step"]
    planned = (state.get("config") or {}).get(name)
    if rate is None or not isinstance(planned, int) or not 0 < planned < identity.flags.get(name, 0):
        return identity, []
    end = identity.flags[name]
    now, then = (rate(step, total) if rate.total == end else rate(step) for total in (planned, end))
    line = f"longer: --{name} {planned} -> {end}"
    if now != then:
        line += (
            f"; --lr_schedule {rate.schedule} follows the new end: "
            f"at step {step} the rate is {then:.3g} instead of {now:.3g}"
        )
    return replace(identity, flags={n: v for n, v in identity.flags.items() if n != name}), [line]


def _newest_intact(found: list[Path]) -> tuple[Path, dict[Path, Damaged]]:
    """The newest checkpoint whose files have their hashes, and what is wrong with those after it.

    An interrupted write leaves no directory of this name: one without its files has lost them.
    """
    damaged = {}
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            return path, damaged
        except Damaged as problem:
            damaged[path] = problem
    raise UserError(f"no checkpoint of {found[0].parent} is undamaged; {damaged[found[-1]]}")


def _set_aside(path: Path, problem: Damaged) -> str:
    """Rename a damaged checkpoint, so that it is not taken for the newest again; returns a warning."""
    aside = path.with_name(f"damaged_{path.name}_{int(time.time())}")
    try:
        path.rename(aside)
    except OSError as error:
        raise UserError(f"{problem}; it cannot be renamed: {error}") from None
    return f"warning: {problem}; it is now {aside.name}, and the one before it is taken"


def _changes(directory: str, identity: Identity, state: dict) -> list[str]:
    """What differs from the run that the checkpoint belongs to, and would change its result."""
    stored, mine = state.get("config"), identity.flags
    if not isinstance(stored, dict):
        raise UserError(f"{directory}: its checkpoint does not say with which flags it was made")
    changes = [f"--{n} {stored[n]} -> {v}" for n, v in mine.items() if n in stored and stored[n] != v]
    if (batch := state.get("global_batch_size")) != identity.global_batch:
        changes.append(f"images per step {batch} -> {identity.global_batch}")
    if (data := state.get("data")) != identity.data:
        changes.append(
            f"the images or labels of --data_dir (fingerprint {str(data)[:8]} -> {identity.data[:8]})"
        )
    return changes


def checkpoint_of(path: str) -> Path:
    """The checkpoint that --resume_checkpoint names: a checkpoint directory, or a run directory's newest.

    Of a remote one (gs://, az://), this node's copy. A run that is still training may save in between: all ranks, which
    must call it, take what rank 0 finds.
    """
    if is_remote(path):
        found = distributed.on_main(lambda: mirror.newest_checkpoint(path, "resume_checkpoint"))
        return mirror.fetch_to_cache(*found, "resume_checkpoint")
    checkpoint = distributed.on_main(lambda: newest_checkpoint(path))
    if checkpoint is None:
        raise UserError(f"{path} holds no complete checkpoint (--resume_checkpoint)")
    return checkpoint


def resume_from(trainer: Trainer, path: str) -> None:
    """Go on from a checkpoint directory, a run directory, or a model file of the original repository."""
    if is_remote(path) or os.path.isdir(path):
        trainer.load(checkpoint_of(path))
    elif os.path.isfile(path):
        trainer.load_original(path)
    else:
        raise UserError(f"{path}: no such file or directory (--resume_checkpoint)")
