"""CTM and improved MeanFlow in the real loop: ranks do not change the weights, a stop does not either."""

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig
from cm.runtime import logger
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights
from tests.helpers.mp import run_ranks
from tests.helpers.small_runs import MODEL, TRAIN

QUIET = ["--preview_count", "0", "--class_cond", "True", "--device", "cpu"]
CTM = [
    "--training_mode",
    "ctm",
    "--loss_norm",
    "l2",
    "--start_scales",
    "4",
    "--start_ema",
    "0.9",
    "--dropout",
    "0.2",
]
IMF = [
    "--training_mode", "improved_meanflow", "--label_dropout", "0.3", "--network", "ddpmpp_meanflow",
    "--precond", "flow", "--sigma_max", "1e4", "--dropout", "0.2",
]  # fmt: skip
RUNS = {"ctm": CTM, "improved_meanflow": IMF}


def script(cls, data, out, *flags):
    run_train(parse(cls, [*MODEL, *TRAIN, *QUIET, "--data_dir", data, "--out_dir", out, *flags]))
    logger.reset()


def files(run):
    """name -> tensors of the newest checkpoint: student, averages, target."""
    found = sorted(complete_checkpoints(run)[-1].glob("*.pt"))
    return {p.name: load_weights(p)[0] for p in found if not p.name.startswith("opt")}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(labelled images, a teacher)."""
    folder = tmp_path_factory.mktemp("ranks")
    images = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images, arr_1=np.arange(12) % 2)
    script(EdmTrainConfig, f"{folder}/images.npz", f"{folder}/edm")
    return f"{folder}/images.npz", f"{folder}/edm"


def flags_of(name, teacher):
    return [*RUNS[name], *(["--teacher_model_path", teacher] if name == "ctm" else [])]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_does(name, places, tmp_path):
    """CTM's weight of denoising score matching belongs to the rows of one pass, and is switched off here."""
    data, teacher = places
    flags = flags_of(name, teacher) + (["--dsm_adaptive", "False"] if name == "ctm" else [])
    script(CmTrainConfig, data, f"{tmp_path}/one", *flags)
    arguments = (CmTrainConfig, data, f"{tmp_path}/two", *flags)
    run_ranks("tests.training.test_flow_map_ranks:script", 2, *arguments, timeout=90)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == (3 if name == "ctm" else 2)
    for file, tensors in one.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(two[file][key], tensor, rtol=0, atol=2e-5)


def test_a_stopped_run_of_ctm_ends_as_if_it_had_not(places, tmp_path):
    data, teacher = places
    for out, lengths in (("whole", ["2"]), ("parts", ["1", "2"])):
        for length in lengths:
            more = ["--total_training_steps", length, "--save_interval", "1"]
            script(CmTrainConfig, data, f"{tmp_path}/{out}", *flags_of("ctm", teacher), *more)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(t, parts[f][k]) for f, tensors in whole.items() for k, t in tensors.items())
