"""Is this machine ready? `python -m cm.doctor`, or under a launcher: `mpiexec -n 2 python -m cm.doctor --dist`.

Exit code 0 unless a check fails: a missing core package, a GPU that does not compute, ranks that do not reach each
other, a folder that cannot be written, a full disk. What is merely absent and optional is a note.
"""

import argparse
import dataclasses
import ipaddress
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from cm.config.parsing import expanded
from cm.errors import UserError, extra
from cm.objectives.lpips import LINEAR_FILE, VGG_FILE
from cm.runtime import distributed, job, launch, liveness
from cm.runtime.cpu import usable_cores
from cm.runtime.inputs import listed
from cm.storage.filesystem import cache_folder

CORE = ("torch", "numpy", "pillow", "scipy", "tqdm")
FOR_SOME_USES = (
    "mpi4py",
    "piq",
    "torchvision",
    "blobfile",
    "tensorboard",
    "scikit-learn",
    "matplotlib",
    "lmdb",
    "diffusers",
)
OLDEST_PYTHON = (3, 11)
GIB = 2**30
LEAST_FREE_GIB = 1.0
RUNS_TO_TELL = 5
# Batches of data workers pass through this folder; a container often has 64 MiB.
SHARED_MEMORY, LEAST_SHARED_GIB = "/dev/shm", 0.5
# Elements of the timed all-reduce: 16 MiB, the order of a gradient bucket.
REDUCE_SIZE = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding. `status` is ok, note (absent, optional) or failed."""

    name: str
    status: str
    detail: str


def check_versions() -> list[Check]:
    """Python and packages."""
    old = sys.version_info < OLDEST_PYTHON
    checks = [
        Check("python", "failed" if old else "ok", f"{platform.python_version()}, {platform.platform()}")
    ]
    for name in (*CORE, *FOR_SOME_USES):
        try:
            checks.append(Check(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            checks.append(Check(name, "failed" if name in CORE else "note", "not installed"))
    return [check_import(check) if check.name == "torchvision" else check for check in checks]


def check_import(check: Check) -> Check:
    """An installed package, tried in another process: torchvision made for another torch fails there only."""
    if check.status != "ok":
        return check
    command = [sys.executable, "-c", f"import {check.name}"]
    answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if not answer.returncode:
        return check
    cause = (answer.stderr.strip() or "no message").splitlines()[-1]
    return Check(check.name, "note", f"{check.detail} does not import beside this torch: {cause}")


def check_mpi() -> list[Check]:
    """The MPI library that mpi4py finds, asked without starting MPI, and the launcher on the path."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    mpiexec = shutil.which("mpiexec") or "no mpiexec on the path"
    if answer.returncode:
        return [Check("mpi", "note", f"no MPI library: {extra('mpi')}, or start with torchrun; {mpiexec}")]
    return [Check("mpi", "ok", f"{answer.stdout.split(chr(10))[0].strip()}; {mpiexec}")]


def check_devices() -> list[Check]:
    """Processors, and each visible GPU with a small computation on it."""
    threads = f"{usable_cores()} cores, {torch.get_num_threads()} threads per process"
    checks = [Check("cpu", "ok", f"{threads}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")]
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        return [*checks, Check("gpu", "note", f"none usable (CUDA_VISIBLE_DEVICES={visible})")]
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            one = torch.ones(8, 8, device=f"cuda:{index}")
            works = (one @ one).sum().item() == 512
            detail = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            checks.append(Check(f"gpu {index}", "ok" if works else "failed", detail))
        except RuntimeError as error:
            checks.append(Check(f"gpu {index}", "failed", str(error).split("\n")[0]))
    return checks


def check_launcher() -> list[Check]:
    """What started this process, as the environment tells."""
    found = launch.detect()
    if found.world_size == 1:
        return [Check("launcher", "ok", "none: one process")]
    return [Check("launcher", "ok", f"{found.kind}, {found.world_size} ranks")]


def check_ranks(timeout: float = 60.0) -> list[Check]:
    """All-reduce over the launched ranks: is the sum right, how long does it take? Every rank must call it."""
    distributed.setup_dist(timeout=timeout)
    rank, world, device = distributed.get_rank(), distributed.get_world_size(), distributed.dev()
    value = torch.full((REDUCE_SIZE,), float(rank + 1), device=device)
    distributed.all_reduce_sum(value.clone())  # the first call also connects the ranks
    distributed.barrier()
    start = time.perf_counter()
    total = distributed.all_reduce_sum(value)[-1].item()
    milliseconds = 1e3 * (time.perf_counter() - start)
    places = distributed.all_gather_object((socket.gethostname(), total == world * (world + 1) / 2))
    right = all(place[1] for place in places)
    checks = [
        Check(
            "all-reduce",
            "ok" if right else "failed",
            f"{distributed.backend_name()}, {world} ranks on {len({place[0] for place in places})} node(s), "
            f"{REDUCE_SIZE * 4 / 2**20:.0f} MiB in {milliseconds:.1f} ms" + ("" if right else ", wrong sum"),
        )
    ]
    if device.type == "cuda" and world > 1 and "nccl" not in distributed.backend_name():
        checks.append(Check("gpu per rank", "note", "ranks share a GPU: slower than one rank for each"))
    return checks


