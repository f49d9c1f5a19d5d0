"""Networks alone: the U-Net and its peers with the same weights, forward and training step at three sizes, in turns.

Peers: diffusers' UNet2DModel, where that package is installed, and `plain`: the same network in torch's default memory
format, with its blocks as one writes them without thinking of speed.

Of the score-SDE networks for CIFAR-10, which have no peer, the part of the time that is not convolution.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm.config.scripts import Config, SampleConfig, configure
from cm.models.factory import choose_device, create_network
from cm.models.memory_format import memory_format
from cm.networks.attention import AttentionBlock
from cm.networks.unet import ResBlock
from cm.nn import append_dims, mean_flat
from cm.runtime.cpu import keep_freed_memory
from cm.runtime.torchvision_operators import declare_missing_operators
from cm.storage.shapes import shapes_only
from cm.tools.bench.runs import Options, randomized
from cm.tools.convert.diffusers import to_diffusers, unet_config
from cm.tools.profiling.kernels import COUNTED, time_shares
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing, beside_peers, interleaved, peak_memory, product_ceiling
from cm.tools.profiling.trace import traced
from cm.training.optimizers import make_optimizer

# case -> (batch, flags of the network)
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    f"{side}px": (
        batch,
        {
            "image_size": side,
            "num_channels": width,
            "channel_mult": levels,
            "num_res_blocks": 2,
            "attention_resolutions": attention,
            "num_head_channels": head,
        },
    )
    for batch, side, width, levels, attention, head in (
        (64, 16, 32, "1,2", "8", 32),
        (16, 32, 64, "1,2,2", "16,8", 32),
        (4, 64, 64, "1,2,3,4", "32,16,8", 64),
    )
}
# Score-SDE networks: case and --network
SCORE_SDE = ("ncsnpp", "ddpmpp")
SCORE_SDE_BATCH = 4
CIFAR10 = {
    "image_size": 32,
    "num_channels": 128,
    "channel_mult": "2,2,2",
    "num_res_blocks": 4,
    "attention_resolutions": "16",
}

Network = Callable[[Tensor, Tensor], Tensor]


def bench_network(options: Options) -> list[Row]:
    """Two rows per case: the forward pass without gradients, and a step with loss, backward and optimizer."""
    rows = []
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    for case in options.chosen((*SIZES, *SCORE_SDE)):
        rows += (
            score_sde_rows(case, options, device) if case in SCORE_SDE else size_rows(case, options, device)
        )
    return rows


def size_rows(case: str, options: Options, device: torch.device) -> list[Row]:
    """The U-Net of one size and its peers."""
    batch, flags = SIZES[case]
    config = configure(SampleConfig, **flags, use_scale_shift_norm=True, resblock_updown=True, in_channels=3)
    inputs = make_inputs(config, batch, device)
    ceiling, flops = product_ceiling(device, torch.float32), forward_flops(config, *inputs)
    runs = {
        kind: make(make_contestants(config, device, training=kind == "step", images=batch), *inputs)
        for kind, make in (("forward", forwards), ("step", steps))
    }
    # All times before the first peak, so that the profiler that counts memory can change none of them.
    timings = {
        kind: interleaved(calls, device, warmup=options.warmup, repeats=options.repeats)
        for kind, calls in runs.items()
    }
    rows = []
    for kind, work in (("forward", flops), ("step", 3 * flops)):
        peaks = {name: peak_memory(run, device) for name, run in runs[kind].items()}
        figures = compared(timings[kind], peaks, batch)
        figures["share_of_ceiling"] = work / timings[kind]["cm"].undisturbed(device) / ceiling
        rows.append(Row(f"network/{case}/{kind}", {"batch": batch, **flags}, figures))
    return rows


def score_sde_rows(case: str, options: Options, device: torch.device) -> list[Row]:
    """NCSN++ or DDPM++ alone: time, memory, and the share of time that is not convolution."""
    batch = SCORE_SDE_BATCH
    config = configure(SampleConfig, network=case, in_channels=3, **CIFAR10)
    inputs = make_inputs(config, batch, device)
    ceiling, flops = product_ceiling(device, torch.float32), forward_flops(config, *inputs)
    rows = []
    for kind, make, work in (("forward", forwards, flops), ("step", steps, 3 * flops)):
        net = randomized(create_network(config)).to(device)
        net = in_our_format(net, config, device, training=kind == "step", images=batch)
        run = make({"cm": (net, net)}, *inputs)["cm"]
        timing = interleaved({"cm": run}, device, warmup=options.warmup, repeats=options.repeats)["cm"]
        figures = {
            **timing.summary(),
            "images_per_second": batch / timing.median,
            "peak_memory_mib": peak_memory(run, device) / 2**20,
            "share_of_ceiling": work / timing.undisturbed(device) / ceiling,
            **time_shares(run, device),
        }
        rows.append(
            Row(f"network/{case}/{kind}", {"batch": batch, **CIFAR10, "convolution": COUNTED}, figures)
        )
    return rows


class PlainResBlock(ResBlock):
    """The residual block operation by operation."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        emb = append_dims(self.emb_layers(emb), x.ndim).to(x.dtype)
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.resample(x)) + h


