"""Places that cannot be read or listed: each program says so in one line, and takes none of them for empty."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cm.tools import doctor, runs
from tests.helpers.commands import refused
from tests.helpers.eval_files import stripes, write_classifier
from tests.helpers.mp import ROOT
from tests.helpers.rights import mode

RUN = ROOT / "tests" / "fixtures" / "run_before_packages" / "runs" / "edm"
CHECKPOINT = "step_000004"
FEATURES = "--features classifier=JUDGE"
# What reads a folder P, as a run, as images or as results
READERS = {
    "sample": "sample P --device cpu --out_dir OUT",
    "edit": "edit inpaint P IMAGES --mask center:0.5 --device cpu --out_dir OUT",
    "distill": "distill P IMAGES --out_dir OUT",
    "likelihood": "likelihood P IMAGES --device cpu --out_dir OUT",
    "search": f"search P IMAGES --device cpu {FEATURES} --out_dir OUT",
    "convert": "convert P OUT",
    "average": "average P --sigma_rel 0.08 --out OUT",
    "demo": "demo P",
    "report": "report P --out OUT",
    "results": "report RUN --results P --out OUT",
    "runs": "runs P",
    "train on it": "train P --out_dir OUT",
    "prepare": "prepare P OUT --image_size 8",
    "inspect": "inspect P",
    "classifier": "classifier P OUT",
    "reference": f"reference P OUT.npz {FEATURES}",
    "evaluate": f"evaluate IMAGES P {FEATURES} --out OUT",
}
OF_RUNS = ("sample", "edit", "distill", "likelihood", "convert", "average", "demo")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    images, labels = stripes(8)
    np.savez(folder / "images.npz", arr_0=images, arr_1=labels)
    write_classifier(folder / "judge.pt")
    shutil.copytree(RUN, folder / "run")
    return folder


@pytest.fixture
def copy(world, tmp_path):
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


def words(line: str, world: Path, place, out: Path) -> list[str]:
    known = {"P": place, "IMAGES": world / "images.npz", "RUN": world / "run"}
    known |= {"OUT": out / "out", "OUT.npz": out / "out.npz"}
    return [str(known.get(word, word.replace("=JUDGE", f"={world}/judge.pt"))) for word in line.split()]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("program", READERS)
def test_a_folder_that_may_not_be_listed(program, world, copy, tmp_path, monkeypatch):
    before = names(tmp_path)
    with mode(copy, 0):
        line = refused(words(READERS[program], world, copy, tmp_path), monkeypatch)
    assert str(copy) in line and ("denied" in line or "listed" in line), line
    assert names(tmp_path) == before


@pytest.mark.parametrize("program", OF_RUNS)
def test_checkpoints_that_may_not_be_listed(program, world, copy, tmp_path, monkeypatch):
    """A folder may be entered and not listed: to glob it is empty."""
    before = names(tmp_path)
    with mode(copy / "checkpoints", 0o311):
        line = refused(words(READERS[program], world, copy, tmp_path), monkeypatch)
    assert f"{copy}/checkpoints: cannot be listed (Permission denied)" in line
    assert names(tmp_path) == before


def test_a_checkpoint_that_may_not_be_listed_holds_weights(world, copy, tmp_path, monkeypatch):
    step = copy / "checkpoints" / CHECKPOINT
    with mode(step, 0o311):
        assert f"{step}: cannot be listed" in refused(
            ["sample", copy, "--out_dir", tmp_path / "o"], monkeypatch
        )


def test_training_does_not_begin_anew_where_its_checkpoints_may_not_be_listed(world, copy, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with mode(copy / "checkpoints", 0o311):
        argv = ["train", world / "images.npz", "--out_dir", copy]
        assert "checkpoints: cannot be listed" in refused(argv, monkeypatch)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "x"


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "x"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def dangling(folder: Path) -> Path:
    (folder / "link").symlink_to("nowhere")
    return folder / "link"


ODD = {
    "below a file": below_a_file,
    "a loop": loop,
    "a pipe": pipe,
    "dangling": dangling,
    "too long": lambda folder: folder / ("x" * 300),
    "a null byte": lambda folder: f"{folder}/a\0b",
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("program", READERS)
def test_places_that_are_none(program, kind, world, tmp_path, monkeypatch):
    place = ODD[kind](tmp_path)
    before = names(tmp_path)
    line = refused(words(READERS[program], world, place, tmp_path), monkeypatch)
    assert str(tmp_path) in line or "null" in line, line
    assert names(tmp_path) == before


def test_the_doctor_goes_on_where_it_may_not_look(copy):
    with mode(copy, 0):
        found = {check.name: check for check in doctor.tried(doctor.check_last_runs, str(copy))}
    assert found["last runs"].status == "failed" and str(copy) in found["last runs"].detail


@pytest.mark.parametrize("name", ["config.json", "progress.jsonl"])
def test_one_run_that_may_not_be_read_hides_no_other(name, copy, tmp_path, capsys):
    shutil.copytree(RUN, tmp_path / "other")
    with mode(copy / name, 0):
        runs.main([str(tmp_path)])
    told = capsys.readouterr().out.splitlines()
    assert told[1].endswith("other") and len(told) == 3
    assert told[2].startswith("note: ") and "Permission denied" in told[2] and name in told[2]
