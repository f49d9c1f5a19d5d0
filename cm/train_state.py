"""Everything of a training run that changes from step to step, as data; to files and back."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cm import logger
from cm.checkpoint import STATE, check_matching, load_weights, read_state
from cm.ema import EmaBank
from cm.errors import UserError
from cm.fp16_util import MasterWeights, MixedPrecisionTrainer
from cm.objectives.base import Objective
from cm.optim import state_per_parameter

_MODEL_FILE = re.compile(r"model(\d+)\.pt$")


@dataclass
class TrainState:
    """Step counter, weights of all roles, optimizer, averages, loss scale, and what the objective has learned.

    Draws and data order are functions of (seed, step), so no generator state is needed to go on.
    """

    student: MixedPrecisionTrainer
    optimizer: torch.optim.Optimizer
    ema: EmaBank
    objective: Objective
    target: MasterWeights | None = None
    teacher: MasterWeights | None = None
    step: int = 0
    bad_steps: int = 0  # skipped steps in a row
    skipped: int = 0  # skipped steps in all
    new_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = field(kw_only=True)

    def count(self, took_step: bool) -> None:
        """Count a step that was taken or skipped."""
        self.bad_steps = 0 if took_step else self.bad_steps + 1
        self.skipped += not took_step

    def promote_student(self) -> None:
        """A new stage of progressive distillation: the student is the teacher, optimizer and averages restart."""
        self.teacher.copy_from(self.student.master_params)
        self.optimizer = self.new_optimizer(self.student.master_params)
        self.ema.reset(self.student.master_params)

    def files(self) -> dict[str, dict]:
        """Weights and tensors by file name; the names are those of the original repository."""
        tag = f"{self.step:06d}"
        files = {f"model{tag}.pt": self.student.weights.state_dict()}
        for rate, copy in zip(self.ema.rates, self.ema.copies, strict=True):
            files[f"ema_{rate}_{tag}.pt"] = self.student.weights.state_dict(copy)
        if self.target is not None:
            files[f"target_model{tag}.pt"] = self.target.state_dict()
        if self.teacher is not None and self.objective.stage(self.step) is not None:
            files[f"teacher_model{tag}.pt"] = self.teacher.state_dict()
        files[f"opt{tag}.pt"] = self.optimizer.state_dict()
        if self.objective.state_dict():
            files[f"objective{tag}.pt"] = self.objective.state_dict()
        return files

    def scalars(self) -> dict:
        """The part of the state that is JSON."""
        return {
            "step": self.step,
            "lg_loss_scale": self.student.lg_loss_scale if self.student.use_fp16 else None,
            "bad_steps": self.bad_steps,
            "skipped": self.skipped,
        }

    def load(self, path: Path) -> None:
        """Restore from a checkpoint directory; every file that `files` names must be there."""
        scalars = read_state(path)
        for name in ("step", "bad_steps", "skipped"):
            if type(scalars.get(name)) is not int or scalars[name] < 0:
                raise UserError(f"{path / STATE}: {name} should be a count, not {scalars.get(name)!r}")
            setattr(self, name, scalars[name])
        scale = scalars.get("lg_loss_scale")
        if self.student.use_fp16 and scale is not None:
            if not isinstance(scale, (int, float)) or not math.isfinite(scale):
                raise UserError(f"{path / STATE}: lg_loss_scale should be a number, not {scale!r}")
            self.student.lg_loss_scale = scale
        for name in self.files():
            if not (path / name).is_file():
                raise UserError(
                    f"{path} has no {name}; it belongs to a run with other --ema_rate or --training_mode"
                )
        self._load_files(lambda name: path / name)

    def load_original(self, model_path: str) -> None:
        """Go on from a run of the original repository, given its model%06d.pt; siblings are found beside it."""
        name = Path(model_path).name
        match = _MODEL_FILE.search(name)
        if not match:
            raise UserError(f"--resume_checkpoint {model_path}: the name does not end in model<step>.pt")
        self.step = int(match[1])
        folder, tag = Path(model_path).parent, f"{self.step:06d}"

        def find(wanted: str) -> Path | None:
            # The file's own spelling of the step number, and what stands before "model" in its name.
            path = folder / (name[: match.start()] + wanted.replace(f"{tag}.pt", f"{match[1]}.pt"))
            if path.is_file():
                return path
            logger.warn(f"--resume_checkpoint: no {path}; this part starts anew from the model's weights")
            return None

        self._load_files(find)

    def _load_files(self, find: Callable[[str], Path | None]) -> None:
        tag = f"{self.step:06d}"
        model = find(f"model{tag}.pt")
        self.student.weights.load_state_dict(_read_model(self.student.model, model))
        for rate, copy in zip(self.ema.rates, self.ema.copies, strict=True):
            self._load_params(copy, find(f"ema_{rate}_{tag}.pt"))
        if self.target is not None:
            self._load_weights(self.target, find(f"target_model{tag}.pt"))
        if self.teacher is not None and self.objective.stage(self.step) is not None:
            self._load_weights(self.teacher, find(f"teacher_model{tag}.pt"))
        if path := find(f"opt{tag}.pt"):
            self._load_optimizer(path)
        if self.objective.state_dict() and (path := find(f"objective{tag}.pt")):
            self.objective.load_state_dict(load_weights(path)[0])

    @torch.no_grad()
    def _load_params(self, params: list[Tensor], path: Path | None) -> None:
        if path is None:
            source = self.student.master_params
        else:
            source = self.student.state_dict_to_master_params(_read_model(self.student.model, path))
        torch._foreach_copy_(params, [s.to(p.device) for s, p in zip(source, params, strict=True)])

    def _load_weights(self, weights: MasterWeights, path: Path | None) -> None:
        if path is None:
            weights.copy_from(self.student.master_params)
        else:
            weights.load_state_dict(_read_model(weights.module, path))

    def _load_optimizer(self, path: Path) -> None:
        own = self.optimizer.state_dict()
        state, _ = load_weights(path)
        try:
            moments = state_per_parameter(state["state"], [p.shape for p in self.student.master_params])
            # --lr, --weight_decay and the like rule, not what was saved.
            self.optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} does not fit the optimizer: {error}") from None


def _read_model(module: torch.nn.Module, path: Path) -> dict[str, Tensor]:
    """State dict of a file, checked tensor by tensor against the module."""
    state, _ = load_weights(path)
    check_matching(module, state, str(path))
    return state
