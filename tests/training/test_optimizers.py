"""Optimizers by name: torch's own, whatever the memory layout of weights, gradients and restored moments."""

import pytest
import torch

from cm.errors import UserError
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


def take_steps(optimizer, params, first, last, *, channels_last=False):
    for step in range(first, last):
        for i, (p, g) in enumerate(zip(params, weights(100 + step))):
            g = g.detach() * 10.0 ** (-i)
            g = g.to(memory_format=torch.channels_last) if channels_last and g.ndim == 4 else g
            p.grad = g.clone()
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def assert_same(params, expected):
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", PLAIN)
def test_names_and_options_are_torchs(name, decay):
    ours, theirs = weights(), weights()
    mine = make_optimizer(name, ours, lr=1e-2, weight_decay=decay, betas=(0.8, 0.99), eps=1e-3)
    plain = PLAIN[name](theirs, lr=1e-2, weight_decay=decay, betas=(0.8, 0.99), eps=1e-3, foreach=False)
    take_steps(mine, ours, 0, 15)
    take_steps(plain, theirs, 0, 15)
    assert_same(ours, theirs)
    assert (ours[0] - weights()[0]).abs().mean() > 1e-3
    with pytest.raises(UserError, match="optimizer must be one of radam, adam, adamw"):
        make_optimizer("sgd", ours, lr=1e-2)


@pytest.mark.parametrize("name", PLAIN)
def test_memory_layout_changes_nothing(name):
    """Moments of a contiguous run continue in a channels-last one; gradients may have either layout."""
    reference = weights()
    take_steps(PLAIN[name](reference, lr=1e-2, weight_decay=0), reference, 0, 20)
    contiguous = weights()
    before = make_optimizer(name, contiguous, lr=1e-2)
    take_steps(before, contiguous, 0, 10, channels_last=True)
    assert before.state[contiguous[0]].keys() == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }  # as old checkpoints have them
    params = weights(channels_last=True)
    with torch.no_grad():
        for p, q in zip(params, contiguous):
            p.copy_(q)
    after = make_optimizer(name, params, lr=1e-2)
    after.load_state_dict(before.state_dict())
    take_steps(after, params, 10, 15)
    take_steps(after, params, 15, 20, channels_last=True)
    assert_same(params, reference)
