"""A refused start leaves nothing that was not there; what was there stays as it is."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig
from cm.errors import UserError
from cm.runtime import distributed, logger
from cm.runtime.run_directory import RunDirectory
from cm.storage.checkpoint import write_checkpoint
from cm.storage.weights import save_weights
from tests.helpers import mp
from tests.helpers.models import TINY_FLAGS

FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 2 --num_workers 0 --preview_count 0 --ema_rate 0.9 "
    "--total_training_steps 1 --training_mode consistency_distillation --loss_norm l2"
)


@pytest.fixture
def inputs(tmp_path):
    """Images, weights of another network, and a file that is neither."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    np.savez(folder / "images.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    save_weights(folder / "other.pt", {"w": torch.ones(2)})
    (folder / "broken.pt").write_bytes(b"broken")
    return folder


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def train(out: Path, images: Path, teacher: Path) -> None:
    paths = ["--data_dir", images, "--teacher_model_path", teacher, "--out_dir", out]
    run_train(parse(CmTrainConfig, [*FLAGS.split(), *map(str, paths)]))


@pytest.mark.parametrize("out", ["run", "runs/deep/run"])
@pytest.mark.parametrize(
    ("images", "teacher"),
    [
        ("nothing", "other.pt"),
        ("broken.pt", "other.pt"),
        ("images.npz", "nothing.pt"),
        ("images.npz", "broken.pt"),
        ("images.npz", "other.pt"),  # refused only when the networks are made, after the logs were opened
    ],
)
def test_bad_data_and_bad_teachers_leave_nothing(inputs, tmp_path, images, teacher, out):
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"nothing|broken|other"):
        train(tmp_path / out, inputs / images, inputs / teacher)
    assert snapshot(tmp_path) == before


