"""What GPUs can do by their makers' data sheets, and what is assumed of how much of it a run gets. Imports no torch."""

import difflib
import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cm.errors import UserError

GB, GIB, TERA = 10**9, 2**30, 10**12

# ASSUMPTIONS about GPUs, until a report of scripts/benchmark.py replaces them (--measured):
PRODUCT_SHARE = 0.5  # of the peak that convolutions and matrix products of these networks reach
MEMORY_SHARE = 0.8  # of the memory bandwidth that other operations reach
OVERLAP = 0.8  # part of the last backward pass under which gradients can travel
LAUNCH = 6e-6  # an operation takes at least this long, because Python has to ask for it [s]
CONTEXT = 1 * GIB  # CUDA, cuBLAS, cuDNN and NCCL beside the tensors, per GPU
WORKSPACE = 1 * GIB  # at most this much for cuDNN; less where tensors are small
FRAGMENTS = 0.05  # of the tensors that come and go: what the allocator cannot use
NODE = 8  # GPUs per node
# MEASURED on a CPU, assumed of GPUs: an operation of the backward pass takes this many times as long as one of the
# forward pass with as many FLOPs and bytes.
BACKWARD = 1.3


@dataclass(frozen=True)
class Device:
    """One GPU. half, tf32, fp32: dense FLOP/s by arithmetic. memory: bytes. Rates in bytes/s.

    link: to the other GPUs of a node, per direction. fabric: of the network between nodes, per GPU.
    """

    name: str
    memory: float
    half: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float
    fabric: float
    host: float
    product_share: float = PRODUCT_SHARE
    memory_share: float = MEMORY_SHARE
    launch: float = LAUNCH
    is_gpu: bool = True

    def peak(self, kind: str) -> float:
        """FLOP/s. kind: half; conv32, fp32 convolutions, which cuDNN does in TF32; fp32, all else."""
        return {"half": self.half, "conv32": self.tf32, "fp32": self.fp32}[kind]

    def seconds(self, peak: ArrayLike, flops: ArrayLike, moved: ArrayLike) -> np.ndarray:
        """Of operations: their arithmetic or their memory traffic, whichever takes longer. peak: of their kinds."""
        arithmetic = flops / (self.product_share * peak)
        return np.maximum(np.maximum(arithmetic, self.traffic(moved)), self.launch)

    def traffic(self, moved: ArrayLike) -> ArrayLike:
        """Seconds to read and write so many bytes."""
        return moved / (self.memory_share * self.bandwidth)


def _gpu(
    name: str, gib: float, half: float, tf32: float, fp32: float, gb_s: float, link: float, fabric: float
):
    """Units of the data sheets: GiB, TFLOP/s dense, GB/s."""
    host = 25.0 if name.startswith(("A100", "V100", "L40S", "RTX")) else 50.0  # what PCIe 4 (3) and 5 give
    rates = (half * TERA, tf32 * TERA, fp32 * TERA, gb_s * GB, link * GB, fabric * GB, host * GB)
    return Device(name, gib * GIB, *rates)


# Dense rates, without the sparsity that data sheets double them by; memory as nvidia-smi tells it. Fabric: one
# 100 Gb/s (V100), 200 Gb/s (A100) or 400 Gb/s (H100, H200) adapter per GPU as in the maker's DGX systems, and one of
# 100 Gb/s for the node without NVLink.
_TABLE = (
    # NVIDIA V100 data sheet (SXM2), 2020: 125 TFLOP/s fp16, 15.7 fp32, no bf16 and no TF32, NVLink 300 GB/s both ways
    _gpu("V100-16", 16.0, 125, 15.7, 15.7, 900, 150, 12.5),
    _gpu("V100-32", 32.0, 125, 15.7, 15.7, 900, 150, 12.5),
    # NVIDIA A100 data sheet (SXM4), 2021: 312 bf16/fp16, 156 TF32, 19.5 fp32, NVLink 600 GB/s both ways
    _gpu("A100-40", 40.0, 312, 156, 19.5, 1555, 300, 25),
    _gpu("A100-80", 80.0, 312, 156, 19.5, 2039, 300, 25),
    # NVIDIA H100 data sheet (SXM5), 2023: 1979 bf16/fp16 and 989 TF32 with sparsity, 67 fp32, NVLink 900 GB/s both ways
    _gpu("H100", 79.6, 989, 494, 67, 3350, 450, 50),
    # NVIDIA H200 data sheet (SXM), 2024: arithmetic of the H100, 141 GB at 4.8 TB/s
    _gpu("H200", 140.4, 989, 494, 67, 4800, 450, 50),
    # NVIDIA L40S data sheet, 2023: 362 bf16/fp16, 183 TF32, 91.6 fp32, 864 GB/s, PCIe 4 x16: 64 GB/s both ways
    _gpu("L40S", 45.0, 362, 183, 91.6, 864, 25, 1.6),
    # NVIDIA Ada GPU architecture whitepaper, 2022: 165.2 bf16/fp16 with fp32 sums, 82.6 TF32 and fp32, PCIe 4 x16
    _gpu("RTX4090", 24.0, 165.2, 82.6, 82.6, 1008, 25, 1.6),
)
DEVICES: dict[str, Device] = {device.name: device for device in _TABLE}

