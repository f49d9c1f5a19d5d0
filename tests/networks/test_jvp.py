"""Forward-mode derivatives of every network of the registry, against finite differences in float64."""

import copy

import pytest
import torch

from cm.config.rows import NETWORKS
from cm.networks.architecture import Architecture, build_network
from cm.objectives.forward_mode import forward_mode

SMALL = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "4",
    "use_scale_shift_norm": True,
    "num_classes": 3,
}


def network(name: str, **options):
    """A small network without layers that are zero, in eval mode."""
    torch.manual_seed(0)
    net = build_network(Architecture(network=name, **SMALL), options=options)
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() < 1e-3:  # what starts at zero, or nearly there
                torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    """x, time on the network's clock, labels, and a direction, in float64."""
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    t = NETWORKS[name].clock * torch.tensor([0.08, 0.9, 1.5], dtype=torch.float64)
    dt = NETWORKS[name].clock * torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    return x, t, torch.tensor([0, 2, 1]), dx, dt


def derivative(net, x, t, y, dx, dt, step: float = 1e-5) -> torch.Tensor:
    """Central difference of fourth order along (dx, dt)."""

    def at(h: float) -> torch.Tensor:
        return net(x + h * dx, t + h * dt, y)

    with torch.no_grad():
        near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("name", NETWORKS)
def test_jvp_is_the_derivative(name):
    net = network(name)
    x, t, y, dx, dt = inputs(name)
    wide = copy.deepcopy(net).double()
    expected = derivative(wide, x, t, y, dx, dt)
    scale = float(expected.abs().max())
    with forward_mode():
        exact, moved64 = torch.func.jvp(lambda x, t: wide(x, t, y), (x, t), (dx, dt))
        narrow = [v.float() for v in (x, t, dx, dt)]
        value, moved = torch.func.jvp(lambda x, t: net(x, t, y), tuple(narrow[:2]), tuple(narrow[2:]))
    assert scale > 1e-2, "a derivative of zero would test nothing"
    assert moved.dtype == value.dtype == torch.float32
    torch.testing.assert_close(value, net(narrow[0], narrow[1], y))
    torch.testing.assert_close(moved64, expected, rtol=0, atol=1e-7 * scale)
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=2e-4 * scale)
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_jvp_leaves_the_network_alone_and_agrees_with_reverse_mode(name):
    """<v, J u> by either mode; nothing of the network moves, in training mode neither."""
    net = network(name).train()
    before = copy.deepcopy(net.state_dict())
    x, t, y, dx, dt = (v.float() if v.is_floating_point() else v for v in inputs(name))
    v = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with forward_mode():
        _, moved = torch.func.jvp(lambda x, t: net(x, t, y), (x, t), (dx, dt))
    x.requires_grad_()
    t.requires_grad_()
    gx, gt = torch.autograd.grad((net(x, t, y) * v).sum(), (x, t))
    expected = (gx * dx).sum() + (gt * dt).sum()
    assert (moved * v).sum().item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-2)
    assert all(torch.equal(before[k], value) for k, value in net.state_dict().items())


@pytest.mark.parametrize("name", [name for name, row in NETWORKS.items() if row.half])
def test_jvp_through_a_bfloat16_torso(name):
    """The torso may compute in bf16: the derivative is that of fp32 to the precision of bf16."""
    net = network(name)
    x, t, y, dx, dt = (v.float() if v.is_floating_point() else v for v in inputs(name))
    with forward_mode():
        _, expected = torch.func.jvp(lambda x, t: net(x, t, y), (x, t), (dx, dt))
        net.convert_torso(torch.bfloat16)
        _, moved = torch.func.jvp(lambda x, t: net(x, t, y), (x, t), (dx, dt))
    assert moved.dtype == torch.float32
    assert (moved - expected).norm() < 0.1 * expected.norm()
