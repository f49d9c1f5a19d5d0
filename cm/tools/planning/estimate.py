"""Memory and time of a training step and of sampling on a number of GPUs, from traces and what the GPUs can do."""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from cm.config.derived import global_batch, precision
from cm.config.parsing import parse_ema_profiles, parse_ema_rates
from cm.config.scripts import SampleConfig, TrainConfig
from cm.tools.planning.devices import BACKWARD, CONTEXT, FRAGMENTS, OVERLAP, WORKSPACE, Cluster, Device
from cm.tools.planning.step import StepTrace, Weights, call_trace, step_trace
from cm.tools.profiling.trace import KINDS, Trace, in_order

FP32 = 4  # bytes
DDP_BUCKET = 128 * 2**20  # bytes; the last one has nothing left to hide behind


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU at the peak, by what they are for."""

    student: float = 0
    target: float = 0
    teacher: float = 0
    distance: float = 0
    gradients: float = 0
    moments: float = 0
    averages: float = 0
    gathered: float = 0  # by FSDP: whole blocks, their gradients, and what several microbatches add up
    activations: float = 0  # of a microbatch, with what comes and goes beside them
    workspace: float = 0
    context: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Time:
    """Seconds of a step, by what they are spent on."""

    passes: float
    update: float = 0  # optimizer, averages, target
    communication: float = 0  # what of it is not hidden behind the backward pass

    @property
    def total(self) -> float:
        """Of the step."""
        return self.passes + self.update + self.communication


@dataclass(frozen=True)
class Step:
    """A training step: images per GPU, of which `microbatch` at a time.

    peak: bytes that torch's allocator has at most beyond those before the step. flops: per GPU.
    """

    images: int
    microbatch: int
    memory: Memory
    time: Time
    peak: float
    flops: float

    def fits(self, device: Device) -> bool:
        """Whether the device has the memory."""
        return self.memory.total <= device.memory


def plan_step(config: TrainConfig, cluster: Cluster, *, microbatch: int = 0, slowdown: float = 1.0) -> Step:
    """A step of the configured run on a cluster.

    microbatch: instead of --microbatch. slowdown: measured over modelled time of the passes.
    """
    images = math.ceil(global_batch(config, cluster.count) / cluster.count)
    size = min(microbatch or (config.microbatch if config.microbatch > 0 else images), images)
    alone = cluster.count == 1 and size == images
    traced = step_trace(config, size, keep_gradients=alone)
    memory, peak = step_memory(config, cluster, traced, gradients_in_trace=alone, in_pieces=size < images)
    peak += memory.gradients if cluster.count == 1 else 0  # several: DDP keeps them between steps
    one = forward_seconds(traced.trace, cluster.device) + backward_seconds(traced.trace, cluster.device)
    passes = slowdown * one * images / size
    flops = traced.trace.flops * images / size
    update = slowdown * cluster.device.traffic(update_traffic(config, traced, cluster.count))
    time = Time(passes, update + host_copies(config, traced.weights, cluster))
    exposed = 0.0
    if is_divided(config, cluster.count):
        exposed = exchange_of_blocks(traced, cluster, math.ceil(images / size), passes)
    elif cluster.count > 1:
        exposed = communication(config, traced, cluster, slowdown)
    return Step(images, size, memory, replace(time, communication=exposed), peak, flops)


def seconds(trace: Trace, device: Device) -> np.ndarray:
    """Of each operation."""
    peaks = np.array([device.peak(kind) for kind in KINDS])
    return device.seconds(peaks[trace.kinds], *trace.amounts)


def forward_seconds(trace: Trace, device: Device) -> float:
    """Of a trace's operations before the backward pass, one after the other."""
    return in_order(seconds(trace, device)[: trace.backward])


def backward_seconds(trace: Trace, device: Device) -> float:
    """Of the backward pass."""
    return BACKWARD * in_order(seconds(trace, device)[trace.backward :])


def shards(config: TrainConfig, count: int) -> int:
    """Over how many GPUs moments and averages are divided."""
    return 1 if config.shard == "none" else count


def is_divided(config: TrainConfig, count: int) -> bool:
    """Whether FSDP divides weights and gradients, too."""
    return config.shard == "fsdp" and count > 1


def gathered(weights: Weights, in_pieces: bool) -> float:
    """Bytes that FSDP has whole at a time: a block, the next one, and the gradients of both on their way.

    in_pieces: several microbatches add their gradients up before these are averaged, in fp32, all of them.
    """
    width = weights.nbytes / weights.parameters
    return 2 * (width + FP32) * weights.block + FP32 * weights.parameters * in_pieces


