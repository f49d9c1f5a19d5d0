"""Signals at random moments, kills, starts at the same moment and full disks, for every program that writes results.

A case is a function of its number; CM_FAULT_CASES in the environment makes it so many of each program and fault.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.programs import GOES_ON, MEASURING, PROGRAMS, TRAINING, Server, command

STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PREEMPTED = 75
# Cases of each program and fault; 0: each program meets one of the faults
MORE = int(os.environ.get("CM_FAULT_CASES", "0"))
QUICK = [
    ("signal", "prepare in processes"),
    ("signal", "edit"),
    ("kill", "sample"),
    ("together", "convert to diffusers"),
    ("full disk", "reference"),
    ("full disk", "convert to safetensors"),
    ("small disk", "interpolate"),
]


class World:
    """The inputs, the server, and what each program leaves, in how long, when nobody disturbs it."""

    def __init__(self, folder: Path, inputs: Path):
        self.server = Server()
        self.folder, self.inputs = folder, inputs
        self._undisturbed: dict[str, tuple[set[str], float, int]] = {}
        self._count = 0

    def empty(self) -> Path:
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        return folder

    def run(self, program: str, out: Path, **faults) -> dict:
        return self.server.run(command(PROGRAMS[program], self.inputs, out), **faults)

    def undisturbed(self, program: str) -> tuple[set[str], float, int]:
        """(names that a program leaves, seconds that it takes, bytes of its largest file)."""
        if program not in self._undisturbed:
            out = self.empty()
            done = self.run(program, out)
            assert done["codes"] == [0], done["texts"]
            largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
            self._undisturbed[program] = names(out), done["seconds"], largest
        return self._undisturbed[program]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def temporary(found: set[str]) -> set[str]:
    return {name for name in found if "/." in f"/{name}" or "tmp" in name or "partial" in name}


def ended_by_a_signal(world: World, program: str, r: random.Random) -> None:
    """No process, no half of a result; the same command ends well afterwards."""
    whole, seconds, _ = world.undisturbed(program)
    out, number = world.empty(), r.choice(STOPS)
    done = world.run(program, out, number=number, delay=r.uniform(0, 1.1 * seconds))
    what, found = f"{program}, {number.name}: {done}", names(out)
    code = done["codes"][0]
    assert code in {0, 128 + number, PREEMPTED if program in TRAINING else 0}, what
    assert not done["left"] and not temporary(found), f"{what}\n{found}"
    assert "Traceback" not in done["texts"][0], what
    if code == 0:
        assert found >= whole, f"{what}\n{found}"
    else:
        kept = {name for name in found if not name.startswith(GOES_ON.get(program, "/"))}
        assert not kept or found == whole, f"{what}\n{found}"
    goes_on(world, program, out)


def goes_on(world: World, program: str, out: Path) -> None:
    """The same command again ends well, and leaves what it leaves when nobody disturbs it."""
    whole = world.undisturbed(program)[0]
    again = world.run(program, out)
    done = "already there" in again["texts"][0] or "exists; pass" in again["texts"][0]
    assert again["codes"] == [0] or (again["codes"] == [2] and done), again
    assert names(out) == whole, names(out) ^ whole


def killed(world: World, program: str, r: random.Random) -> None:
    """kill -9 at a random moment: the same command ends well, and clears what was left."""
    out, seconds = world.empty(), world.undisturbed(program)[1]
    world.run(program, out, number=signal.SIGKILL, delay=r.uniform(0, seconds))
    goes_on(world, program, out)


def started_together(world: World, program: str, r: random.Random) -> None:
    """One of them does it, the others are refused in one line (or do it again, where results are replaced)."""
    out = world.empty()
    done = world.run(program, out, copies=r.choice([2, 3]))
    for code, text in zip(done["codes"], done["texts"]):
        assert code in (0, 2), done
        if code == 2:
            said = [line for line in text.splitlines() if line.startswith("error: ")]
            known = ("is being written by", "already there", "exists; pass")
            assert len(said) == 1 and any(part in said[0] for part in known), done
    assert 0 in done["codes"], done
    assert names(out) == world.undisturbed(program)[0], done


def out_of_room(world: World, program: str, r: random.Random) -> None:
    """The disk is full at some point: one line, exit code 2, no half of a file."""
    largest = world.undisturbed(program)[2]
    out = world.empty()
    done = world.run(program, out, room=int(largest * r.random() ** 3))
    found, what = names(out), f"{program}: {done}"
    assert done["codes"][0] in (0, 2) and not done["left"] and not temporary(found), f"{what}\n{found}"
    assert "Traceback" not in done["texts"][0], what
    if done["codes"] == [2]:
        assert sum(line.startswith("error: ") for line in done["texts"][0].splitlines()) == 1, what
    goes_on(world, program, out)


def on_a_small_disk(world: World, program: str, r: random.Random) -> None:
    """A file system of a few pages, or of a few names: one line, and room again for what was begun."""
    largest = world.undisturbed(program)[2]
    out = world.empty()
    size = f"size={4096 + int(2 * largest * r.random() ** 2)}"
    with small_disk(out, r.choice([size, f"nr_inodes={r.randrange(2, 8)}"])) as disk:
        done = world.run(program, out)
        found, what = names(out), f"{program}, {disk}: {done}"
        assert done["codes"][0] in (0, 2) and not done["left"] and not temporary(found), f"{what}\n{found}"
        assert "Traceback" not in done["texts"][0], what
        if done["codes"] == [2]:
            assert sum(line.startswith("error: ") for line in done["texts"][0].splitlines()) == 1, what
        subprocess.run(["mount", "-o", "remount,size=1g,nr_inodes=0", out], check=True)
        goes_on(world, program, out)


@contextlib.contextmanager
def small_disk(folder: Path, option: str) -> Iterator[str]:
    """In the body, a new file system in memory lies in the folder."""
    mount = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield option
    finally:
        subprocess.run(["umount", folder], check=True)


FAULTS = {
    "signal": ended_by_a_signal,
    "kill": killed,
    "together": started_together,
    "full disk": out_of_room,
    "small disk": on_a_small_disk,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, program_inputs) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("programs"), program_inputs)
    yield world
    world.server.close()


def case(world: World, fault: str, program: str, number: int) -> None:
    FAULTS[fault](world, program, random.Random(f"{fault} {program} {number}"))


@pytest.mark.parametrize("fault, program", QUICK)
def test_a_few_faults(world, fault, program):
    case(world, fault, program, 0)


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("program", MEASURING)
def test_a_signal_to_what_measures_leaves_nothing(world, program, number):
    out = world.empty()
    done = world.run(program, out, number=number, delay=0.5)
    assert done["codes"] == [128 + number] and not done["left"] and not names(out), done
    assert done["texts"][0].splitlines()[-1] in ("interrupted", f"ended by {number.name}"), done


PAIRS = [
    (program, fault)
    for i, program in enumerate(PROGRAMS)
    for j, fault in enumerate(FAULTS)
    if MORE or (i % len(FAULTS) == j and program not in MEASURING)
]


@pytest.mark.slow
@pytest.mark.parametrize("program, fault", PAIRS)
def test_faults_of_every_program(world, program, fault):
    for number in range(1, 1 + max(MORE, 1)):
        case(world, fault, program, number)
