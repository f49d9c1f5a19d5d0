"""Which checkpoint a run goes on from, and whether it may: same flags, same data, undamaged files."""

import os
import time
from pathlib import Path

from cm.config.derived import global_batch
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, result_flags
from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.liveness import is_alive, read_beats
from cm.storage import mirror
from cm.storage.checkpoint import checkpoint_directories, complete_checkpoints, read_state, verify_checkpoint
from cm.storage.filesystem import is_remote
from cm.storage.weights import Damaged


def find_checkpoint(
    config: EdmTrainConfig | CmTrainConfig, directory: str, data: str
) -> tuple[Path | None, list[str]]:
    """(the newest undamaged checkpoint of a run directory, what the log should say); None for a new run.

    Rank 0 looks, every rank gets the answer. data: fingerprint of the data set. UserError where flags or data differ
    and --resume_with_changes is not given.
    """
    return distributed.on_main(lambda: _find(config, directory, data))


def _find(config: EdmTrainConfig | CmTrainConfig, directory: str, data: str) -> tuple[Path | None, list[str]]:
    _refuse_second_start(directory)
    found = checkpoint_directories(directory)
    if not found:
        if config.resume == "must":
            raise UserError(f"--resume must: {directory} holds no checkpoint")
        return None, []
    if config.resume == "never":
        raise UserError(f"--resume never: {directory} already holds {found[-1].name}; give another --out_dir")
    newest, damaged = _newest_intact(found)
    changes = _changes(config, directory, data, read_state(newest))
    if changes and not config.resume_with_changes:
        raise UserError(
            f"{directory} holds a run with other flags ({', '.join(changes[:5])}); "
            "give another --out_dir, or --resume_with_changes True"
        )
    notes = [_set_aside(path, problem) for path, problem in damaged.items()]
    return newest, notes + [f"--resume_with_changes: {change}" for change in changes]


def _refuse_second_start(directory: str) -> None:
    """Two starts of one run would write into each other's files."""
    alive = [
        beat
        for beat in read_beats(directory)
        if is_alive(beat) and beat.pid != os.getpid() and not beat.ended
    ]
    if alive:
        raise UserError(f"{directory} belongs to a run that is still going on: {alive[0]}")


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


def _changes(config: EdmTrainConfig | CmTrainConfig, directory: str, data: str, state: dict) -> list[str]:
    """What differs from the run that the checkpoint belongs to, and would change its result."""
    stored, mine = state.get("config"), result_flags(config)
    if not isinstance(stored, dict):
        raise UserError(f"{directory}: its checkpoint does not say with which flags it was made")
    changes = [f"--{n} {stored[n]} -> {v}" for n, v in mine.items() if n in stored and stored[n] != v]
    batch, stored_batch = global_batch(config, distributed.get_world_size()), state.get("global_batch_size")
    if stored_batch != batch:
        changes.append(f"images per step {stored_batch} -> {batch}")
    if state.get("data") != data:
        stored_data = str(state.get("data"))
        changes.append(f"the images or labels of --data_dir (fingerprint {stored_data[:8]} -> {data[:8]})")
    return changes


def checkpoint_of(path: str) -> Path:
    """The checkpoint that --resume_checkpoint names: a checkpoint directory, or a run directory's newest.

    Of a remote one (gs://, az://), this node's copy. A run that is still training may save in between: all ranks, which
    must call it, take what rank 0 finds.
    """
    if is_remote(path):
        found = distributed.on_main(lambda: mirror.newest_checkpoint(path, "resume_checkpoint"))
        return mirror.fetch_to_cache(*found, "resume_checkpoint")
    return distributed.on_main(lambda: _local_checkpoint(path))


def _local_checkpoint(path: str) -> Path:
    found = [Path(path)] if Path(path, "manifest.json").is_file() else complete_checkpoints(path)
    if not found:
        raise UserError(f"--resume_checkpoint {path} holds no complete checkpoint")
    return found[-1]
