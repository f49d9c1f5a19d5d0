"""Which checkpoint a run goes on from, and whether it may: same flags, same data, undamaged files."""

import os
import time
from pathlib import Path

from cm import dist_util, logger
from cm.beats import is_alive, read_beats
from cm.checkpoint import complete_checkpoints, read_state, verify_checkpoint
from cm.config import CmTrainConfig, EdmTrainConfig, result_flags
from cm.derived import global_batch
from cm.errors import UserError


def find_checkpoint(config: EdmTrainConfig | CmTrainConfig, directory: str, data: str) -> Path | None:
    """The newest undamaged checkpoint of a run directory, None for a new run; rank 0 looks, every rank gets it.

    data: fingerprint of the data set. UserError where flags or data differ and --resume_with_changes is not given.
    """
    return dist_util.on_main(lambda: _find(config, directory, data))


def _find(config: EdmTrainConfig | CmTrainConfig, directory: str, data: str) -> Path | None:
    _refuse_second_start(directory)
    found = complete_checkpoints(directory)
    if not found:
        if config.resume == "must":
            raise UserError(f"--resume must: {directory} holds no complete checkpoint")
        return None
    if config.resume == "never":
        raise UserError(f"--resume never: {directory} already holds {found[-1].name}; give another --out_dir")
    newest = _newest_intact(found)
    _compare(config, directory, data, read_state(newest))
    return newest


def _refuse_second_start(directory: str) -> None:
    """Two starts of one run would write into each other's files."""
    alive = [
        beat
        for beat in read_beats(directory)
        if is_alive(beat) and beat.pid != os.getpid() and not beat.ended
    ]
    if alive:
        raise UserError(f"{directory} belongs to a run that is still going on: {alive[0]}")


def _newest_intact(found: list[Path]) -> Path:
    """The newest checkpoint whose files have their hashes; damaged ones are set aside under another name."""
    problem = None
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            problem = error
            aside = path.with_name(f"damaged_{path.name}_{int(time.time())}")
            path.rename(aside)
            logger.warn(f"warning: {error}; it is now {aside.name}, and the one before it is taken")
    raise UserError(f"no checkpoint of {found[0].parent} is undamaged; the last problem: {problem}")


def _compare(config: EdmTrainConfig | CmTrainConfig, directory: str, data: str, state: dict) -> None:
    stored, mine = state.get("config"), result_flags(config)
    if not isinstance(stored, dict):
        raise UserError(f"{directory}: its checkpoint does not say with which flags it was made")
    changed = [f"--{n} {stored[n]} -> {v}" for n, v in mine.items() if n in stored and stored[n] != v]
    batch, stored_batch = global_batch(config, dist_util.get_world_size()), state.get("global_batch_size")
    if stored_batch != batch:
        changed.append(f"images per step {stored_batch} -> {batch}")
    if state.get("data") != data:
        changed.append(
            f"the images or labels of --data_dir (fingerprint {str(state.get('data'))[:8]} -> {data[:8]})"
        )
    if changed and not config.resume_with_changes:
        raise UserError(
            f"{directory} holds a run with other flags ({', '.join(changed[:5])}); "
            "give another --out_dir, or --resume_with_changes True"
        )
    if changed:
        logger.log(f"--resume_with_changes: {', '.join(changed)}")


def checkpoint_of(path: str) -> Path:
    """The checkpoint that --resume_checkpoint names: a checkpoint directory, or a run directory's newest."""
    found = [Path(path)] if Path(path, "manifest.json").is_file() else complete_checkpoints(path)
    if not found:
        raise UserError(f"--resume_checkpoint {path} holds no complete checkpoint")
    return found[-1]