def check_host_name() -> list[Check]:
    """Can other hosts reach this one by its name? Ranks of several nodes meet at the name of rank 0's host."""
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
        # An IPv6 address may name its card: fe80::1%eth0
        addresses = sorted({str(place[4][0]).partition("%")[0] for place in found})
    except OSError as error:
        return [
            Check(
                "host name", "note", f"{name} leads to no address ({error}): several nodes need MASTER_ADDR"
            )
        ]
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        where = f"{name} leads to {', '.join(addresses)}, which is this host only"
        return [Check("host name", "note", f"{where}: several nodes need MASTER_ADDR or another /etc/hosts")]
    return [Check("host name", "ok", f"{name} leads to {', '.join(addresses)}")]


def check_shared_memory(folder: str = SHARED_MEMORY) -> list[Check]:
    """Room for the batches of data workers; no finding on systems without the folder."""
    if not Path(folder).is_dir():
        return []
    free = shutil.disk_usage(folder).free / GIB
    detail = f"{free:.2f} GiB free at {folder}"
    if free >= LEAST_SHARED_GIB:
        return [Check("shared memory", "ok", detail)]
    advice = "data workers may die of it: --num_workers 0, or docker run --shm-size 2g"
    return [Check("shared memory", "note", f"{detail}; {advice}")]


def check_run_dir(path: str) -> list[Check]:
    """Can runs be written, and is there room? A folder that does not exist yet is judged by its parent."""
    folder = Path(path).expanduser().resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        return [Check("run folder", "failed", f"{folder} cannot be written: {error.strerror or error}")]
    free = shutil.disk_usage(existing).free / GIB
    enough = "ok" if free >= LEAST_FREE_GIB else "failed"
    return [
        Check("run folder", "ok", str(folder)),
        Check("free disk", enough, f"{free:.1f} GiB at {existing}"),
    ]


def check_last_runs(path: str) -> list[Check]:
    """How the latest runs below a folder, or the run that it is, ended: those that did not reach their end."""
    folder = Path(path).expanduser()
    runs = [run for run in (folder, *listed(folder)) if liveness.folder(run).is_dir()]
    runs.sort(key=lambda run: liveness.folder(run).stat().st_mtime, reverse=True)
    ends = [(run.name, liveness.describe_last_run(run)) for run in runs[:RUNS_TO_TELL]]
    orderly = (liveness.PREEMPTED, liveness.TIME, "still going on")
    return [
        Check(f"run {name}", "ok" if end.startswith(orderly) else "note", end)
        for name, end in ends
        if end and not end.startswith(liveness.FINISHED)
    ]


def check_weights() -> list[Check]:
    """Optional files that are downloaded once: LPIPS (cm_train) and the Inception network (evaluation)."""
    hub = Path(torch.hub.get_dir(), "checkpoints")
    checks = []
    for name in (VGG_FILE, LINEAR_FILE):
        there = (hub / name).is_file()
        checks.append(
            Check(f"lpips {name}", "ok" if there else "note", str(hub) if there else f"not in {hub}")
        )
    try:
        cache = Path(cache_folder())
    except UserError as error:
        return [*checks, Check("inception", "failed", str(error))]
    found = sorted(path.name for path in cache.glob("inception/*.pt*"))
    there = "ok" if found else "note"
    return [*checks, Check("inception", there, ", ".join(found) or f"none in {cache / 'inception'}")]


def examine(run_dir: str, across_ranks: bool) -> list[Check]:
    """All checks in order. With `across_ranks` every rank of the job must call it."""
    steps: list[Callable[[], list[Check]]] = [
        *(check_versions, check_mpi, check_devices, check_shared_memory, check_launcher, check_host_name),
        check_weights,
    ]
    checks = []
    if distributed.is_main():  # other ranks only take part in what all do together
        checks = [check for step in steps for check in tried(step)]
        checks += tried(check_run_dir, run_dir) + tried(check_last_runs, run_dir)
    return checks + (check_ranks() if across_ranks else [])


def tried(step: Callable[..., list[Check]], *arguments: str) -> list[Check]:
    """What a step finds; that it cannot look, for lack of rights or a disk that fails, is a finding, too."""
    try:
        return step(*arguments)
    except (OSError, UserError) as error:
        return [Check(step.__name__.removeprefix("check_").replace("_", " "), "failed", str(error))]


def main(argv: list[str] | None = None) -> None:
    """Print the findings on rank 0; exit code 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m cm.doctor", description="Is this machine ready?")
    parser.add_argument("--dist", action="store_true", help="time an all-reduce over the launched ranks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--run_dir",
        type=expanded,
        default=os.environ.get("OPENAI_LOGDIR", "runs"),
        help="folder that runs write to",
    )
    options = parser.parse_args(argv)
    checks = examine(options.run_dir, options.dist)
    failed = [check for check in checks if check.status == "failed"]
    if distributed.is_main():
        if options.json:
            fields = {check.name: {"status": check.status, "detail": check.detail} for check in checks}
            print(json.dumps({"ok": not failed, "checks": fields}, indent=2))
        else:
            width = max(len(check.name) for check in checks)
            print("\n".join(f"{check.status:<6} {check.name:<{width}} {check.detail}" for check in checks))
    # All ranks leave with rank 0's code.
    if distributed.broadcast_object(bool(failed)):
        raise SystemExit(1)


if __name__ == "__main__":
    job.run_main(main)
