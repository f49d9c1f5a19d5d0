"""Benchmarks by name; `eval` stands in the script, because the package does not import the evaluations."""

from collections.abc import Callable

from cm.bench.checkpoint import bench_checkpoint
from cm.bench.data import bench_data
from cm.bench.network import bench_network
from cm.bench.precision import bench_precision
from cm.bench.report import Row
from cm.bench.runs import Options
from cm.bench.sample import bench_edit, bench_sample
from cm.bench.startup import bench_startup
from cm.bench.train import bench_train

SUITES: dict[str, Callable[[Options], list[Row]]] = {
    "train": bench_train,
    "sample": bench_sample,
    "edit": bench_edit,
    "data": bench_data,
    "checkpoint": bench_checkpoint,
    "startup": bench_startup,
    "network": bench_network,
    "precision": bench_precision,
}
