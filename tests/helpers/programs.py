"""Every program of `cm` that writes results, and a server that runs them under faults.

The server has imported everything and forks for each start, so that a case takes what the program itself takes.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cm.commands.main import main
from tests.helpers.eval_files import stripes, write_classifier, write_npz
from tests.helpers.models import TINY_FLAGS, save_consistency_model
from tests.helpers.mp import ROOT

TRAIN = (
    f"{TINY_FLAGS}--in_channels 1 --global_batch_size 4 --num_workers 0 --log_interval 1 --preview_count 0 "
    "--ema_rate 0.9 --total_training_steps 3 --save_interval 1 --device cpu"
)
MODEL = "--num_samples 6 --batch_size 2 --device cpu"
FEATURES = "--features classifier=@classifier.pt"
# Name -> command line; @ stands for the folder of inputs, OUT for a name in an empty folder.
PROGRAMS = {
    "prepare": "prepare @folder OUT --image_size 8",
    "prepare in processes": "prepare @folder OUT --image_size 8 --num_workers 2",
    "train": f"train @images.npz {TRAIN} --out_dir OUT",
    "distill": f"distill @edm @images.npz {TRAIN} --loss_norm l2 --out_dir OUT",
    "sample": f"sample @model.pt {MODEL} --out_dir OUT",
    "edit": "edit inpaint @model.pt @folder/a --mask center:0.5 --batch_size 2 --device cpu --out_dir OUT",
    "interpolate": "edit interpolate @model.pt --between 1,2 --frames 4 --device cpu --out_dir OUT",
    "search": f"search @model.pt @reference.npz {MODEL} --begin 0 --end 3 {FEATURES} --protocol classifier "
    "--out_dir OUT",
    "likelihood": "likelihood @edm @images.npz --num_images 2 --device cpu --out_dir OUT",
    "evaluate": f"evaluate @reference.npz @samples.npz {FEATURES} --out OUT.json",
    "reference": f"reference @images.npz OUT.npz {FEATURES}",
    "classifier": "classifier @images.npz OUT.pt --epochs 3",
    "convert": "convert @model.pt OUT.pt",
    "convert to safetensors": "convert @model.pt OUT.safetensors --to safetensors",
    "convert to diffusers": "convert @model.pt OUT --to diffusers",
    "average": "average @edm --sigma_rel 0.08 --out OUT.pt",
    "report": "report @edm --out OUT.html",
    "plan": "plan @edm --gpus 1xA100-40 --json OUT.json",
    "benchmark": "benchmark host --repeats 1 --warmup 0 --out OUT.json",
}
TRAINING = {"train", "distill"}
MEASURING = ("plan", "benchmark")  # which take longer than the others
PRELOADED = (
    "cm.commands.edit", "cm.commands.interpolate", "cm.commands.likelihood", "cm.commands.prepare",
    "cm.commands.sample", "cm.commands.train", "cm.tools.convert.formats", "cm.tools.posthoc_ema", "cm.training.setup",
    "evaluations.evaluator", "evaluations.reference", "evaluations.search", "evaluations.small_classifier",
    "evaluations.reports.run_report.command", "safetensors.torch", "cm.tools.bench.host", "cm.tools.planning.report",
    "cm.tools.planning.run", "cm.tools.profiling.report",
)  # fmt: skip
# What these leave after an end is what the next start goes on with.
GOES_ON = {**dict.fromkeys(TRAINING, "OUT/"), "search": "OUT/search_memo.json"}


def make_inputs(folder: Path) -> Path:
    """What the programs read, small: grey images of 8 pixels in four classes, and models of them."""
    images, labels = stripes(24)
    np.savez(folder / "images.npz", arr_0=images, arr_1=labels)
    for number, (image, label) in enumerate(zip(images, labels)):
        place = folder / "folder" / "abcd"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(place / f"{number}.png")
    write_npz(folder / "samples.npz", 24, seed=1)
    write_classifier(folder / "classifier.pt")
    save_consistency_model(folder / "model.pt", in_channels=1, resblock_updown=True)
    main(command(PROGRAMS["reference"].replace("OUT.npz", "@reference.npz"), folder, folder))
    main(command(f"train @images.npz {TRAIN} --ema_profiles 0.05,0.1 --out_dir @edm", folder, folder))
    return folder


def command(line: str, inputs: Path, out: Path) -> list[str]:
    """The words of a command line."""
    words = [word.replace("OUT", f"{out}/OUT") for word in line.split()]
    return [word.replace("@", f"{inputs}/") for word in words]


class Server:
    """Runs programs in forked processes, each in a session of its own."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, **pipes)

    def close(self) -> None:
        self._process.kill()

    def run(
        self, argv: Sequence[str], *, copies: int = 1, number: int = 0, delay: float = 0.0, room: int = -1
    ) -> dict[str, Any]:
        """Start a program `copies` times at once.

        number, delay: a signal, and after how many seconds the (first) program's processes get it. room: no file grows
        beyond so many bytes. Returns {"codes": exit codes, negative for a signal; "texts": what each printed; "left":
        whether processes are left; "seconds"}.
        """
        asked = dict(argv=argv, copies=copies, number=number, delay=delay, room=room)
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.monotonic()
        started = [_start(asked) for _ in range(asked["copies"])]
        pids = [pid for pid, _ in started]
        if asked["number"]:
            time.sleep(asked["delay"])
            os.killpg(pids[0], asked["number"])
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        seconds = time.monotonic() - began
        left = any(map(_left, pids))
        texts = [_printed(pipe) for _, pipe in started]
        print(json.dumps({"codes": codes, "texts": texts, "left": left, "seconds": seconds}), flush=True)


def _start(asked: dict[str, Any]) -> tuple[int, int]:
    """(process, what it prints) of a program in a process group of its own."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        with suppress(OSError):  # the child may have done it
            os.setpgid(pid, pid)
        return pid, reader
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(writer, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked["room"] >= 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["room"],) * 2)
        main(asked["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _printed(pipe: int) -> str:
    os.set_blocking(pipe, False)
    with open(pipe, "rb") as file:
        return (file.read() or b"").decode(errors="replace")


def _left(group: int) -> bool:
    """Whether a process of the group is still there a second later."""
    for _ in range(20):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    _serve()
