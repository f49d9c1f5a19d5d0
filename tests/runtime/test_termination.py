"""SIGTERM ends a program as Ctrl-C does: it cleans up, and its workers end with it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import mp

# Writes a file that is whole or not there, and waits in the middle.
WRITE = """
import sys, time
from cm.runtime import job
from cm.runtime.files import whole_file

def main():
    with whole_file(sys.argv[1] + "/file") as file:
        file.write(b"half")
        print("half", flush=True)
        time.sleep(60)

job.run_main(main)
"""
# Converts images slowly.
PREPARE = r"""
import os, sys, time
from cm.data import prepare
from cm.runtime import job

def slow(self, name, content):
    os.write(1, f"<{os.getpid()}>\n".encode())
    time.sleep(0.2)
    return convert(self, name, content)

convert, prepare.Conversion.__call__ = prepare.Conversion.__call__, slow
prepare._CHUNK = 4  # a worker ends with its chunk
folder = sys.argv[1]
job.run_main(lambda: prepare.prepare(f"{folder}/in", f"{folder}/out", image_size=8, num_workers=2))
"""


def start(code: str, argument: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(argument)], cwd=mp.ROOT, start_new_session=True, **pipes
    )


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_half_file(tmp_path, number):
    process = start(WRITE, tmp_path)
    process.stdout.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (128 + number, f"ended by {number.name}\n")
    assert left(tmp_path) == []


# The signal comes while an object is destroyed, where Python drops exceptions.
DESTROYED = """
import os, signal, sys, time
from cm.runtime import job

class Gone:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.1)

def main():
    Gone()
    time.sleep(60)

job.run_main(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_a_destructor_is_not_lost(number):
    process = start(DESTROYED, int(number))
    _, said = process.communicate(timeout=30)
    expected = "interrupted\n" if number == signal.SIGINT else "ended by SIGTERM\n"
    assert (process.returncode, said) == (128 + number, expected)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(200):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "in" / f"{number:03d}.png")
    return tmp_path


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("whom", ["parent", "group", "kill"])
def test_prepare_and_its_workers_end_together(images, whom):
    process = start(PREPARE, images)
    workers = {int(re.search(r"\d+", process.stdout.readline())[0])}
    while len(workers) < 2:
        workers.add(int(re.search(r"\d+", process.stdout.readline())[0]))
    if whom == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGKILL if whom == "kill" else signal.SIGTERM)
    _, said = process.communicate(timeout=60)  # ends when nobody holds the pipe any more
    assert process.returncode == (-signal.SIGKILL if whom == "kill" else 128 + signal.SIGTERM)
    if whom != "kill":
        assert said == "ended by SIGTERM\n" and left(images) == ["in"]
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_is_killed_is_one_line(images):
    process = start(PREPARE, images)
    os.kill(int(re.search(r"\d+", process.stdout.readline())[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and said.startswith("error: a worker process was killed")
    assert left(images) == ["in"]