def step_memory(
    config: TrainConfig,
    cluster: Cluster,
    traced: StepTrace,
    *,
    gradients_in_trace: bool,
    in_pieces: bool = False,
) -> tuple[Memory, float]:
    """(memory at the peak, bytes of it that come and go within a step). in_pieces: by several microbatches."""
    w = traced.weights
    fp32, masters = FP32 * w.parameters, FP32 * w.parameters if w.halved else 0
    parts = shards(config, cluster.count)
    divided = is_divided(config, cluster.count)
    # At the optimizer: fp32 gradients of what is in half precision, and the root of the second moments.
    updating = FP32 * w.halved * (not divided) + fp32 / parts
    updating += w.nbytes if gradients_in_trace else 0
    peak = max(traced.trace.peak, updating)
    gpu = cluster.device.is_gpu
    on_host = gpu and config.ema_device == "cpu"
    # FSDP keeps rows in fp32 alone; a teacher that never changes stays as converted.
    network, fixed = (fp32 / parts, w.nbytes / parts) if divided else (w.nbytes + masters, w.nbytes)
    memory = Memory(
        student=network,
        target=network * traced.target,
        teacher=(network if traced.teacher_follows else fixed) * traced.teacher,
        distance=traced.distance,
        gradients=0 if gradients_in_trace else fp32 / parts if divided else w.nbytes,
        gathered=gathered(w, in_pieces) if divided else 0,
        moments=2 * fp32 / parts,
        averages=0 if on_host else count_averages(config) * fp32 / parts,
        activations=peak * (1 + FRAGMENTS if gpu else 1),
        workspace=min(WORKSPACE, 2 * traced.trace.largest) if gpu else 0,
        context=CONTEXT if gpu else 0,
    )
    return memory, peak


def count_averages(config: TrainConfig) -> int:
    """Averages of the weights that a run keeps."""
    return len(parse_ema_rates(config.ema_rate)) + len(parse_ema_profiles(config.ema_profiles))


def update_traffic(config: TrainConfig, traced: StepTrace, count: int) -> float:
    """Bytes that optimizer, averages and target read and write in a step.

    In units of fp32 weights: 2 for the two norms, 22 for an update by RAdam, operation by operation, 3 for an average.
    """
    w, parts = traced.weights, shards(config, count)
    divided = is_divided(config, count)
    rates = 0 if config.ema_device == "cpu" else count_averages(config)
    units = 2 + 22 / parts + 2 * bool(config.grad_clip) + 3 * rates / parts + 3 * traced.target
    units += 2 * (precision(config) == "fp16")  # the loss scale is taken out
    if divided:  # rows only, whose norms and target are cut, too, and no second copy
        units = units - (2 + 2 * bool(config.grad_clip) + 3 * traced.target) * (1 - 1 / parts)
        return units * FP32 * w.parameters
    to_module = (FP32 * w.parameters + w.nbytes) * bool(w.halved) * (1 + traced.target)
    return units * FP32 * w.parameters + (FP32 + 2) * w.halved + to_module


def host_copies(config: TrainConfig, weights: Weights, cluster: Cluster) -> float:
    """Seconds in which weights travel to averages in host memory; the averaging itself goes on beside the next step."""
    if config.ema_device != "cpu" or not cluster.device.is_gpu:
        return 0.0
    return FP32 * weights.parameters / shards(config, cluster.count) / cluster.device.host


def communication(config: TrainConfig, traced: StepTrace, cluster: Cluster, slowdown: float) -> float:
    """Seconds of the sum of gradients that the last backward pass does not hide, and of the shards' exchange."""
    nbytes = traced.weights.nbytes
    backward = slowdown * backward_seconds(traced.trace, cluster.device)
    whole, last = cluster.all_reduce(nbytes), cluster.all_reduce(min(nbytes, DDP_BUCKET))
    exchange = cluster.broadcast(FP32 * traced.weights.parameters) if config.shard == "optimizer" else 0.0
    return max(whole - OVERLAP * backward, last) + exchange


def exchange_of_blocks(traced: StepTrace, cluster: Cluster, microbatches: int, passes: float) -> float:
    """Seconds of FSDP's traffic that `passes` seconds of computing do not hide.

    For each microbatch every network gathers its weights in each pass through it, the student once more on the way
    back; gradients are averaged once, in fp32.
    """
    w, flops = traced.weights, traced.trace.flops_by_phase()
    forward = flops.get("student", 0.0) or 1.0
    evaluations = 2 + sum(flops.get(role, 0.0) / forward for role in ("target", "teacher"))
    weights = microbatches * evaluations * cluster.broadcast(w.nbytes)
    whole = weights + cluster.broadcast(FP32 * w.parameters)
    first = cluster.broadcast(w.nbytes / w.parameters * w.block)  # nothing runs before it is there
    return max(whole - OVERLAP * passes, first)


def largest_microbatch(config: TrainConfig, cluster: Cluster) -> int:
    """Images that fit into a GPU's memory in one pass, at most the GPU's share of the batch; 0: not even one."""
    images = math.ceil(global_batch(config, cluster.count) / cluster.count)

    def fits(size: int) -> bool:
        return plan_step(config, cluster, microbatch=size).fits(cluster.device)

    if fits(images):
        return images
    low, high = 0, images  # low fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Sampling:
    """Drawing images: evaluations of the network per image, bytes per GPU, seconds of one batch per GPU."""

    batch: int
    evaluations: int
    memory: Memory
    seconds: float

    def fits(self, device: Device) -> bool:
        """Whether the device has the memory."""
        return self.memory.total <= device.memory


def plan_sampling(
    config: SampleConfig, cluster: Cluster, evaluations: int, slowdown: float = 1.0
) -> Sampling:
    """A batch of --batch_size images on every GPU."""
    trace, weights = call_trace(config, config.batch_size)
    gpu = cluster.device.is_gpu
    memory = Memory(
        student=weights.nbytes,
        activations=trace.peak * (1 + FRAGMENTS if gpu else 1),
        workspace=min(WORKSPACE, 2 * trace.largest) if gpu else 0,
        context=CONTEXT if gpu else 0,
    )
    return Sampling(
        config.batch_size,
        evaluations,
        memory,
        slowdown * evaluations * forward_seconds(trace, cluster.device),
    )
