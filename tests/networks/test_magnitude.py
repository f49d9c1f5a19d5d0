"""Magnitude-preserving layers of EDM2: golden numbers of each function, sizes that are kept, derivatives at zero."""

import math

import pytest
import torch
import torch.nn.functional as F

from cm.networks.layers import fir_down, fir_kernel, fir_up, pixel_norm
from cm.networks.magnitude import (
    MPConv,
    MPFourier,
    MPPositional,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights,
    resample,
)
from tests.helpers.golden_data import later

EXACT = dict(rtol=1e-5, atol=1e-6)


def share(key: str) -> float:
    """The balance that a key such as mp_sum_t0p3 names."""
    return float(key.rpartition("_t")[2].replace("p", "."))


def test_golden_functions():
    g = later("edm2_net")
    x, y, wide = g.tensor("fn/x"), g.tensor("fn/y"), g.tensor("fn/y10")
    torch.testing.assert_close(normalize(x), g.tensor("fn/normalize_all"), **EXACT)
    torch.testing.assert_close(normalize(x, dim=1), g.tensor("fn/normalize_dim1"), **EXACT)
    unit = g.tensor("fn/normalize_weight")  # a result whose input is not stored
    torch.testing.assert_close(normalize(unit), unit, rtol=3e-4, atol=0)
    torch.testing.assert_close(mp_silu(x), g.tensor("fn/mp_silu"), **EXACT)
    for key in g.keys("fn/mp_sum_t"):
        torch.testing.assert_close(mp_sum(x, y, share(key)), g.tensor(key), **EXACT)
    for key in g.keys("fn/mp_cat_t"):
        torch.testing.assert_close(mp_cat(x, wide, share(key)), g.tensor(key), **EXACT)


def test_golden_resampling_is_the_box_filter_and_the_fir_filter_of_the_other_networks():
    g = later("edm2_net")
    x = g.tensor("fn/x")
    for mode, fir in (("down", fir_down), ("up", fir_up)):
        torch.testing.assert_close(resample(x, mode), g.tensor(f"fn/resample_{mode}_11"), **EXACT)
        torch.testing.assert_close(fir(x, fir_kernel((1, 1))), g.tensor(f"fn/resample_{mode}_11"), **EXACT)
        torch.testing.assert_close(
            fir(x, fir_kernel((1, 3, 3, 1))), g.tensor(f"fn/resample_{mode}_1331"), **EXACT
        )
    assert resample(x, "keep") is x


def layer(weight: torch.Tensor) -> MPConv:
    """A layer with the given weight."""
    out, channels, *kernel = weight.shape
    made = MPConv(channels, out, kernel[0] if kernel else 0)
    made.load_state_dict({"weight": weight})
    return made


def test_golden_convolutions():
    g = later("edm2_net")
    x = g.tensor("fn/x")
    conv = layer(g.tensor("mpconv/weight"))
    torch.testing.assert_close(conv(x), g.tensor("mpconv/out_gain1"), **EXACT)
    torch.testing.assert_close(conv(x, 0.7), g.tensor("mpconv/out_gain0p7"), **EXACT)
    torch.testing.assert_close(layer(g.tensor("mpconv1x1/weight"))(x), g.tensor("mpconv1x1/out"), **EXACT)
    linear, rows = layer(g.tensor("mplinear/weight")), g.tensor("mplinear/x")
    torch.testing.assert_close(linear(rows), g.tensor("mplinear/out"), **EXACT)
    ratio = g.tensor("mplinear/out_gain") / g.tensor("mplinear/out")
    torch.testing.assert_close(linear(rows, ratio.median()), g.tensor("mplinear/out_gain"), **EXACT)


def test_golden_forced_normalisation_belongs_to_the_step_not_to_the_forward_pass():
    g = later("edm2_net")
    x, v = g.tensor("fn/x"), g.tensor("mpconv/v")
    conv = layer(g.tensor("mpconv/weight")).train()
    kept = conv.weight.detach().clone()
    (conv(x) * v).sum().backward()
    assert torch.equal(conv.weight, kept), "no forward pass may change a weight"
    torch.testing.assert_close(conv.weight.grad, g.tensor("mpconv/grad_weight"), **EXACT)
    for key in ("train_forward", "two_forwards"):
        normalize_weights(torch.nn.ModuleDict({"a": conv}), {"a.weight": conv.weight})
        torch.testing.assert_close(conv.weight.detach(), g.tensor(f"mpconv/weight_after_{key}"), **EXACT)
        if key == "train_forward":
            # The public code normalises inside the pass, which then gives this.
            torch.testing.assert_close(conv(x).detach(), g.tensor("mpconv/out_train"), **EXACT)


def test_golden_time_features():
    g = later("edm2_net")
    fourier = MPFourier(len(g["mpfourier/freqs"]))
    fourier.load_state_dict({name: g.tensor(f"mpfourier/{name}") for name in ("freqs", "phases")})
    torch.testing.assert_close(
        fourier(g.tensor("mpfourier/t")), g.tensor("mpfourier/out"), rtol=1e-4, atol=1e-5
    )
    g = later("scm_net")
    expected = g.tensor("positional/edm2_scaled_sqrt2")
    features = MPPositional(expected.shape[1]).double()
    torch.testing.assert_close(features(g.tensor("positional/t").double()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pixel_norm(g.tensor("fn/x")), g.tensor("fn/pixel_norm"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_sizes_are_kept(kernel):
    torch.manual_seed(0)
    a, b = (torch.randn(64, 64, *[16] * (2 * bool(kernel)), dtype=torch.float64) for _ in range(2))

    def size(x):
        return x.square().mean().sqrt().item()

    conv = MPConv(64, 64, kernel).double()
    inner = conv(a)[..., 1:-1, 1:-1] if kernel else conv(a)  # the border meets zeros
    for made in (
        inner,
        mp_silu(a),
        mp_sum(a, b, 0.3),
        mp_cat(a, b, 0.7),
        normalize(7 * a),
        mp_sum(a, b, 0.5),
    ):
        assert size(made) == pytest.approx(1, abs=0.03)
    longer = layer(3 * conv.weight.detach().float()).double()
    torch.testing.assert_close(longer(a), conv(a), rtol=1e-3, atol=1e-3)
    features = MPFourier(4096)(torch.linspace(-2, 1, 7))
    assert size(features) == pytest.approx(1, abs=0.03)


def test_normalisation_has_derivatives_where_everything_is_zero():
    x, tangent = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    value, moved = torch.func.jvp(lambda x: normalize(x, dim=1), (x,), (tangent,))
    assert not value.any()
    torch.testing.assert_close(moved, tangent / 1e-4)
    x.requires_grad_()
    normalize(x, dim=1).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_normalises_in_fp32(dtype):
    x = 300 * torch.randn(2, 64, 8, 8).to(dtype)  # squares overflow fp16
    out = normalize(x, dim=1)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), normalize(x.float(), dim=1), rtol=2e-2, atol=1e-2)
    conv = MPConv(64, 8, 3)
    torch.testing.assert_close(conv(out).float(), conv(out.float()), rtol=5e-2, atol=5e-2)
    assert math.isclose(F.silu(torch.randn(10**6)).square().mean().sqrt(), 0.596, rel_tol=1e-2)
