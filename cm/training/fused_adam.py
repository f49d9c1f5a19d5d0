"""Adam, AdamW and RAdam whose steps read and write every tensor once (torch's fused kernels, on CPU and CUDA).

torch has no such kernel for RAdam and needs about 22 passes over memory. States are torch's own: checkpoints are
exchangeable with those of torch.optim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Options of torch's RAdam that its own code serves
NOT_IN_THE_KERNEL = ("maximize", "decoupled_weight_decay", "capturable", "differentiable")


class AlignedStep:
    """A mixin whose step first gives gradients and moments the memory layout of their parameters.

    The fused kernel of the CPU walks through memory without looking at strides: moments of a contiguous run, loaded
    into a channels-last one, would silently meet the wrong weights.
    """

    def step(self, closure: Callable | None = None):
        """One step of torch's optimizer."""
        for group in self.param_groups:
            align_layouts(group, self.state)
        return super().step(closure)


def align_layouts(group: dict, state: dict[Tensor, dict]) -> None:
    """Copy gradients and moments whose strides differ from their parameter's."""
    for p in group["params"]:
        if p.grad is not None and p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)
        moments = state.get(p, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in moments and moments[name].stride() != p.stride():
                moments[name] = torch.empty_like(p).copy_(moments[name])


class Adam(AlignedStep, torch.optim.Adam):
    """Adam (Kingma & Ba 2015)."""


class AdamW(AlignedStep, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""


class RAdam(AlignedStep, torch.optim.RAdam):
    """Rectified Adam (Liu et al. 2020, Algorithm 2).

    From its sixth step on (beta2 = 0.999) an update is Adam's with the rate lr r_t, where eps is added to the root of
    the uncorrected second moment; the steps before are torch's own.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step on all parameters that have a gradient."""
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        done = {int(self.state.get(p, {}).get("step", 0)) for p in updated}
        special = any(group[name] for group in self.param_groups for name in NOT_IN_THE_KERNEL)
        if closure is not None or special or len(done) != 1:
            return super().step(closure)
        step = done.pop() + 1
        rectified = [rectification(step, group["betas"][1]) for group in self.param_groups]
        if not all(rectified):
            return super().step()
        for group, factor in zip(self.param_groups, rectified, strict=True):
            align_layouts(group, self.state)
            self._fused_step(group, step, factor)
        return None

    def _fused_step(self, group: dict, step: int, rectified: float) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        moments = [self.state[p] for p in params]
        for m in moments:
            m["step"].fill_(step)
        beta1, beta2 = group["betas"]
        # One number for all, made on the device: the kernel reads it there.
        count = torch.full((), float(step), device=params[0].device)
        torch._fused_adam_(
            params,
            [p.grad for p in params],
            [m["exp_avg"] for m in moments],
            [m["exp_avg_sq"] for m in moments],
            [],
            [count] * len(params),
            lr=group["lr"] * rectified,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"] / (1 - beta2**step) ** 0.5,
            amsgrad=False,
            maximize=False,
        )


def rectification(step: int, beta2: float) -> float:
    """r_t of RAdam's variance rectification (Liu et al. 2020, Eq. 5 and Algorithm 2); 0 while rho_t <= 5."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= 5:
        return 0.0
    return ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