def bad_checkpoints(folder: Path) -> dict[str, Path | str]:
    """What --resume_checkpoint refuses, by name; a run's directory and single files."""
    good = write_checkpoint(folder / "good", 1, {"model000001.pt": {"w": torch.ones(2)}}, {"step": 1}, {})
    bad = {"other network": good, "missing": folder / "nothing", "empty folder": folder / "empty"}
    bad["empty folder"].mkdir()
    for name in ("no manifest", "short file", "flipped bit", "no state", "deep manifest"):
        bad[name] = folder / name.replace(" ", "_")
        shutil.copytree(good, bad[name])
    (bad["no manifest"] / "manifest.json").unlink()
    (bad["short file"] / "model000001.pt").write_bytes(b"short")
    content = bytearray((bad["flipped bit"] / "model000001.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (bad["flipped bit"] / "model000001.pt").write_bytes(content)
    (bad["no state"] / "state.json").unlink()
    (bad["deep manifest"] / "manifest.json").write_text("[" * 100_000)
    return bad | {"weights": folder / "other.pt", "garbage": folder / "broken.pt", "scheme": "file:///x"}


def test_bad_checkpoints_to_resume_from_leave_nothing(inputs, tmp_path):
    bad = bad_checkpoints(inputs)
    before = snapshot(tmp_path)
    for name, checkpoint in bad.items():
        flags = f"{FLAGS} --training_mode consistency_training --init random --data_dir {inputs}/images.npz"
        paths = ["--resume_checkpoint", str(checkpoint), "--out_dir", f"{tmp_path}/runs/run"]
        with pytest.raises(UserError):
            run_train(parse(CmTrainConfig, [*flags.split(), *paths]))
        assert snapshot(tmp_path).keys() == before.keys(), name


@pytest.mark.parametrize(
    ("images", "teacher"),
    [
        ("nothing", "other.pt"),
        ("images.npz", "nothing.pt"),
        ("images.npz", "broken.pt"),
        ("images.npz", "other.pt"),  # refused after the logs were opened
    ],
)
def test_a_directory_that_was_there_stays_as_it_is(inputs, tmp_path, images, teacher):
    (tmp_path / "run" / "empty").mkdir(parents=True)
    (tmp_path / "run" / "heartbeats").mkdir()
    for name in ("config.json", "log.txt", "progress.csv", "status.json", "heartbeats/rank_0000.json"):
        (tmp_path / "run" / name).write_text("mine\n")
    before = snapshot(tmp_path)
    with pytest.raises(UserError):
        train(tmp_path / "run", inputs / images, inputs / teacher)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("failing", ["the list of names", "one file"])
def test_what_could_not_be_read_at_the_start_is_not_taken_away(tmp_path, monkeypatch, failing):
    """A mount that fails for a moment: what was not seen is no work of this start."""
    for name in ("config.json", "log.txt", "mine/a.txt", "zzz.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = snapshot(tmp_path)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(UserError), monkeypatch.context() as patch:
        if failing == "one file":
            patch.setattr(Path, "read_bytes", stale)
        else:
            patch.setattr("os.listdir", stale)
        with RunDirectory(str(tmp_path)):
            patch.undo()
            raise UserError("no")
    assert snapshot(tmp_path) == before


def refuse(
    place: RunDirectory, error: Exception, *, started: bool = False, checkpoints: bool = False
) -> None:
    with place:
        Path(place.path, "checkpoints").mkdir()
        if checkpoints:
            Path(place.path, "checkpoints", "step_000001").mkdir(parents=True)
        if started:
            place.started()
        raise error


def test_only_refusals_before_the_start_remove_the_directory(tmp_path):
    cases = {
        "refused": (UserError("no"), {}, False),
        "started": (UserError("no"), {"started": True}, True),
        "fetched": (UserError("no"), {"checkpoints": True}, True),
        "without a right": (PermissionError(13, "no"), {}, False),
        "interrupted": (KeyboardInterrupt(), {}, False),
        "crashed": (RuntimeError("no"), {}, True),
    }
    for name, (error, more, stays) in cases.items():
        with pytest.raises(type(error)):
            refuse(RunDirectory(str(tmp_path / name)), error, **more)
        assert (tmp_path / name).exists() == stays, name


def test_folders_above_that_others_use_meanwhile_stay(tmp_path):
    with pytest.raises(UserError), RunDirectory(str(tmp_path / "runs" / "mine")):
        (tmp_path / "runs" / "another").mkdir()
        raise UserError("no")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["another"]


def test_a_relative_path_and_one_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunDirectory("run") as place:
        assert Path(place.path).is_dir()
    Path("file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"file/run cannot be written.*\(--out_dir\)"),
        RunDirectory("file/run"),
    ):
        pass
    assert Path("run").is_dir()


def directory(path: Path) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("log.txt", directory),
        ("progress.csv", directory),
        ("progress.jsonl", directory),
        ("status.json", directory),
        ("progress.csv", lambda path: path.write_bytes(b"caf\xe9,step\n1,2\n")),
        ("progress.jsonl", lambda path: path.write_bytes(b"caf\xe9\n")),
        ("heartbeats", lambda path: path.write_bytes(b"")),
        ("log.txt", os.mkfifo),
        ("progress.csv", os.mkfifo),
        ("checkpoints", lambda path: path.write_bytes(b"")),
    ],
)
def test_an_odd_file_in_the_run_directory_is_one_line_that_names_it(inputs, tmp_path, name, make):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    make(tmp_path / "run" / name)
    with pytest.raises(UserError) as error:
        edm_train(tmp_path / "run", inputs / "images.npz")
    assert str(tmp_path / "run" / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["x" * 5000, "y/" * 4000, "a\0b"])
def test_a_path_that_cannot_be_is_one_short_line(inputs, tmp_path, path):
    with pytest.raises(UserError, match=r"cannot be written.*--out_dir") as error:
        edm_train(tmp_path / path, inputs / "images.npz")
    assert len(str(error.value)) < 600


def edm_train(out: Path, images: Path) -> None:
    flags = [*FLAGS.partition("--ema_rate")[0].split(), "--total_training_steps", "1"]
    run_train(parse(EdmTrainConfig, [*flags, "--data_dir", str(images), "--out_dir", str(out)]))


def lose_directory(folder: str) -> str:
    logger.configure(folder, ["log", "csv"])
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder)
    distributed.barrier()
    try:
        logger.log("message")
    except UserError as error:
        return str(error)
    return ""


def test_a_directory_that_is_deleted_meanwhile_is_one_line_on_every_rank(tmp_path):
    said = mp.run_ranks("tests.runtime.test_run_directory:lose_directory", 2, str(tmp_path / "run"))
    assert all("cannot write logs to" in text and "log" in text for text in said)
