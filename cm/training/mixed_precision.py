"""Mixed precision: fp32 master weights of a network with a half-precision torso, and fp16's dynamic loss scale."""

from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor

from cm.config.choices import PRECISIONS
from cm.errors import UserError
from cm.nn import update_ema
from cm.runtime import distributed

MIN_LG_LOSS_SCALE = -10.0


class MasterWeights:
    """A module and fp32 copies of its parameters; in fp32 the copies are the parameters themselves.

    The copies are made before the torso is converted, so that they are not rounded to half precision first. Weights
    that never change need none: with `keep_fp32` False the converted parameters are all there is.
    divided: a rank has a part of them only.
    """

    divided = False

    def __init__(self, module: nn.Module, precision: str = "fp32", *, keep_fp32: bool = True):
        dtype = PRECISIONS.load(precision)
        self.module = module
        self.precision = precision
        self.names = [name for name, _ in module.named_parameters()]
        self.shared = dtype == torch.float32 or not keep_fp32
        copies = [] if self.shared else [p.detach().float().clone() for p in module.parameters()]
        if dtype != torch.float32:
            self.convert(module, precision)
        for p in copies:
            p.requires_grad_(True)
        self.model_params = list(module.parameters())
        self.master_params = self.model_params if self.shared else copies

    @staticmethod
    def convert(module: nn.Module, precision: str) -> None:
        """Convert a module's torso; UserError where it has none."""
        if not hasattr(module, "convert_torso"):
            raise UserError(
                f"{type(module).__name__} has no half-precision torso for {precision}: use fp32 (--precision)"
            )
        module.convert_torso(PRECISIONS.load(precision))

    @torch.no_grad()
    def to_model(self) -> None:
        """Write the master weights into the module, rounding where its dtype is lower."""
        if not self.shared:
            torch._foreach_copy_(self.model_params, self.master_params)

    @torch.no_grad()
    def project(self) -> None:
        """What the module wants of its weights after an optimizer step, if anything: forced normalisation, say."""
        if hasattr(self.module, "project"):
            self.module.project(dict(zip(self.names, self.master_params, strict=True)))

    @torch.no_grad()
    def copy_from(self, source: list[Tensor]) -> None:
        """Take over fp32 weights in parameter order."""
        torch._foreach_copy_(self.master_params, source)
        self.to_model()

    def ema_from(self, source: list[Tensor], rate: float) -> None:
        """Move the master weights towards fp32 tensors in parameter order: w <- rate w + (1 - rate) source."""
        update_ema(self.master_params, source, rate)
        self.to_model()

    def synchronize(self) -> None:
        """Give every rank the weights and buffers of rank 0."""
        distributed.sync_params([*self.master_params, *self.module.buffers()])
        self.to_model()

    def collect_gradients(self) -> None:
        """Give the master weights their gradients, widened."""
        if not self.shared:
            for master, p in zip(self.master_params, self.model_params, strict=True):
                if p.grad is not None:
                    master.grad = p.grad.to(master.dtype)

    def norm(self, tensors: list[Tensor | None]) -> Tensor:
        """Euclidean norm of all entries of one tensor per parameter, or None."""
        found = [t for t in tensors if t is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))

    def own_tensors(self) -> list[Tensor]:
        """What the module keeps on this rank."""
        return [*self.module.parameters(), *self.module.buffers()]

    def fp32_copies(self) -> list[Tensor]:
        """The master weights, where they are not the module's own."""
        return [] if self.shared else self.master_params

    def mine(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank keeps of a whole tensor of the state dict: all of it."""
        return tensor

    def state_dict(self, params: list[Tensor] | None = None) -> dict[str, Tensor]:
        """The module's state dict in fp32, from the master weights or from other tensors in parameter order."""
        state = self.module.state_dict()
        params = self.master_params if params is None else params
        state.update({name: p.detach() for name, p in zip(self.names, params, strict=True)})
        return state

    @torch.no_grad()
    def load(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Copy an fp32 state dict, given tensor by tensor, into the master weights and the module."""
        places = self.module.state_dict() | dict(zip(self.names, self.master_params, strict=True))
        for name, tensor in items:
            places.pop(name).copy_(self.mine(name, tensor))
        if places:
            raise ValueError(f"no values for {', '.join(places)}")
        self.to_model()


class MixedPrecisionTrainer:
    """Backward passes and optimizer steps on fp32 master weights.

    fp16 multiplies the loss by 2^lg_loss_scale: the exponent grows by `fp16_scale_growth` per good step and falls by
    1 when a gradient is not finite, in which case the step is skipped (Micikevicius et al. 2018). Steps with bad
    gradients are skipped in every precision.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = 20.0,
        precision: str | None = None,
        grad_clip: float = 0.0,
        weights: Callable[[nn.Module, str], MasterWeights] = MasterWeights,
    ):
        self.weights = weights(model, precision or ("fp16" if use_fp16 else "fp32"))
        self.model = model
        self.use_fp16 = self.weights.precision == "fp16"
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale if self.use_fp16 else 0.0
        self.grad_clip = grad_clip
        self.grad_norm: Tensor | None = None
        self.param_norm: Tensor | None = None

    @property
    def model_params(self) -> list[nn.Parameter]:
        """Parameters of the module, in its own dtypes."""
        return self.weights.model_params

    @property
    def master_params(self) -> list[Tensor]:
        """fp32 parameters that the optimizer steps on."""
        return self.weights.master_params

    def zero_grad(self) -> None:
        """Forget the gradients of the module and of the master weights."""
        for p in (*self.model_params, *self.master_params):
            p.grad = None

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a scalar loss, scaled in fp16."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    @torch.no_grad()
    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """Step on the master weights; False when gradients were not finite and nothing was changed.

        Reads one flag from the device. `grad_norm` and `param_norm` (before the step) stay on the device.
        """
        grads = self._master_grads()
        self.grad_norm = self.weights.norm([p.grad for p in self.master_params])
        self.param_norm = self.weights.norm(self.master_params)
        if not bool(torch.isfinite(self.grad_norm)):
            if self.use_fp16:
                self.lg_loss_scale = max(self.lg_loss_scale - 1, MIN_LG_LOSS_SCALE)
            self.zero_grad()
            return False
        if self.grad_clip:
            scale = (self.grad_clip / (self.grad_norm + 1e-6)).clamp_max(1.0)
            torch._foreach_mul_(grads, scale)
        opt.step()
        self.weights.project()
        self.zero_grad()
        self.weights.to_model()
        if self.use_fp16:
            self.lg_loss_scale += self.fp16_scale_growth
        return True

    def _master_grads(self) -> list[Tensor]:
        """fp32 gradients of all parameters, unscaled, attached to the master weights."""
        self.weights.collect_gradients()
        grads = [p.grad for p in self.master_params if p.grad is not None]
        if self.use_fp16:
            torch._foreach_mul_(grads, 2**-self.lg_loss_scale)
        return grads

    def master_params_to_state_dict(self, master_params: list[Tensor]) -> dict[str, Tensor]:
        """fp32 state dict of tensors in parameter order (the master weights or a moving average of them)."""
        return self.weights.state_dict(master_params)

    def state_dict_to_master_params(self, state_dict: dict[str, Tensor]) -> list[Tensor]:
        """fp32 tensors in parameter order, detached from the state dict."""
        return [state_dict[name].detach().float().clone() for name in self.weights.names]