# Of a CPU, relative to its measured matrix products: bytes that memory moves per FLOP. MEASURED on one core of an
# x86 server; see docs/planning.md.
CPU_BALANCE = 0.1
CPU_LAUNCH = (
    4e-5  # what Python, dispatch and autograd take per operation, fitted to a step of 464 small ones [s]
)


def cpu(ceiling: float) -> Device:
    """A CPU whose matrix products reach `ceiling` FLOP/s, as a report of scripts/benchmark.py tells it."""
    bandwidth = CPU_BALANCE * ceiling
    arithmetic = ceiling, ceiling, ceiling
    links = 5 * GB, 1 * GB, bandwidth  # gloo within a machine and between two: orders of magnitude
    return Device("CPU", math.inf, *arithmetic, bandwidth, *links, 1.0, 1.0, CPU_LAUNCH, is_gpu=False)


@dataclass(frozen=True)
class Cluster:
    """count devices of one kind."""

    device: Device
    count: int

    @property
    def name(self) -> str:
        """As --gpus has it."""
        return f"{self.count}x{self.device.name}"

    def all_reduce(self, nbytes: float) -> float:
        """Seconds of a ring that sums nbytes over all devices: 2 (n - 1) / n of them pass the slowest link."""
        rate = self.device.link if self.count <= NODE else min(self.device.link, self.device.fabric)
        return 2 * (self.count - 1) / self.count * nbytes / rate

    def broadcast(self, nbytes: float) -> float:
        """Seconds until nbytes, of which every device has a part, are on all devices."""
        return self.all_reduce(nbytes) / 2


def parse_cluster(text: str, ceiling: float = 0.0) -> Cluster:
    """ "8xH200" as a Cluster. ceiling: FLOP/s of a CPU's matrix products, which "1xCPU" needs."""
    match = re.fullmatch(r"(\d+)\s*x\s*([A-Za-z][\w-]*)", text.strip())
    if not match or not int(match[1]):
        raise UserError(f"--gpus {text!r} should look like 8xH200; known: {_names()}")
    count, name = int(match[1]), match[2].upper()
    if name == "CPU":
        if not ceiling:
            raise UserError(
                "--gpus CPU needs --measured FILE.json, a report of scripts/benchmark.py train on it"
            )
        return Cluster(cpu(ceiling), count)
    if name not in DEVICES:
        near = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--gpus {text}: {match[2]} is unknown; {hint}known: {_names()}")
    return Cluster(DEVICES[name], count)


def device_named(name: str, memory: int) -> str:
    """The kind of GPU that a driver calls `name`, such as NVIDIA A100-SXM4-80GB; UserError for one that is not known.

    memory: its bytes, where one kind comes in several sizes.
    """
    letters = re.sub(r"\W", "", name).upper()
    fits = [d for d in DEVICES.values() if d.name.partition("-")[0] in letters]
    if not fits:
        raise UserError(
            f"this machine's GPU, {name}, is unknown: --gpus says what to plan for, of {_names()}"
        )
    return min(fits, key=lambda d: abs(d.memory - memory)).name


def _names() -> str:
    return ", ".join([*DEVICES, "CPU"])
