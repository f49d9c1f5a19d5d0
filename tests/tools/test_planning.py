"""The plan of a run: its traces, its memory and time in closed form, every preset, and measurements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cm.commands.cli import parse_config
from cm.config import presets
from cm.config.derived import has_two_times, told_scales, training_mode, with_counts
from cm.config.scripts import SCRIPTS, CmTrainConfig, changed
from cm.tools.planning import devices
from cm.tools.planning.devices import DEVICES, GIB, Cluster
from cm.tools.planning.estimate import (
    communication,
    exchange_of_blocks,
    largest_microbatch,
    plan_step,
    update_traffic,
)
from cm.tools.planning.run import evaluations, first_way, plan_images, plan_training
from cm.tools.planning.step import make_network, step_flops, step_trace
from cm.tools.profiling import trace
from cm.tools.profiling.trace import between, traced
from cm.training.blocks import blocks_of

TINY = parse_config(CmTrainConfig, ["--preset", "tiny"])
WITHOUT_TARGET = replace(TINY, target_ema_mode="fixed", start_ema=0.0)
GPU = Cluster(DEVICES["A100-80"], 8)


def config_of(name, *flags):
    script = presets.get(name).training_script
    return with_counts(parse_config(SCRIPTS[script], ["--preset", name, *flags]))


def test_a_trace_counts_products_bytes_and_what_is_alive():
    layer = nn.Linear(30, 50, device="meta")
    x = torch.empty(20, 30, device="meta")
    with traced() as tracer:
        y = layer(x)
        tracer.backward_begins()
        y.relu().sum().backward()
    found = tracer.trace()
    first = tracer.ops[0]
    assert (first.kind, first.flops) == ("fp32", 2 * 20 * 30 * 50)
    assert first.moved == 4 * (20 * 30 + 30 * 50 + 50 + 20 * 50)  # input, weight, bias, output
    assert found.flops == 2 * first.flops  # x needs no gradient: one product backward
    assert found.backward == 1
    assert found.largest == 4 * 30 * 50
    assert tracer.live >= 4 * (20 * 50 + 30 * 50 + 50)  # y and the gradients are still there
    assert found.peak >= tracer.live


def test_views_cost_nothing_and_what_is_dropped_is_free():
    x = torch.empty(10, 10, device="meta")
    with traced() as tracer:
        x.t().reshape(2, 5, 10).flatten()
        for _ in range(3):
            x + 1
    assert [op.moved for op in tracer.ops if op.flops == 0][-3:] == [800] * 3
    assert tracer.live == 0


def test_a_remembered_call_gives_and_costs_what_the_first_did():
    def run():
        x = torch.empty(6, 4, 8, 8, device="meta").to(memory_format=torch.channels_last).requires_grad_()
        narrow = x[:, :2]  # a view of all of its memory
        y = torch.nn.functional.group_norm(narrow.expand(6, 2, 8, 8) * 2, 2)
        total = torch.zeros(6, 2, 8, 8, device="meta").add_(y).relu_()
        total = torch.cat([total, total.double()]) + torch.tensor(1.0)  # a number of the CPU
        mean, rest = torch.var_mean(total, dim=(2, 3))
        total.sum().backward()
        return [(t.shape, t.stride(), t.dtype, t._version) for t in (y, total, mean, rest, x.grad)]

    trace._calls.clear()
    with traced() as first:
        given = run()
    assert trace._calls
    with traced() as again:
        assert run() == given
    assert again.ops == first.ops
    assert (again.peak, again.live, again.largest) == (first.peak, first.live, first.largest)


def test_recomputed_attention_is_traced_like_the_first():
    from cm.networks.attention import AttentionBlock

    block = AttentionBlock(32, num_head_channels=16).to("meta")
    x = torch.empty(2, 32, 4, 4, device="meta", requires_grad=True)
    with traced() as plain:
        block(x).sum().backward()
    with traced() as again:
        checkpoint(block, x, use_reentrant=False).sum().backward()
    extra = again.trace().flops - plain.trace().flops
    attention = 2 * 2 * 2 * 2 * 16 * 16 * 16  # two products of 2 images, 2 heads, 16 tokens, 16 wide
    assert (
        extra == 2 * 2 * 16 * 32 * 96 + attention
    )  # q, k, v; the last projection's output is not needed again


def test_traces_of_two_batches_give_those_of_all():
    # SIZES are 4 and 16; a third batch is traced by itself
    from cm.tools.planning import step

    direct = step._traced_step(step._relevant(TINY), 9, False)
    mixed = step_trace(TINY, 9, keep_gradients=False)
    assert mixed.trace.flops == pytest.approx(direct.trace.flops, rel=1e-12)
    assert mixed.trace.moved == pytest.approx(direct.trace.moved, rel=1e-3)
    assert mixed.trace.peak == pytest.approx(direct.trace.peak, rel=0.01)
    with pytest.raises(ValueError, match="same operations"):
        between(mixed.trace, replace(mixed.trace, kinds=mixed.trace.kinds[1:]), 0.5)


CONTINUOUS = ("--loss_norm", "l2", "--training_mode")


def counted(config) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass of one image through the network, by torch's own counter."""
    net, found = make_network(config), []
    side, meta = config.image_size, torch.device("meta")
    x, t = torch.empty(1, config.in_channels or 3, side, side, device=meta), torch.empty(1, device=meta)
    cond = {"y": torch.zeros(1, dtype=torch.int64, device=meta)} if config.class_cond else {}
    cond |= {"second": t} if has_two_times(config) else {}
    cond |= {"guidance": t} if told_scales(config) else {}
    for backward in (False, True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = net(x, t, **cond)
            if backward:
                out.sum().backward()
        found.append(counter.get_total_flops())
    return found[0], found[1] - found[0]


@pytest.mark.parametrize(
    ("forward", "backward", "flags"),
    [
        ((1, 1, 2), 1, ()),
        ((1, 1, 0), 1, ("--training_mode", "consistency_training")),
        ((1, 1, 1), 1, ("--ode_solver", "euler")),
        ((3, 0, 0), 1, (*CONTINUOUS, "continuous_training")),
        ((3, 0, 1), 1, (*CONTINUOUS, "continuous_distillation")),
        ((2, 0, 1), 2, (*CONTINUOUS, "continuous_distillation", "--stop_grad", "False")),
        # A pass with a graph, and two of forward mode; guidance asks for two velocities
        ((3, 0, 0), 1, ("--preset", "digits_meanflow")),
        ((5, 0, 0), 1, ("--preset", "digits_meanflow_guided")),
        ((5, 0, 0), 1, ("--preset", "digits_improved_meanflow")),
    ],
)
def test_flops_are_those_of_the_passes(forward, backward, flags):
    """forward: passes through student, target and teacher; backward ones through the student."""
    config = parse_config(CmTrainConfig, ["--preset", "tiny", *flags])
    one, back = counted(config)
    student, *others = forward
    assert step_trace(config, 8, keep_gradients=False).trace.flops / 8 == pytest.approx(
        sum(forward) * one + backward * back, rel=0.015
    )
    phases = step_flops(config)
    # Where the target is the student, its pass counts as the student's.
    assert phases["student"] == pytest.approx((student + others[0] * (not config.start_ema)) * one, rel=0.015)
    assert phases.get("target", 0) == pytest.approx(others[0] * bool(config.start_ema) * one, rel=0.015)
    assert phases.get("teacher", 0) == pytest.approx(others[1] * one, rel=0.015)
    assert phases["backward"] == pytest.approx(backward * back, rel=0.015)


def test_published_networks_have_their_flops():
    step = step_trace(config_of("imagenet64_cd_l2"), 1, keep_gradients=False)
    assert step.trace.flops == pytest.approx(1.32e12, rel=0.01)
    assert step.weights.parameters == 295_899_267


def test_memory_of_a_step_in_closed_form():
    memory = plan_step(TINY, GPU, microbatch=1).memory
    p = 4 * 827_491  # bytes in fp32
    assert (memory.student, memory.target, memory.teacher) == (p, p, p)
    assert plan_step(WITHOUT_TARGET, GPU, microbatch=1).memory.target == 0  # the target is the student
    assert (memory.gradients, memory.moments, memory.averages, memory.distance) == (p, 2 * p, p, 0)
    assert memory.context == devices.CONTEXT
    assert memory.total == sum(getattr(memory, f) for f in memory.__dataclass_fields__)


def test_half_precision_keeps_masters_of_what_learns():
    config = replace(TINY, precision="bf16", ema_rate="0.9,0.99")
    weights = step_trace(config, 1, keep_gradients=False).weights
    memory = plan_step(config, GPU, microbatch=1).memory
    p = 4 * weights.parameters
    assert weights.nbytes == p - 2 * weights.halved
    assert 0.8 < weights.halved / weights.parameters < 1  # convolutions are, embeddings and norms are not
    assert memory.student == memory.target == weights.nbytes + p
    assert memory.teacher == memory.gradients == weights.nbytes  # it never changes
    assert memory.averages == 2 * p
    stages = replace(config, training_mode="progdist", scale_mode="progdist", start_scales=4)
    assert plan_step(stages, GPU, microbatch=1).memory.teacher == weights.nbytes + p  # becomes the student


def test_lpips_brings_its_weights():
    config = changed(TINY, loss_norm="lpips", lpips_size=32)
    assert (
        plan_step(config, GPU, microbatch=1).memory.distance == 4 * 14_714_688
    )  # VGG16 without its classifier


def test_shards_divide_moments_and_averages_only():
    whole, sharded = (plan_step(replace(TINY, shard=s), GPU, microbatch=1) for s in ("none", "optimizer"))
    assert sharded.memory.moments == whole.memory.moments / 8
    assert sharded.memory.averages == whole.memory.averages / 8
    for name in ("student", "target", "teacher", "gradients"):
        assert getattr(sharded.memory, name) == getattr(whole.memory, name)
    assert sharded.time.communication > whole.time.communication


def test_fsdp_divides_everything_but_the_blocks_at_work():
    p = 4 * 827_491
    plain, divided = (
        plan_step(replace(TINY, shard=s, global_batch_size=16), GPU, microbatch=2) for s in ("none", "fsdp")
    )
    for name in ("student", "target", "teacher", "gradients", "moments", "averages"):
        assert getattr(divided.memory, name) == getattr(plain.memory, name) / 8
    block = max(sum(q.numel() for q in b.parameters()) for b in blocks_of(make_network(TINY)))
    assert divided.memory.gathered == 2 * 8 * block  # two blocks with their gradients
    pieces = plan_step(replace(TINY, shard="fsdp", global_batch_size=16), GPU, microbatch=1)
    assert pieces.memory.gathered == divided.memory.gathered + p
    traced = step_trace(TINY, 2, keep_gradients=False)
    # two norms, 22 for RAdam, an average and the target, all of an eighth
    assert update_traffic(replace(TINY, shard="fsdp"), traced, 8) == pytest.approx((2 + 22 + 3 + 3) * p / 8)
    slow = Cluster(replace(DEVICES["A100-80"], link=1e6), 8)
    flops = traced.trace.flops_by_phase()
    passes = 2 + (flops["target"] + flops["teacher"]) / flops["student"]
    once = slow.all_reduce(p) / 2  # gathering, or averaging into rows
    assert exchange_of_blocks(traced, slow, 3, 0.0) == pytest.approx((3 * passes + 1) * once)
    assert exchange_of_blocks(traced, slow, 1, 1e9) == pytest.approx(once * 4 * block / p)


def test_averages_in_host_memory_leave_the_gpu():
    there = plan_step(replace(TINY, ema_device="cpu"), GPU, microbatch=1)
    assert there.memory.averages == 0
    host = 4 * 827_491 / DEVICES["A100-80"].host
    here = plan_step(TINY, GPU, microbatch=1)
    saved = DEVICES["A100-80"].traffic(3 * 4 * 827_491)
    assert there.time.update == pytest.approx(here.time.update - saved + host)


def test_update_traffic_in_closed_form():
    traced = step_trace(TINY, 1, keep_gradients=False)
    p = 4 * 827_491
    assert update_traffic(TINY, traced, 8) == (2 + 22 + 3 + 3) * p  # norms, optimizer, one average, target
    clipped = replace(TINY, grad_clip=1.0, ema_rate="0.9,0.99")
    assert update_traffic(clipped, traced, 8) == (2 + 2 + 22 + 6 + 3) * p
    alone = step_trace(WITHOUT_TARGET, 1, keep_gradients=False)
    assert update_traffic(WITHOUT_TARGET, alone, 8) == (2 + 22 + 3) * p


def test_a_ring_passes_all_but_one_part_twice():
    device = DEVICES["A100-80"]
    assert Cluster(device, 8).all_reduce(1e9) == pytest.approx(2 * 7 / 8 * 1e9 / 300e9)
    assert Cluster(device, 64).all_reduce(1e9) == pytest.approx(2 * 63 / 64 * 1e9 / 25e9)  # between nodes
    traced = step_trace(TINY, 1, keep_gradients=False)
    slow = replace(device, link=1e6)
    whole = Cluster(slow, 8).all_reduce(traced.weights.nbytes)
    assert communication(TINY, traced, Cluster(slow, 8), 1.0) == pytest.approx(
        whole, rel=0.01
    )  # nothing hides it


def test_a_device_takes_the_longer_of_arithmetic_and_traffic():
    d = DEVICES["H100"]
    assert d.seconds(d.peak("half"), 989e12 * 0.5, 0) == pytest.approx(1.0)
    assert d.seconds(d.peak("conv32"), 494e12 * 0.5, 0) == pytest.approx(1.0)
    assert d.seconds(d.peak("fp32"), 1, 3350e9 * 0.8) == pytest.approx(1.0)
    several = d.seconds(np.array([d.peak("half"), d.peak("fp32")]), np.ones(2), np.array([1, 3350e9 * 0.8]))
    assert several.tolist() == pytest.approx([d.launch, 1.0])


def test_the_global_batch_is_shared_out_and_microbatches_add_up():
    config = replace(TINY, global_batch_size=20)
    step = plan_step(config, GPU)
    assert (step.images, step.microbatch) == (3, 3)
    two = plan_step(replace(config, global_batch_size=128), GPU, microbatch=8)
    whole = plan_step(replace(config, global_batch_size=128), GPU)
    assert (two.images, two.microbatch, whole.microbatch) == (16, 8, 16)
    assert two.flops == pytest.approx(whole.flops)
    assert two.memory.activations < whole.memory.activations


@pytest.mark.slow
def test_lsun_fits_eight_images_on_80_gb_with_checkpointing_and_sharding_saves_what_it_says():
    config = replace(config_of("bedroom256_cd_lpips"), use_checkpoint=True)
    step = plan_step(config, GPU, microbatch=8)
    assert step.fits(GPU.device)
    assert largest_microbatch(config, GPU) >= 8
    sharded = plan_step(replace(config, shard="optimizer"), GPU, microbatch=8)
    # moments and three averages of 526,304,771 parameters, 7 of 8 parts
    assert step.memory.total - sharded.memory.total == pytest.approx(5 * 4 * 526_304_771 * 7 / 8, rel=0.01)


def test_edm2_xxl_has_a_plan():
    step = plan_step(config_of("imagenet64_ecm_xl", "--num_channels", "448"), Cluster(DEVICES["H200"], 64))
    assert step.images == 16
    assert step.memory.student / 4 == pytest.approx(1523.2e6, rel=0.001)  # Karras et al. 2024, Table 6
    assert step.memory.moments == 2 * step.memory.student
    assert step.fits(DEVICES["H200"])


@pytest.mark.slow
def test_the_largest_microbatch_is_the_largest():
    config = replace(config_of("imagenet64_cd_l2"), global_batch_size=2048)
    size = largest_microbatch(config, GPU)
    assert 1 < size < 256
    assert plan_step(config, GPU, microbatch=size).fits(GPU.device)
    assert not plan_step(config, GPU, microbatch=size + 1).fits(GPU.device)
    plan = plan_training("imagenet64_cd_l2", GPU)
    assert plan.chosen
    assert plan.fits
    assert first_way(plan).flags == "--microbatch alone"
    small = Cluster(replace(DEVICES["RTX4090"], memory=8 * GIB), 8)
    assert (
        first_way(plan_training("imagenet64_cd_l2", small)).flags == "--use_checkpoint True --shard optimizer"
    )


def kinds_of_presets() -> list[str]:
    """The smallest preset of each objective on each network; a trace takes seconds."""
    found = {}
    configs = {name: config_of(name) for name in presets.PRESETS}
    for name, c in sorted(configs.items(), key=lambda item: cost(item[1])):
        distance = getattr(c, "loss_norm", "").startswith("lpips"), getattr(c, "stop_grad", True)
        found.setdefault((c.network, training_mode(c), *distance), name)
    return list(found.values())


def cost(c) -> int:
    return c.num_channels**2 * c.image_size**2 * c.num_res_blocks


SLOW_TRACES = {"imagenet64_ctm", "cifar10_ctm"}  # digits_ctm has their plan's parts


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in kinds_of_presets() if n not in SLOW_TRACES])
def test_every_kind_of_preset_has_a_plan(name):
    config = config_of(name)
    step = plan_step(config, Cluster(DEVICES["H200"], 8), microbatch=4)
    assert step.time.total > 0
    weights = sum(p.numel() for p in make_network(config).parameters())
    assert 16 * weights < step.memory.total < 140 * GIB, "weights, gradients, two moments"


def test_sampling_counts_evaluations():
    def nfe(name, *flags):
        return evaluations(parse_config(SCRIPTS["image_sample"], ["--preset", name, *flags]))

    assert nfe("imagenet64_edm") == 79
    assert nfe("imagenet64_cd_lpips") == 1
    assert nfe("imagenet64_cd_lpips", "--sampler", "multistep", "--ts", "0,22,39") == 2
    plan = plan_images("tiny", GPU, 100)
    assert plan.hours == pytest.approx(4 * plan.sampling.seconds / 3600)  # 100 images, 8 GPUs, 4 at a time
    assert plan.gpu_hours == 8 * plan.hours
