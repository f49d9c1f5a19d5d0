"""Everything of a training run that changes from step to step, as data; to files and back."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm.errors import UserError
from cm.objectives.base import Objective
from cm.runtime import distributed, logger
from cm.storage.checkpoint import STATE, read_state
from cm.storage.saver import Snapshot
from cm.storage.shards import load_part, load_shards, names_of, read_index
from cm.storage.weights import check_matching
from cm.training.ema import EmaBank
from cm.training.mixed_precision import MasterWeights, MixedPrecisionTrainer
from cm.training.optimizers import state_per_parameter
from cm.training.posthoc_ema import ProfileBank
from cm.training.sharding import ShardedOptimizer, broadcast_items, load_moments, optimizer_state

COUNTS = ("step", "bad_steps", "skipped")
_MODEL_FILE = re.compile(r"model(\d+)\.pt$")


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint.

    write() is its content; on ranks other than 0 it may be empty, but all ranks call it. read(path) restores the part
    from a file on rank 0, or from the student's weights, or not at all, where there is no file. shards() is this rank's
    part of the content by name, in place, where FSDP divides it.
    """

    write: Callable[[], dict]
    read: Callable[[Path | None], None]
    shards: Callable[[], dict[str, Tensor]] | None = None


@dataclass
class TrainState:
    """Step counter, weights of all roles, optimizer, averages, loss scale, and what the objective has learned.

    Draws and data order are functions of (seed, step), so no generator state is needed to go on.
    """

    student: MixedPrecisionTrainer
    optimizer: torch.optim.Optimizer | ShardedOptimizer
    ema: EmaBank
    objective: Objective
    target: MasterWeights | None = None
    teacher: MasterWeights | None = None
    profiles: ProfileBank | None = None  # averages by power functions, for averages of any length afterwards
    step: int = 0
    bad_steps: int = 0  # skipped steps in a row
    skipped: int = 0  # skipped steps in all
    new_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer | ShardedOptimizer] = field(kw_only=True)

    def count(self, took_step: bool) -> None:
        """Count a step that was taken or skipped."""
        self.bad_steps = 0 if took_step else self.bad_steps + 1
        self.skipped += not took_step

    def promote_student(self) -> None:
        """A new stage of progressive distillation: the student is the teacher, optimizer and averages restart."""
        self.teacher.copy_from(self.student.master_params)
        self.optimizer = self.new_optimizer(self.student.master_params)
        self.restart_averages()

    def restart_averages(self) -> None:
        """All averages forget what was before this step."""
        self.ema.reset(self.student.master_params)
        if self.profiles is not None:
            self.profiles.restart(self.student.master_params, self.step)

    def parts(self, step: int) -> dict[str, Part]:
        """The files of a checkpoint at this step, by stem: the file is {stem}{step:06d}.pt, as in the original."""
        averages = {f"ema_{rate}_": self._average(self.ema, i) for i, rate in enumerate(self.ema.rates)}
        if self.profiles is not None:
            stems = self.profiles.stems()
            # Their files outlive the checkpoint: never shards.
            snapshots = {stem: self._average(self.profiles, i) for i, stem in enumerate(stems)}
            averages |= {stem: replace(part, shards=None) for stem, part in snapshots.items()}
        # Only a teacher that stages replace cannot be had again from where it came.
        staged = self.objective.stage(step) is not None
        table = {
            "model": self._weights(self.student.weights),
            **averages,
            "target_model": self.target and self._weights(self.target),
            "teacher_model": self.teacher and staged and self._weights(self.teacher),
            "opt": Part(
                lambda: self._snapshot(optimizer_state(self.optimizer)),
                self._read_optimizer,
                self._moments if self.divided else None,
            ),
            "objective": self.objective.state_dict()
            and Part(self.objective.state_dict, self._read_objective),
        }
        return {stem: part for stem, part in table.items() if part}

    @property
    def divided(self) -> bool:
        """Whether a rank has a part of the weights only (--shard fsdp)."""
        return self.student.weights.divided

    def files(self, *, whole: bool = True) -> dict[str, dict]:
        """Weights and tensors of a checkpoint by file name; not `whole`: without what `shards` has.

        All ranks must call it. What is sharded is gathered on rank 0; those files are empty elsewhere.
        """
        parts = self._named_parts().items()
        return {name: part.write() for name, part in parts if whole or part.shards is None}

    def shards(self) -> dict[str, Tensor]:
        """This rank's part of what FSDP divides, in place, by FILE/NAME."""
        parts = {name: part for name, part in self._named_parts().items() if part.shards}
        return {f"{file}/{name}": t for file, part in parts.items() for name, t in part.shards().items()}

    def _named_parts(self) -> dict[str, Part]:
        return {f"{stem}{self.step:06d}.pt": part for stem, part in self.parts(self.step).items()}

    def _weights(self, weights: MasterWeights) -> Part:
        def read(path: Path | None) -> None:
            if path is None:
                weights.copy_from(self.student.master_params)
            else:
                weights.load(self._tensors(weights.module, path))

        return Part(weights.state_dict, read, weights.shards if weights.divided else None)

    def _average(self, bank: EmaBank, number: int) -> Part:
        def write() -> dict[str, Tensor]:
            average = bank.whole(number)
            return self._snapshot({} if average is None else self.student.weights.state_dict(average))

        def read(path: Path | None) -> None:
            if path is None:
                bank.load(number, enumerate(self.student.master_params))
            else:
                index = {name: i for i, name in enumerate(self.student.weights.names)}
                items = self._tensors(self.student.model, path)
                bank.load(number, ((index[name], tensor) for name, tensor in items if name in index))

        def shards() -> dict[str, Tensor]:
            return self.student.weights.shards(bank.copies[number])

        return Part(write, read, shards if self.divided else None)

    def _moments(self) -> dict[str, Tensor]:
        """This rank's part of the moments, by NUMBER/NAME."""
        layout, state = self.student.weights.layout, self.optimizer.state
        return {
            f"{i}/{key}": layout.spread(i, value)
            for i, p in enumerate(self.student.master_params)
            for key, value in state.get(p, {}).items()
        }

    def _snapshot(self, content: dict) -> dict:
        """What was gathered is a copy already."""
        return Snapshot(content) if self.ema.partition.parts > 1 else content

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors that this rank keeps from step to step, by kind; gradients are as large as what is listed."""
        student = self.student.weights
        masters = student.fp32_copies()
        banks = (self.ema, self.profiles)
        found = {
            "parameters": student.own_tensors(),
            "fp32 parameters": masters,
            "gradients": student.master_params if student.divided else [*student.model_params, *masters],
            "optimizer": [
                t
                for moments in self.optimizer.state.values()
                for t in moments.values()
                if isinstance(t, Tensor)
            ],
            "averages": [p for bank in banks if bank for copy in bank.copies for p in copy],
        }
        for role, weights in (("target", self.target), ("teacher", self.teacher)):
            if weights is not None:
                found[role] = [*weights.own_tensors(), *weights.fp32_copies()]
        return {kind: tensors for kind, tensors in found.items() if tensors}

    def scalars(self) -> dict:
        """The part of the state that is JSON."""
        profiles = {} if self.profiles is None else {"profiles_start": self.profiles.start}
        return {
            "step": self.step,
            "lg_loss_scale": self.student.lg_loss_scale if self.student.use_fp16 else None,
            "bad_steps": self.bad_steps,
            "skipped": self.skipped,
            **profiles,
        }

    def load(self, path: Path) -> None:
        """Restore from a checkpoint directory; the file of every part must be there, others are left alone.

        Rank 0 reads, one file at a time; all ranks must call it.
        """
        scalars = distributed.on_main(lambda: self._read_scalars(path))
        for name in COUNTS:
            setattr(self, name, scalars[name])
        if self.student.use_fp16 and scalars.get("lg_loss_scale") is not None:
            self.student.lg_loss_scale = scalars["lg_loss_scale"]
        if self.profiles is not None:
            self.profiles.start = scalars.get("profiles_start", 0)
        index = distributed.on_main(lambda: self._require_files(path))
        if index and self.divided:
            self._load_shards(path, index)
        held = names_of(index) if self.divided else []
        self._read_parts(lambda name: path / name, leave=held)

    def _read_scalars(self, path: Path) -> dict:
        """The JSON part of a checkpoint directory, checked."""
        scalars = read_state(path)
        for name in COUNTS:
            if type(scalars.get(name)) is not int or scalars[name] < 0:
                raise UserError(f"{path / STATE}: {name} should be a count, not {scalars.get(name)!r}")
        scale = scalars.get("lg_loss_scale")
        is_number = isinstance(scale, (int, float)) and math.isfinite(scale)
        if self.student.use_fp16 and scale is not None and not is_number:
            raise UserError(f"{path / STATE}: lg_loss_scale should be a number, not {scale!r}")
        return scalars

    def _require_files(self, path: Path) -> dict[str, Any]:
        """The index of the checkpoint's shards, empty where it has none."""
        index = read_index(path)
        for name in self._named_parts():
            if not (path / name).is_file() and name not in names_of(index):
                flags = "--ema_rate, --ema_profiles, --training_mode"
                raise UserError(f"{path} has no {name}: its run had other averages or objectives ({flags})")
        return index

    def _load_shards(self, path: Path, index: dict[str, Any]) -> None:
        """Restore this rank's parts from what any number of ranks has saved of theirs."""
        layout, opt = self.student.weights.layout, f"opt{self.step:06d}.pt/"
        self.optimizer.state.clear()
        moments: dict[tuple[int, str], Tensor] = {}
        for name in index:
            if name.startswith(opt):
                number, _, key = name.removeprefix(opt).partition("/")
                like = self.student.master_params[int(number)]
                scalar = not index[name]["size"] and like.ndim
                moments[int(number), key] = torch.zeros(()) if scalar else torch.zeros_like(like)
        tensors = self.shards() | {f"{opt}{i}/{key}": layout.spread(i, t) for (i, key), t in moments.items()}
        load_shards(path, tensors, index)
        load_moments(self.optimizer, iter(moments.items()))
        for weights in (self.student.weights, self.target, self.teacher):
            if weights is not None:
                weights.to_model()

    def load_original(self, model_path: str) -> None:
        """Go on from a run of the original repository, given its model%06d.pt; siblings are found beside it."""
        name = Path(model_path).name
        match = _MODEL_FILE.search(name)
        if not match:
            raise UserError(f"{model_path}: the name does not end in model<step>.pt (--resume_checkpoint)")
        self.step = int(match[1])
        if self.profiles is not None:
            self.profiles.start = self.step
        folder, tag = Path(model_path).parent, f"{self.step:06d}"

        def find(wanted: str) -> Path | None:
            # The file's own spelling of the step number, and what stands before "model" in its name.
            path = folder / (name[: match.start()] + wanted.replace(f"{tag}.pt", f"{match[1]}.pt"))
            if path.is_file():
                return path
            if wanted.startswith("model"):
                raise UserError(f"{model_path}: no such file (--resume_checkpoint)")
            logger.warn(f"warning: no {path}; this part starts anew from the model's weights")
            return None

        self._read_parts(find)

    def _read_parts(self, find: Callable[[str], Path | None], leave: Iterable[str] = ()) -> None:
        """Restore every part but some from the file that find(name) names on rank 0."""
        parts = {name: part for name, part in self._named_parts().items() if name not in leave}
        paths = distributed.on_main(lambda: {name: find(name) for name in parts})
        for name, part in parts.items():
            part.read(paths[name])

    def _tensors(self, module: torch.nn.Module, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a file that rank 0 reads and checks against the module."""

        def read() -> dict[str, Tensor]:
            state, _ = load_part(path)
            check_matching(module, state, str(path))
            return state

        return broadcast_items(read, self.ema.partition.device)

    def _read_optimizer(self, path: Path | None) -> None:
        if path is None:
            return
        shapes = self.ema.partition.shapes

        def read() -> dict[tuple[int, str], Any]:
            state, _ = load_part(path)
            try:
                moments = state_per_parameter(state["state"], shapes)
                return {(i, key): value for i, own in moments.items() for key, value in own.items()}
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(f"{path} does not fit the optimizer: {error}") from None

        items = broadcast_items(read, self.ema.partition.device)
        try:
            load_moments(self.optimizer, items)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not fit the optimizer: {error}") from None

    def _read_objective(self, path: Path | None) -> None:
        if path is not None:
            self.objective.load_state_dict(distributed.on_main(lambda: load_part(path)[0]))
