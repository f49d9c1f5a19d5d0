"""The classifier's network: pooling by hand, layout, derivatives for guidance, bad input."""

import pytest
import torch
from torch.testing import assert_close

from cm.networks.classifier import AttentionPool2d, EncoderUNetModel
from cm.networks.unet import UNetModel


def small(**changes) -> EncoderUNetModel:
    """A classifier of 8 px images into 5 classes."""
    options = dict(
        image_size=8,
        in_channels=3,
        model_channels=32,
        out_channels=5,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_head_channels=16,
        resblock_updown=True,
    )
    torch.manual_seed(0)
    return EncoderUNetModel(**{**options, **changes})


def test_attention_pooling_by_hand():
    torch.manual_seed(0)
    pool = AttentionPool2d(3, 8, num_heads_channels=4, output_dim=6)
    x = torch.randn(2, 8, 3, 3)
    rows = x.reshape(2, 8, 9)
    rows = torch.cat([rows.mean(2, keepdim=True), rows], 2) + pool.positional_embedding
    q, k, v = pool.qkv_proj(rows).reshape(2, 3, 2, 4, 10).unbind(1)  # (B, heads, 4, 10)
    weights = torch.softmax(torch.einsum("bhc,bhcl->bhl", q[..., 0], k) / 2, dim=-1)
    pooled = torch.einsum("bhl,bhcl->bhc", weights, v).reshape(2, 8, 1)
    assert_close(pool(x), pool.c_proj(pooled)[..., 0], rtol=1e-4, atol=1e-5)


def test_encoder_has_the_blocks_of_the_u_net():
    options = dict(
        num_res_blocks=2, attention_resolutions=(1, 2), channel_mult=(1, 1, 2), num_head_channels=32
    )
    unet = UNetModel(16, 3, 32, 3, resblock_updown=True, **options)
    classifier = small(image_size=16, **options)
    shapes = {n: p.shape for n, p in unet.named_parameters() if not n.startswith(("output_blocks", "out."))}
    own = {n: p.shape for n, p in classifier.named_parameters()}
    assert {n: s for n, s in own.items() if not n.startswith("out.")} == shapes
    assert own["out.2.positional_embedding"] == (64, 17)
    assert own["out.2.qkv_proj.weight"] == (192, 64, 1) and own["out.2.c_proj.weight"] == (5, 64, 1)


def test_logits_depend_on_image_and_time_and_have_gradients():
    model = small()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    t = torch.tensor([0.0, 900.0])
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    logits = model(x, t)
    assert logits.shape == (2, 5) and logits.dtype == torch.float32
    assert not torch.allclose(logits, model(x, t.flip(0)))
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 1].sum(), x)
    step = torch.zeros_like(x)
    step[1, 2, 3, 4] = 1e-5
    double = model.double()
    up, down = (
        double((x + s).double(), t.double()).log_softmax(1)[1, 1] for s in (step.double(), -step.double())
    )
    assert gradient[1, 2, 3, 4].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-3, abs=1e-6)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) .* \(B, 3, 8, 8\)"):
        small()(torch.zeros(2, 3, 16, 16), torch.zeros(2))
    with pytest.raises(ValueError, match=r"times of shape \(1,\)"):
        small()(torch.zeros(2, 3, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="image_size = 7"):
        small(image_size=7)
