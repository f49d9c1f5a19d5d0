"""Peers of a whole training step or of a batch of samples, with the same weights as what they stand beside.

`original`: the arithmetic of the original's loop (Song et al. 2023, released code), written anew: torch's memory
format, blocks operation by operation, RAdam tensor by tensor, every average in a Python loop, in half precision two
flat tensors of master weights. `diffusers`: UNet2DModel, where that package can be imported, with torch's multi-tensor
updates.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cm.commands.sample import noise_levels
from cm.config.choices import PRECISIONS
from cm.config.derived import precision
from cm.config.scripts import Config, SampleConfig
from cm.diffusion.denoiser import Denoiser
from cm.models.factory import create_network
from cm.objectives.base import Roles
from cm.seeding import StepRandom
from cm.tools.bench.network import diffusers_network, make_plain
from cm.tools.bench.runs import TrainConfig
from cm.training.trainer import Trainer

T = TypeVar("T")
Convert = Callable[[nn.Module, Config], nn.Module]

LG_LOSS_SCALE = 20.0  # of fp16, as a run begins
CHECKOUT_PROGRAM = Path(__file__).with_name("original_checkout.py")


class FreshDraws(StepRandom):
    """Draws straight from torch's generator, on the device: of no use to a run that resumes."""

    def _scalars(self, kind: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return draw(torch.default_generator)[self.start : self.stop].to(self.device)

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(self.stop - self.start, *shape, device=self.device)


class PlainLoop:
    """A training loop without any of this package's care for speed.

    roles: denoisers in torch's memory format, in the precision of the torso. foreach: updates and averages of all
    tensors at once instead of tensor by tensor.
    """

    def __init__(self, trainer: Trainer, roles: Roles, *, foreach: bool, scale: float = 1.0):
        self.trainer, self.roles, self.foreach, self.scale = trainer, roles, foreach, scale
        self.params = list(roles.student.net.parameters())
        self.half = any(p.element_size() < 4 for p in self.params)
        self.masters = _masters(trainer.state.student.master_params) if self.half else self.params
        self.optimizer = torch.optim.RAdam(
            self.masters, lr=trainer.optimization.learning_rate(0), foreach=foreach
        )
        self.averages = [[p.detach().clone() for p in self.masters] for _ in trainer.state.ema.rates]
        self.target = None
        if roles.target is not None:
            followed = list(roles.target.net.parameters())
            self.target = _masters(trainer.state.target.master_params) if self.half else followed

    def step(self, images: Tensor, cond: dict[str, Tensor]) -> None:
        """One step on the whole batch."""
        trainer, device = self.trainer, self.trainer.device
        x0, cond = images.to(device), {name: value.to(device) for name, value in cond.items()}
        step, rows = trainer.state.step, len(x0)
        draw = trainer.objective.draw(x0, step, FreshDraws(0, step, 0, rows, rows, device))
        for p in self.params:
            p.grad = None
        terms = trainer.objective.forward(self.roles, x0, draw, step, **cond)
        ((terms["loss"] * draw.weight).mean() * self.scale).backward()
        self._update(trainer.objective.target_decay(step))

    @torch.no_grad()
    def _update(self, mu: float) -> None:
        if self.half:
            for master, group in zip(self.masters, _groups(self.params)):
                master.grad = torch.cat([p.grad.float().flatten() for p in group]) / self.scale
        norm = sum((m.grad**2).sum() for m in self.masters if m.grad is not None)
        sum((m**2).sum() for m in self.masters)  # the norm of the weights, which is logged
        if not torch.isfinite(norm):
            return
        self.optimizer.step()
        if self.half:
            _spread(self.masters, self.params)
        for rate, average in zip(self.trainer.state.ema.rates, self.averages):
            self._average(average, rate)
        if self.target is not None:
            self._average(self.target, mu)
            if self.half:
                _spread(self.target, list(self.roles.target.net.parameters()))

    def _average(self, average: list[Tensor], rate: float) -> None:
        if self.foreach:
            torch._foreach_lerp_(average, self.masters, 1 - rate)
        else:
            for mean, value in zip(average, self.masters):
                mean.mul_(rate).add_(value, alpha=1 - rate)


def _groups(params: list[Tensor]) -> list[list[Tensor]]:
    """Vectors, and everything else, as the original's two flat tensors hold them."""
    return [[p for p in params if (p.ndim <= 1) == vectors] for vectors in (True, False)]


def _masters(params: list[Tensor]) -> list[Tensor]:
    """Two flat fp32 copies of all parameters."""
    return [torch.cat([p.detach().flatten() for p in group]).requires_grad_() for group in _groups(params)]


def _spread(masters: list[Tensor], params: list[Tensor]) -> None:
    """Write flat master weights back into the network's parameters."""
    for master, group in zip(masters, _groups(params)):
        for p, values in zip(group, master.split([p.numel() for p in group])):
            p.copy_(values.view_as(p))


def peer_loops(trainer: Trainer, config: TrainConfig) -> tuple[dict[str, PlainLoop], dict[str, str]]:
    """(loops by name, why others were left out by name)."""
    scale = 2.0**LG_LOSS_SCALE if precision(config) == "fp16" else 1.0

    def loop(name: str, convert: Convert) -> PlainLoop:
        roles = _roles_of(trainer, lambda net: convert(net, config))
        return PlainLoop(trainer, roles, foreach=name != "original", scale=scale)

    return _possible(loop, config)


def peer_batches(
    denoiser: Denoiser, config: SampleConfig
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """(functions that draw a batch as `plain_batch` by name, why others were left out by name)."""

    def batch(name: str, convert: Convert) -> Callable[[], Tensor]:
        net = convert(denoiser.net, config).eval()
        return lambda: plain_batch(replace(denoiser, net=net), config)

    return _possible(batch, config)


def _possible(make: Callable[[str, Convert], T], config: Config) -> tuple[dict[str, T], dict[str, str]]:
    made, left_out = {}, {}
    for name, convert in (("original", _plain_network), ("diffusers", diffusers_network)):
        if name == "diffusers" and precision(config) != "fp32":
            left_out[name] = "is compared in fp32 only: its half precision is another one"
            continue
        try:
            made[name] = make(name, convert)
        except Exception as error:  # a missing package, a broken one, an architecture that it does not have
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return made, left_out


@torch.no_grad()
def plain_batch(denoiser: Denoiser, config: SampleConfig) -> Tensor:
    """A batch as the original's loop draws it, uint8 (B, H, W, C) on the host: one step, or Heun's method."""
    device = next(denoiser.net.parameters()).device
    shape = (config.batch_size, config.in_channels, config.image_size, config.image_size)
    levels = noise_levels(config).to(device)
    x = torch.randn(*shape, device=device) * levels[0]

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoiser(x, sigma * x.new_ones([len(x)])).clamp(-1, 1)) / sigma

    if config.sampler == "onestep":
        x = denoiser(x, levels[0] * x.new_ones([len(x)])).clamp(-1, 1)
    else:
        for sigma, below in pairwise(levels):
            d = slope(x, sigma)
            ahead = x + d * (below - sigma)
            x = ahead if below == 0 else x + (d + slope(ahead, below)) / 2 * (below - sigma)
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def _roles_of(trainer: Trainer, convert: Callable[[nn.Module], nn.Module]) -> Roles:
    """The trainer's roles with copies of their networks, converted; in their modes, frozen where theirs are."""

    def copied(role: Denoiser | None) -> Denoiser | None:
        if role is None:
            return None
        net = convert(role.net).train(role.net.training)
        learns = any(p.requires_grad for p in role.net.parameters())
        return replace(role, net=net.requires_grad_(learns))

    roles = replace(trainer.roles, student=replace(trainer.roles.student, net=trainer.model))
    return replace(roles, **{name: copied(getattr(roles, name)) for name in ("student", "target", "teacher")})


def _plain_network(net: nn.Module, config: Config) -> nn.Module:
    """A copy of the network in torch's memory format, its blocks written operation by operation."""
    device = next(net.parameters()).device
    plain = make_plain(create_network(config)).to(device)
    plain.load_state_dict(net.state_dict())
    if (dtype := PRECISIONS.load(precision(config))) != torch.float32:
        plain.convert_torso(dtype)
    return plain


def checkout_step(checkout: str, config: TrainConfig, options: Any) -> dict[str, Any]:
    """Times of the consistency distillation step of a checkout of the original; RuntimeError says what is missing."""
    names = (
        "image_size num_channels num_res_blocks channel_mult num_heads num_head_channels num_heads_upsample "
    )
    names += "attention_resolutions dropout use_checkpoint use_scale_shift_norm resblock_updown class_cond learn_sigma"
    model = {name: getattr(config, name) for name in names.split()}
    asked = {
        "checkout": str(Path(checkout).resolve()),
        "model": model,
        "fp16": precision(config) == "fp16",
        "batch": config.batch_size,
        "scales": config.start_scales,
        "lr": config.lr,
        "device": options.device,
        "warmup": options.warmup,
        "repeats": options.repeats,
    }
    done = subprocess.run(
        [sys.executable, str(CHECKOUT_PROGRAM), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(Path(checkout).resolve())},
        cwd=CHECKOUT_PROGRAM.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"the step of {checkout} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