class PlainAttentionBlock(AttentionBlock):
    """The attention block with convolutions on the feature map."""

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(1, (3, self.num_heads, -1)).flatten(4)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B, H, L, D)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return x + self.proj_out(attended.reshape(x.shape))


PLAIN = {ResBlock: PlainResBlock, AttentionBlock: PlainAttentionBlock}


def make_plain(net: nn.Module) -> nn.Module:
    """The network with plain blocks, in place."""
    for module in net.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return net


def make_inputs(config: SampleConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images (batch, 3, R, R) and times (batch,)."""
    x = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    return x, 100 * torch.randn(batch, device=device)


def forward_flops(config: SampleConfig, x: Tensor, times: Tensor) -> float:
    """Operations of a forward pass of the whole batch."""
    with shapes_only():
        net = create_network(config)
    with torch.no_grad(), traced() as tracer:
        net(x.to("meta"), times.to("meta"))
    return tracer.trace().flops


def in_our_format(
    net: nn.Module, config: SampleConfig, device: torch.device, *, training: bool, images: int
) -> nn.Module:
    """The network in the memory format that --channels_last auto gives it."""
    return net.to(memory_format=memory_format(config, device, training=training, images=images))


def make_contestants(
    config: SampleConfig, device: torch.device, *, training: bool = True, images: int = 1
) -> dict[str, tuple[nn.Module, Network]]:
    """name -> (module, its call) with equal weights: cm, plain, and diffusers where it can be imported."""
    cm = randomized(create_network(config)).to(device)
    found: dict[str, nn.Module] = {"cm": cm, "plain": make_plain(copy.deepcopy(cm))}
    # Some versions of the package raise other errors than ImportError when one of their own imports fails.
    with suppress(ImportError, RuntimeError):
        found["diffusers"] = diffusers_network(found["plain"], config)
    found["cm"] = in_our_format(cm, config, device, training=training, images=images)
    return {name: (net, net) for name, net in found.items()}


class DiffusersNetwork(nn.Module):
    """diffusers' UNet2DModel, called as our networks are."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, times: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(x, times, class_labels=y).sample


def diffusers_network(net: nn.Module, config: Config) -> nn.Module:
    """diffusers' network with the weights of ours, on its device, in fp32; ImportError where there is none."""
    declare_missing_operators()  # it imports torchvision, where that is installed
    from diffusers import UNet2DModel

    flags = {name: getattr(config, name) for name in config.__dataclass_fields__}
    given = {k: v for k, v in unet_config(flags).items() if not k.startswith("_")}
    theirs = UNet2DModel(**given)
    theirs.load_state_dict(to_diffusers(net.state_dict(), flags))
    return DiffusersNetwork(theirs.to(next(net.parameters()).device))


def forwards(
    contestants: dict[str, tuple[nn.Module, Network]], x: Tensor, times: Tensor
) -> dict[str, Callable]:
    """A forward pass of each contestant."""
    return {
        name: torch.no_grad()(lambda call=call: call(x, times)) for name, (_, call) in contestants.items()
    }


def steps(contestants: dict[str, tuple[nn.Module, Network]], x: Tensor, times: Tensor) -> dict[str, Callable]:
    """A training step of each contestant: mean squared output, backward, RAdam."""

    def make(name: str, module: nn.Module, call: Network) -> Callable[[], None]:
        params = list(module.parameters())
        optimizer = make_optimizer("radam", params, lr=1e-5)

        def step() -> None:
            mean_flat(call(x, times) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return {name: make(name, module, call) for name, (module, call) in contestants.items()}


def compared(timings: dict[str, Timing], peaks: dict[str, int], batch: int) -> dict[str, Any]:
    """Our figures, and the peers' beside them; ratios below 1 are in our favour."""
    found = beside_peers(timings)
    for name, figures in found["peers"].items():
        figures["peak_memory_mib"] = peaks[name] / 2**20
    return {
        **found,
        "images_per_second": batch / timings["cm"].median,
        "peak_memory_mib": peaks["cm"] / 2**20,
        "memory_ratio_to_best_peer": peaks["cm"] / min(p for name, p in peaks.items() if name != "cm"),
    }
