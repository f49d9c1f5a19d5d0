"""Fused optimizers take the steps of torch's own, whatever the memory layout, and share their checkpoints."""

import pytest
import torch

from cm.training.fused_adam import RAdam, rectification
from cm.training.optimizers import make_optimizer

SHAPES = ((8, 4, 3, 3), (8,), (6, 8), (8, 8, 1, 1))
PLAIN = {
    "radam": torch.optim.RAdam,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def weights(seed=0, channels_last=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if channels_last:
        drawn = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in drawn]
    return [torch.nn.Parameter(w) for w in drawn]


def take_steps(optimizer, params, first, last, *, channels_last=False, without=()):
    for step in range(first, last):
        for i, (p, g) in enumerate(zip(params, weights(100 + step))):
            g = g.detach() * 10.0 ** (-i)
            g = g.to(memory_format=torch.channels_last) if channels_last and g.ndim == 4 else g
            p.grad = None if i in without else g.clone()
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def assert_same(params, expected):
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", PLAIN)
def test_equals_torch_through_warm_up_and_after(name, decay):
    ours, theirs = weights(), weights()
    mine = make_optimizer(name, ours, lr=1e-2, weight_decay=decay, betas=(0.8, 0.99), eps=1e-3)
    plain = PLAIN[name](theirs, lr=1e-2, weight_decay=decay, betas=(0.8, 0.99), eps=1e-3, foreach=False)
    take_steps(mine, ours, 0, 15)
    take_steps(plain, theirs, 0, 15)
    assert_same(ours, theirs)
    assert (ours[0] - weights()[0]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", PLAIN)
def test_states_are_torchs_own(name):
    """Ten steps here after ten of torch's, and the other way round, are twenty of torch's."""
    reference = weights()
    take_steps(PLAIN[name](reference, lr=1e-2, weight_decay=0), reference, 0, 20)
    makers = [lambda p: make_optimizer(name, p, lr=1e-2), lambda p: PLAIN[name](p, lr=1e-2, weight_decay=0)]
    for first, second in (makers, makers[::-1]):
        params = weights()
        before, after = first(params), second(params)
        take_steps(before, params, 0, 10)
        groups = after.state_dict()["param_groups"]
        after.load_state_dict({"state": before.state_dict()["state"], "param_groups": groups})
        take_steps(after, params, 10, 20)
        assert_same(params, reference)


@pytest.mark.parametrize("name", PLAIN)
def test_memory_layout_changes_nothing(name):
    """Moments of a contiguous run continue in a channels-last one; gradients may have either layout."""
    reference = weights()
    take_steps(PLAIN[name](reference, lr=1e-2, weight_decay=0), reference, 0, 20)
    contiguous = weights()
    before = make_optimizer(name, contiguous, lr=1e-2)
    take_steps(before, contiguous, 0, 10, channels_last=True)
    params = weights(channels_last=True)
    with torch.no_grad():
        for p, q in zip(params, contiguous):
            p.copy_(q)
    after = make_optimizer(name, params, lr=1e-2)
    after.load_state_dict(before.state_dict())
    take_steps(after, params, 10, 15)
    take_steps(after, params, 15, 20, channels_last=True)
    assert_same(params, reference)


def test_parameters_that_start_late_have_their_own_warm_up():
    ours, theirs = weights(), weights()
    mine, plain = make_optimizer("radam", ours, lr=1e-2), torch.optim.RAdam(theirs, lr=1e-2)
    for optimizer, params in ((mine, ours), (plain, theirs)):
        take_steps(optimizer, params, 0, 8, without=(1,))
        take_steps(optimizer, params, 8, 18)
    assert_same(ours, theirs)


def test_rectification_begins_at_the_sixth_step():
    assert [rectification(step, 0.999) > 0 for step in (1, 5, 6, 7)] == [False, False, True, True]
    assert rectification(10**6, 0.999) == pytest.approx(1)
    assert rectification(6, 0.999) == pytest.approx(0.0258, abs=1e-4)  # rho_6 = 5.99


def test_settings_that_the_kernel_lacks_are_torchs():
    ours, theirs = weights(), weights()
    mine = RAdam(ours, lr=1e-2, maximize=True)
    plain = torch.optim.RAdam(theirs, lr=1e-2, maximize=True)
    take_steps(mine, ours, 0, 10)
    take_steps(plain, theirs, 0, 10)
    assert_same(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fused_radam_on_cuda_equals_the_cpu():
    cpu, gpu = weights(), [torch.nn.Parameter(w.detach().cuda()) for w in weights()]
    a, b = make_optimizer("radam", cpu, lr=1e-2), make_optimizer("radam", gpu, lr=1e-2)
    for step in range(12):
        for p, q, g in zip(cpu, gpu, weights(100 + step)):
            p.grad, q.grad = g.detach().clone(), g.detach().cuda()
        a.step()
        b.step()
    assert_same([q.cpu() for q in gpu], cpu)
