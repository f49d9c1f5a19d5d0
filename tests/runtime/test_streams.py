"""Programs go on when their terminal or the reader of their output goes away."""

import subprocess
import sys

import pytest

from tests.helpers import mp

# Prints more than a pipe holds, logs, shows a bar, and says in a file that it came to its end.
PROGRAM = """
import sys
from cm.runtime import job, logger
from cm.runtime.progress import progress

def main():
    logger.configure(sys.argv[1], ["line:3", "log", "csv"])
    for step in progress(range(3), total=3, desc="bar"):
        logger.log("message " + "x" * 100_000)
        print("printed", "y" * 100_000)
        print("complaint", file=sys.stderr, flush=True)
        logger.logkv("step", step)
        logger.dumpkvs()
    with open(sys.argv[1] + "/end", "w") as file:
        file.write("reached")

job.run_main(main)
"""


@pytest.mark.parametrize(
    "redirection", ["| head -c 10", ">&-", "2>&-", ">&- 2>&- <&-", "2>&1 | true", "> /dev/full"]
)
def test_a_program_goes_on_without_its_screen(redirection, tmp_path):
    run = f'"$0" -c "$1" "$2" {redirection}; echo ${{PIPESTATUS[0]}} > "$2/code"'
    command = ["bash", "-c", run, sys.executable, PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=mp.ROOT, timeout=120)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "end").read_text() == "reached"
    assert (tmp_path / "progress.csv").read_text() == "step\n0\n1\n2\n"
    assert (tmp_path / "log.txt").read_text().count("message") == 3


def test_an_error_without_a_screen_keeps_its_code():
    code = "from cm.runtime import job; from cm.errors import UserError\ndef f(): raise UserError('x')\njob.run_main(f)"
    for redirection in ("2>&-", ">&-"):
        run = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code]
        done = subprocess.run(run, capture_output=True, text=True, cwd=mp.ROOT)
        assert done.returncode == 2 and done.stderr in ("", "error: x\n")
