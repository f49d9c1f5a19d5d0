"""Names that are not UTF-8, or that a terminal would obey: every program reads and writes them."""

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import run
from tests.helpers.programs import MEASURING, PROGRAMS, TRAIN, TRAINING, command

NAMES = {"Latin-1": os.fsdecode(b"caf\xe9"), "of two lines": "a\nb\x1b[31m"}
# These are left to the slow part
LONG = {*TRAINING, *MEASURING} | {"prepare in processes", "search", "likelihood", "convert to safetensors"}


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p not in LONG])
def test_a_program_reads_and_writes_bytes_that_are_no_utf8(program, program_inputs, tmp_path, monkeypatch):
    check(program, NAMES["Latin-1"], program_inputs, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_reads_and_writes_odd_names(program, kind, program_inputs, tmp_path, monkeypatch):
    check(program, NAMES[kind], program_inputs, tmp_path, monkeypatch)


def check(program: str, name: str, inputs: Path, folder: Path, monkeypatch) -> None:
    place = Path(shutil.copytree(inputs, folder / name))
    os.rename(place / "folder" / "a", place / "folder" / name)
    argv = command(PROGRAMS[program].replace("@folder/a", "@folder/NAME"), Path("IN"), Path("IN"))
    argv = [word.replace("IN/", f"{place}/").replace("NAME", name) for word in argv]
    code, text = run(argv, monkeypatch)
    assert code == 0, text
    assert any("OUT" in path.name for path in place.iterdir())


def test_a_class_is_named_as_its_folder_is(program_inputs, tmp_path, monkeypatch):
    """Also in the captions of a picture."""
    for part, name in zip("bc", NAMES.values()):
        shutil.copytree(program_inputs / "folder" / part, tmp_path / "classes" / name)
    flags = f"{TRAIN} --class_cond True --out_dir {tmp_path}/run".replace("steps 3", "steps 1")
    assert run(["train", tmp_path / "classes", *flags.split()], monkeypatch)[0] == 0
    argv = ["sample", tmp_path / "run", "--num_samples", "2", "--sampler", "euler", "--steps", "2"]
    code, text = run([*argv, "--classes", ",".join(NAMES.values()), "--device", "cpu"], monkeypatch)
    assert code == 0, text
