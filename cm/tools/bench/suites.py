"""Benchmarks by name; `eval` is not among them, because the package does not import the evaluations."""

from collections.abc import Callable

from cm.tools.bench.checkpoint import bench_checkpoint
from cm.tools.bench.data import bench_data
from cm.tools.bench.host import bench_host
from cm.tools.bench.network import bench_network
from cm.tools.bench.optimizer import bench_optimizer
from cm.tools.bench.precision import bench_precision
from cm.tools.bench.runs import Options
from cm.tools.bench.sample import bench_edit, bench_sample
from cm.tools.bench.startup import bench_startup
from cm.tools.bench.train import bench_train
from cm.tools.profiling.report import Row

SUITES: dict[str, Callable[[Options], list[Row]]] = {
    "train": bench_train,
    "sample": bench_sample,
    "edit": bench_edit,
    "data": bench_data,
    "checkpoint": bench_checkpoint,
    "startup": bench_startup,
    "network": bench_network,
    "optimizer": bench_optimizer,
    "precision": bench_precision,
    "host": bench_host,
}
