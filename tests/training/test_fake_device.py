"""Whole training steps on a device that has no values: nothing mixes devices or reads a number.

FakeTensorMode follows device and dtype of every tensor, and refuses an operation of two devices. The device is `cuda`
where torch was built for it, with or without a GPU; a CPU-only build cannot differentiate tensors of a device that it
does not know, and takes `meta`. Samplers and edits, whose levels belong to the host, are in test_host_syncs.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from cm.commands import train
from cm.config.choices import PRECISIONS
from cm.models.factory import create_network
from cm.models.files import ModelFile
from cm.objectives import base, ctm, lpips
from cm.runtime import logger
from cm.seeding import NoiseOf, StepRandom
from cm.tools.bench.runs import Options, train_config
from cm.training.factory import create_objective
from cm.training.roles import create_roles

DEVICE = torch.device("cuda" if torch.version.cuda else "meta")
SMALL = ("--image_size", "8", "--channel_mult", "1", "--attention_resolutions", "8", "--batch_size", "2")


class OneFlag(TorchFunctionMode):
    """Answers what the host asks of a tensor's value, and counts it: the flag of finite gradients is allowed."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__bool__:
            self.asked += 1
            return True
        return func(*args, **(kwargs or {}))


def replaced(module, fn, recurse=True):
    """nn.Module._apply with new parameters: those of fake tensors cannot be changed in place."""
    for child in module.children():
        child._apply(fn)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(fn(p.detach()), p.requires_grad)
    for name, b in module._buffers.items():
        if b is not None:
            module._buffers[name] = fn(b)
    return module


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(nn.Module, "_apply", replaced)
    # A generator's state is the host's.
    monkeypatch.setattr(base, "rng_state", lambda device: (torch.get_rng_state(), None))
    # Page-locked memory needs a GPU, and values have no meaning here.
    monkeypatch.setattr(NoiseOf, "draw", lambda n, pinned=False: torch.empty(n.stop - n.start, *n.shape))
    monkeypatch.setattr(ctm, "batch_number", lambda random: 0.5)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(lpips, "_weights_folder", lambda path: path)
    monkeypatch.setattr(lpips, "_build", lambda folder, average_pool: perceptual(average_pool))
    with FakeTensorMode(allow_non_fake_inputs=True), OneFlag() as flag:
        yield flag


def perceptual(average_pool):
    """LPIPS without its files."""
    lpips.import_piq()  # which knows how to import torchvision
    from torchvision.models import vgg16

    with DEVICE:
        features = vgg16(weights=None).features[: int(list(lpips.FEATURES)[-1]) + 1].requires_grad_(False)
        weights = [torch.empty(1, width, 1, 1) for width in lpips.FEATURES.values()]
    return lpips.assemble(features, weights, average_pool)


def trainer_of(case, folder, *flags):
    config = train_config(Options(device="cpu", flags=(*SMALL, *flags)), case)
    with unset_fake_temporarily():  # tables of the host, made once
        create_objective(config).draw(torch.zeros(2, 3, 8, 8), 0, StepRandom(0, 0, 0, 2, 2))
    logger.configure(str(folder), [])
    teacher = ModelFile("random", "file", create_network(config, two_times=False).state_dict(), None)
    objective, roles = create_roles(config, teacher, DEVICE)
    return train.build_trainer(config, objective, roles, train.create_saver(config, str(folder), ""))


# Of each way to make a loss one
CASES = ["edm", "cd", "cd_lpips", "pd", "cont_ct", "ect", "tcm", "scd", "multistep_cd", "ctm"]
CASES += ["meanflow", "improved_meanflow", "psd", "lmd"]


@pytest.mark.parametrize("case", CASES)
def test_an_objectives_step(case, fake, tmp_path):
    trainer = trainer_of(case, tmp_path)
    cond = {"y": torch.zeros(2, dtype=torch.int64)} if case == "improved_meanflow" else {}
    assert trainer.run_step(torch.empty(2, 3, 8, 8), cond)
    assert fake.asked == 1
    kept = [t for tensors in trainer.state.held().values() for t in tensors if t is not None and t.ndim]
    assert {t.device.type for t in kept} == {DEVICE.type}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_in_channels_last(precision, fake, tmp_path):
    """The torso computes in its dtype and in the format of its input; the loss and the masters are fp32."""
    trainer = trainer_of("cd", tmp_path, "--precision", precision, "--channels_last", "True")
    seen = []
    for module in trainer.model.input_blocks.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, terms = trainer.forward_backward(torch.empty(2, 3, 8, 8), {})
    assert terms["loss"].dtype == torch.float32 and terms["loss"].device.type == DEVICE.type
    assert {x.dtype for x in seen} == {PRECISIONS.load(precision)}
    if DEVICE.type == "cuda":  # convolutions on `meta` follow no format
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert trainer.state.student.optimize(trainer.state.optimizer)
    assert {p.dtype for p in trainer.state.student.master_params} == {torch.float32}


def test_two_devices_are_refused(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(2, 3, device=DEVICE) + torch.empty(2, 3)
