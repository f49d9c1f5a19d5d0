"""Run directories as training leaves them, without training."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cm.config.derived import stored_config
from cm.config.scripts import SCRIPTS, configure
from cm.data.images import save_grid


def make_run(
    path: Path,
    *,
    script: str = "",
    steps: Sequence[int] = (10, 20),
    total: int = 40,
    ended: str | bool = "finished",
    previews: Sequence[str] = (),
    **flags,
) -> Path:
    """A run with a row per step, previews of these samplers at each step, and a checkpoint at the last one."""
    script = script or ("cm_train" if "training_mode" in flags else "edm_train")
    config = configure(SCRIPTS[script], total_training_steps=total, out_dir=str(path), **flags)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(stored_config(config)))
    rows = [log_row(step) for step in steps]
    (path / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "log.txt").write_text("run directory: x\n---\n| loss | 1 |\n---\n")
    for step in steps:
        for sampler in previews:
            (path / "previews").mkdir(exist_ok=True)
            images = np.full((4, 8, 8, 1), step % 256, np.uint8)
            save_grid(path / "previews" / f"step_{step:06d}_{sampler}.png", images)
    if steps:
        checkpoint = path / "checkpoints" / f"step_{steps[-1]:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        state = {"versions": {"python": "3.11.0"}, "data": "abc", "global_batch_size": 64}
        (checkpoint / "state.json").write_text(json.dumps(state))
    if ended:
        (path / "status.json").write_text(
            json.dumps({"ended": ended, "message": "", "exit_code": 0, "time": "now"})
        )
    return path


def log_row(step: int) -> dict:
    """What the trainer logs at a step."""
    levels = {f"loss_q{q}": (q + 1) / step for q in range(4)}
    norms = {"grad_norm": 2.0, "param_norm": 30.0, "lr": 1e-3, "skipped": 0}
    return {"step": step, "samples": 64 * step, "loss": 1 / step, **levels, **norms, "images_per_sec": 128.0}
