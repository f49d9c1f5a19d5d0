"""Mistakes on the command line of programs beside training: one line that names the flag, and nothing written."""

import json
import os
import pwd
import shutil
from pathlib import Path

import numpy as np
import pytest

from cm.tools.bench import command as bench
from cm.tools.planning import run as planning
from evaluations.reports.run_report import command as report
from tests.helpers.commands import refused, run
from tests.helpers.eval_files import stripes
from tests.helpers.models import save_consistency_model
from tests.helpers.mp import ROOT

RUN = ROOT / "tests" / "fixtures" / "run_before_packages" / "runs" / "edm"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    images, labels = stripes(8)
    np.savez(folder / "images.npz", arr_0=images, arr_1=labels % 3)
    save_consistency_model(folder / "model.pt", in_channels=1)
    return folder


MISTAKES = {
    "classifier IMAGES OUT --seed -1": "--seed: must be at least 0, got -1",
    "classifier IMAGES OUT --epochs 0": "--epochs: must be at least 1, got 0",
    "classifier IMAGES OUT --epochs 1.5": "--epochs: invalid whole number value: '1.5'",
    "prepare IMAGES OUT --image_size 1e8": "--image_size: invalid int value: '1e8'",
    "prepare IMAGES OUT --image_size 100000000": "--image_size must be from 1 to 16384, not 100000000",
    "prepare IMAGES OUT --image_size 8 --seed -1": "--limit, --num_workers and --seed must be 0 or more",
    "prepare IMAGES OUT --image_size 8 --limit -1": "--limit, --num_workers and --seed must be 0 or more",
    "edit interpolate MODEL --between 1,-2 --device cpu --out_dir OUT": "--between -2: neither a seed nor a .npy",
    "edit interpolate MODEL --between 1,1.5 --device cpu --out_dir OUT": "--between 1.5: neither a seed nor a .npy",
    "edit interpolate MODEL --between 1, --device cpu --out_dir OUT": "--between : neither a seed nor a .npy",
    "edit interpolate MODEL --between 1 --device cpu --out_dir OUT": "--between needs two seeds or files at least",
    "edit interpolate MODEL --between 1,MODEL --device cpu --out_dir OUT": "neither a seed nor a .npy",
    "plan PRESET --gpus 0xH100": "--gpus '0xH100'",
    "benchmark network --case 8": "--case 8: choose from 16px",
    "benchmark network --repeats 0": "--repeats must be 1 or more",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_value_out_of_its_range(line, world, tmp_path, monkeypatch):
    known = {"IMAGES": world / "images.npz", "MODEL": world / "model.pt", "PRESET": "digits_edm"}
    line_words = line.replace(",MODEL", f",{world}/model.pt").split()
    argv = [known.get(word, tmp_path / "out" if word == "OUT" else word) for word in line_words]
    assert MISTAKES[line] in refused(argv, monkeypatch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["auto", "digits_edm"])
@pytest.mark.parametrize("command", ["distill RUN IMAGES", "train IMAGES --objective consistency_training"])
def test_the_folder_of_another_scripts_run(command, preset, world, tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / "run")
    config = {"script": "edm_train", "preset": preset}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    known = {"RUN": RUN, "IMAGES": world / "images.npz"}
    argv = [known.get(word, word) for word in command.split()]
    said = refused([*argv, "--device", "cpu", "--out_dir", tmp_path / "run"], monkeypatch)
    kind = "of edm_train: give this one a folder of its own" if preset == "auto" else "with other flags (--"
    assert f"{tmp_path}/run holds a run {kind}" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_one_step_names_the_one_level_that_it_evaluates(world, tmp_path, monkeypatch):
    """Not the levels of the grid that the model was distilled on."""
    argv = ["sample", world / "model.pt", "--num_samples", "1", "--sampler", "onestep", "--device", "cpu"]
    assert run([*argv, "--out_dir", tmp_path], monkeypatch)[0] == 0
    said = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (said["nfe"], said["sigmas"]) == (1, pytest.approx([80.0, 0.0]))


LATE = {
    "report": ("report RUN --out OUT", report, "page", "--out"),
    "plan": ("plan digits_edm --gpus 1xH100 --json OUT", planning, "plan_training", "--json"),
    "benchmark": ("benchmark network --out OUT", bench, "resolve", "--out"),
}


@pytest.mark.parametrize("program", LATE)
def test_the_place_of_a_result_is_tried_before_the_work(program, tmp_path, monkeypatch):
    line, module, work, flag = LATE[program]

    def too_early(*_args, **_options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(module, work, too_early)
    (tmp_path / "folder").mkdir()
    argv = [{"RUN": RUN, "OUT": tmp_path / "folder"}.get(word, word) for word in line.split()]
    said = refused(argv, monkeypatch)
    assert flag in said and "folder is a folder; a file is written" in said
    with pytest.raises(SystemExit) as stop:
        argv[-1] = tmp_path / "new.json"
        monkeypatch.setattr(module, work, lambda *_args, **_options: 1 / 0)
        run_until(argv, monkeypatch)
    assert stop.value.code == 1 and [path.name for path in tmp_path.iterdir()] == ["folder"]


def run_until(argv, monkeypatch) -> None:
    """The exit code 1 of a bug: the claim is given back whatever happens."""
    raise SystemExit(run(argv, monkeypatch)[0])


@pytest.fixture
def homeless(monkeypatch):
    """A user of a container: no HOME, no entry in the table of users."""

    def unknown(*_):
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "CM_CACHE_DIR", "TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


HOMELESS = {
    "sample MODEL --device cpu --out_dir ~/out": "~/out: there is no home folder (HOME is not set)",
    "train ~/images --out_dir out": "~/images: there is no home folder",
    "prepare IMAGES ~/out": "~/out: there is no home folder",
    "evaluate IMAGES IMAGES --inception_path https://127.0.0.1:9/x.pt --out out": "set CM_CACHE_DIR",
    "reference IMAGES out.npz": "set CM_CACHE_DIR",
    "sample gs://bucket/model.pt --out_dir out": "set HOME",
    "inspect gs://bucket/images.zip": "set HOME",
    "train IMAGES --objective consistency_training --loss_norm lpips --num_channels 32 --num_res_blocks 1 "
    "--channel_mult 1 --in_channels 1 --global_batch_size 2 --image_size 8 --num_workers 0 --device cpu "
    "--out_dir out": "set TORCH_HOME",
}


@pytest.mark.parametrize("line", HOMELESS)
def test_without_a_home_folder(line, world, tmp_path, monkeypatch, homeless):
    monkeypatch.chdir(tmp_path)
    known = {"IMAGES": world / "images.npz", "MODEL": world / "model.pt"}
    assert HOMELESS[line] in refused([known.get(word, word) for word in line.split()], monkeypatch)
    assert os.listdir() == []


def test_programs_that_need_no_home_folder_need_none(world, tmp_path, monkeypatch, homeless):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~x").mkdir()  # a name like another
    shutil.copy(world / "images.npz", "~x")
    for argv in (
        ["sample", world / "model.pt", "--num_samples", "1", "--device", "cpu", "--out_dir", "s"],
        ["convert", world / "model.pt", "c.pt"],
        ["inspect", "~x/images.npz"],
        ["runs", "."],
    ):
        code, text = run(argv, monkeypatch)
        assert code == 0, text
    assert not Path("~").exists()
