"""Bars of networks and training steps; ratios of processor time, run by hand.

OMP_NUM_THREADS=2 python -m pytest -m perf tests/tools/test_perf.py

On a busy machine add OMP_WAIT_POLICY=passive: threads that spin while they wait count as processor time.
"""

import pytest

from cm.tools.bench.network import SCORE_SDE, SIZES, bench_network
from cm.tools.bench.runs import Options
from cm.tools.bench.train import bench_train

pytestmark = pytest.mark.perf
NOISE = 0.03  # by how much the ratio of equal programs differs from 1 on a shared machine
SIZE_64 = (
    *("--image_size", "64", "--num_channels", "64", "--channel_mult", "1,2,3,4", "--num_res_blocks", "2"),
    *("--attention_resolutions", "32,16,8", "--num_head_channels", "64", "--batch_size", "4"),
)
NETWORKS_32 = {
    "tiny": (),
    "adm": (
        *("--image_size", "32", "--num_channels", "64", "--channel_mult", "1,2,2", "--num_res_blocks", "2"),
        *("--attention_resolutions", "16,8", "--num_head_channels", "32", "--batch_size", "8"),
    ),
    "ncsnpp": (
        *("--network", "ncsnpp", "--image_size", "32", "--num_channels", "64", "--channel_mult", "2,2,2"),
        *("--num_res_blocks", "2", "--attention_resolutions", "16", "--batch_size", "4"),
    ),
}


def figures(rows):
    return {row.name.partition("/")[2]: row.figures for row in rows}


@pytest.mark.parametrize("case", SIZES)
def test_networks_beside_their_peers(case):
    for name, found in figures(bench_network(Options(cases=(case,), device="cpu", repeats=9))).items():
        assert found["cpu_ratio_to_best_peer"] <= 1 + NOISE, name
        assert found["memory_ratio_to_best_peer"] <= 1 + NOISE, name


@pytest.mark.parametrize("case", SCORE_SDE)
def test_score_sde_networks_are_convolutions(case):
    for name, found in figures(bench_network(Options(cases=(case,), device="cpu", repeats=1))).items():
        assert found["non_convolution_share"] < 0.3, name


@pytest.mark.parametrize("case", ["edm", "cd", "ct"])
def test_what_the_trainer_adds_at_64_pixels(case):
    rows = figures(bench_train(Options(cases=(case,), device="cpu", repeats=5, flags=SIZE_64)))
    assert rows[case]["overhead_share"] < 0.07


@pytest.mark.parametrize("network", NETWORKS_32)
def test_continuous_distillation_beside_discrete(network):
    options = Options(cases=("cd_euler", "cont_cd"), device="cpu", repeats=5, flags=NETWORKS_32[network])
    rows = figures(bench_train(options))
    discrete, continuous = rows["cd_euler"], rows["cont_cd"]
    assert continuous["cpu_ms"] <= 3.2 * discrete["cpu_ms"]
    assert continuous["peak_memory_mib"] <= 2 * discrete["peak_memory_mib"]
