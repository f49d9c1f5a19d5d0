"""torch.compile of networks and of whole losses: one graph each, compiled once per shape, with equal numbers.

The graphs are traced through autograd (`aot_eager`) but run by torch's own kernels: what inductor would fuse them to is
for `pytest -m gpu`.
"""

from functools import partialmethod

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from cm.commands import train
from cm.config.rows import NETWORKS
from cm.models.factory import create_network
from cm.models.files import ModelFile
from cm.networks.architecture import Architecture, build_network
from cm.seeding import StepRandom
from cm.tools.bench.runs import Options, randomized, train_config, training
from cm.training.roles import create_roles
from tests.helpers.mp import run_ranks

SMALL = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": "1",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "use_scale_shift_norm": True,
    "num_classes": 3,
}
FLAGS = ("--image_size", "8", "--channel_mult", "1", "--attention_resolutions", "8", "--batch_size", "2")


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(function):
    """(function as one graph, its counter of compilations); a graph break raises."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=False, backend=counter), counter


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_is_one_graph_per_shape(name):
    net = randomized(build_network(Architecture(network=name, **SMALL)))
    call, counter = counted(net)
    batches = (2, 3, 2) if name == "adm" else (2, 2)
    for batch in batches:
        x, t = torch.randn(batch, 3, 8, 8), torch.linspace(0.1, 1.0, batch)
        y = torch.arange(batch) % 3
        expected, found = net(x, t, y), call(x, t, y)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    assert counter.frame_count == len(set(batches))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def loss_of(case):
    """(loss of images and draws, two draws)"""
    config = train_config(Options(device="cpu", flags=FLAGS), case)
    teacher = ModelFile("random", "file", create_network(config).state_dict(), None)
    objective, roles = create_roles(config, teacher, torch.device("cpu"))
    for role in (roles.student, roles.target, roles.teacher):
        if role is not None:
            randomized(role.net).requires_grad_(role is roles.student)
    x0 = torch.rand(2, 3, 8, 8) * 2 - 1
    draws = [objective.draw(x0, step, StepRandom(0, step, 0, 2, 2)) for step in range(2)]
    return lambda draw: objective.forward(roles, x0, draw, 0)["loss"], draws


def test_the_loss_of_a_teacher_is_one_graph():
    loss, draws = loss_of("edm")
    call, counter = counted(loss)
    for draw in draws:
        torch.testing.assert_close(call(draw), loss(draw), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_consistency_losses_are_not_compiled_anew():
    """torch cannot trace what shares the dropout masks (the generator's state): they are cut there.

    Those with a forward-mode derivative are not compiled at all: torch has none of group norm under compilation.
    """
    loss, draws = loss_of("ct")
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(loss, dynamic=False, backend=counter)
    # A difference of two predictions at sigma 80: rounding is a part of it.
    torch.testing.assert_close(call(draws[0]), loss(draws[0]), rtol=2e-2, atol=1e-5)
    first = counter.frame_count
    torch.testing.assert_close(call(draws[1]), loss(draws[1]), rtol=2e-2, atol=1e-5)
    assert 1 <= counter.frame_count == first


def compiled_ranks(compile):
    """Weights after two steps on this rank, graphs that were compiled after each step, and whether DDP was there."""
    config = train_config(Options(device="cpu", flags=(*FLAGS, "--compile", str(compile))), "cd")
    counter = CompileCounterWithBackend("aot_eager")
    train.can_compile = lambda device: True
    nn.Module.compile = partialmethod(nn.Module.compile, backend=counter)
    counts = []
    with training(config) as trainer:
        for _ in range(2):
            trainer.run_step(*next(trainer.data))
            counts.append(counter.frame_count)
        wrapped = isinstance(trainer.ddp_model, DistributedDataParallel)
        return [p.detach().numpy() for p in trainer.model.parameters()], counts, wrapped


def test_compiled_ranks_train_as_others():
    """Student, teacher and target are compiled in the first step, and not again in the second.

    The student is compiled with DDP around it, which cuts a large network's graph by gradient buckets, so that the
    exchange overlaps with the rest of the backward pass.
    """
    plain = run_ranks("tests.training.test_compile:compiled_ranks", 2, False)
    compiled = run_ranks("tests.training.test_compile:compiled_ranks", 2, True, timeout=240)
    for rank in (0, 1):
        (first, second), wrapped = compiled[rank][1:]
        assert 3 <= first == second <= 4 and wrapped and plain[rank][1:] == ([0, 0], True)
        for a, b, c in zip(compiled[rank][0], plain[rank][0], compiled[0][0]):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
            np.testing.assert_array_equal(a, c)
