"""Flags that change how training computes, not what: --compile, --channels_last, --deterministic; memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cm.commands import train
from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig
from cm.runtime import cpu, logger
from cm.storage.checkpoint import complete_checkpoints, read_state
from cm.storage.weights import load_weights
from cm.tools.torture import compare
from cm.training import compilation, roles
from cm.training.trainer import Trainer
from tests.helpers.models import TINY_FLAGS
from tests.helpers.mp import ROOT

FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 4 --num_workers 0 --log_interval 1 --save_interval 1 "
    "--ema_rate 0.9 --lr 1e-3 --total_training_steps 2 --dropout 0.2 --preview_count 2 "
    "--training_mode consistency_training --loss_norm l2 --weight_schedule uniform --start_ema 0.5 --start_scales 4"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, arr_0=np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    return path


def run_training(data, run, *extra):
    run_train(parse(CmTrainConfig, [*FLAGS.split(), "--data_dir", str(data), "--out_dir", str(run), *extra]))
    logger.reset()
    return run


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return run_training(data, tmp_path_factory.mktemp("plain") / "run")


def weights(run):
    return load_weights(complete_checkpoints(run)[-1] / "model000002.pt")[0]


def test_channels_last_changes_the_layout_and_not_the_result(data, plain, tmp_path, monkeypatch):
    seen = []
    step = Trainer.run_step

    def look(self, *args):
        conv = next(m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        handle = conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        params = [
            conv.weight,
            self.state.target.module.input_blocks[0][0].weight,
            self.state.ema.copies[0][4],
        ]
        seen.extend(p for p in params if p.ndim == 4)
        result = step(self, *args)
        handle.remove()
        return result

    monkeypatch.setattr(Trainer, "run_step", look)
    run = run_training(data, tmp_path / "run", "--channels_last", "True")
    assert len(seen) >= 6
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=0, atol=1e-5)
        assert weights(run)[name].is_contiguous()  # files are what other code expects


def test_channels_last_goes_on_bitwise(data, tmp_path):
    whole = run_training(data, tmp_path / "whole", "--channels_last", "True")
    with pytest.raises(SystemExit):
        run_training(data, tmp_path / "cut", "--channels_last", "True", "--max_hours", "1e-9")
    cut = run_training(data, tmp_path / "cut", "--channels_last", "True")
    compare(cut, whole)


def test_auto_goes_on_in_the_format_that_the_run_began_in(data, tmp_path, monkeypatch):
    """Whatever a measurement would say on another day; on another kind of device it is asked anew."""
    whole = run_training(data, tmp_path / "whole", "--channels_last", "True")
    monkeypatch.setattr(roles, "training_format", lambda config, device: torch.channels_last)
    with pytest.raises(SystemExit):
        run_training(data, tmp_path / "cut", "--max_hours", "1e-9")
    monkeypatch.setattr(roles, "training_format", lambda config, device: torch.preserve_format)
    cut = run_training(data, tmp_path / "cut")
    compare(cut, whole)
    newest = complete_checkpoints(cut)[-1]
    assert read_state(newest)["memory_format"] == {"device": "cpu", "channels_last": True}
    config = parse(CmTrainConfig, [*FLAGS.split(), "--data_dir", str(data)])
    known = [roles.with_format(config, torch.device(name), newest).channels_last for name in ("cpu", "cuda")]
    assert known == ["True", "False"]
    assert roles.with_format(config, torch.device("cpu"), None).channels_last == "False"


def test_compiled_networks_give_the_same_training(data, plain, tmp_path, monkeypatch):
    """Through dynamo, which is what can go wrong; generating code would take minutes on a CPU."""
    compiled = []
    original = nn.Module.compile

    def through_dynamo(self):
        compiled.append(type(self).__name__)
        original(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", through_dynamo)
    monkeypatch.setattr(train, "can_compile", lambda device: True)
    run = run_training(data, tmp_path / "run", "--compile", "True")
    assert compiled == ["UNetModel"] * 2
    compare(run, plain)


def test_where_compilation_fails_training_goes_on_without(data, plain, tmp_path, monkeypatch):
    def no_compiler(function):
        raise RuntimeError("Compiler: g++ is not found.\nmore lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = run_training(data, tmp_path / "run", "--compile", "True")
    text = (run / "log.txt").read_text()
    assert text.count("warning: torch.compile does not work here") == 1
    assert "RuntimeError: Compiler: g++ is not found." in text and "more lines" not in text
    compare(run, plain)


def test_the_question_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert compilation.can_compile(torch.device("cpu"))


def test_deterministic_algorithms_are_asked_for(data, plain, tmp_path):
    try:
        run = run_training(data, tmp_path / "run", "--deterministic", "True")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    compare(run, plain)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept_for_the_next_step():
    """Page faults of large tensors that come and go, before and after, in a fresh process."""
    program = (
        "import resource, torch\n"
        "from cm.runtime.cpu import keep_freed_memory\n"
        "def faults():\n"
        "    step = lambda: [torch.zeros(500_000 + 1000 * i) for i in range(8)]\n"
        "    step(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): step()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults(); assert keep_freed_memory(); print(first, faults())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, after = map(int, done.stdout.split())
    assert after < 0.5 * before


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    assert not cpu.keep_freed_memory()
