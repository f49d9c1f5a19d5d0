"""Master weights, loss scale, skipped steps."""

import pytest
import torch

from cm.errors import UserError
from cm.training.ema import EmaBank, parse_ema_rates
from cm.training.meters import LossMeter
from cm.training.mixed_precision import MIN_LG_LOSS_SCALE, MasterWeights, MixedPrecisionTrainer
from tests.helpers.models import tiny_unet


def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([10.0, -200.0])


def step(trainer, opt, scale=1.0):
    x, t = inputs()
    trainer.zero_grad()
    trainer.backward((trainer.model(x, t) ** 2).mean() * scale)
    return trainer.optimize(opt)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_masters_are_made_before_rounding_and_stay_fp32(precision):
    model = tiny_unet()
    exact = [p.detach().clone() for p in model.parameters()]
    weights = MasterWeights(model, precision)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(exact, weights.master_params))
    assert any(p.dtype != torch.float32 for p in weights.model_params)
    assert all(v.dtype == torch.float32 for v in weights.state_dict().values())


def test_fp32_masters_are_the_parameters():
    model = tiny_unet()
    assert all(a is b for a, b in zip(MasterWeights(model).master_params, model.parameters()))


def test_state_dict_round_trip_keeps_fp32_digits():
    source, other = MasterWeights(tiny_unet(), "bf16"), MasterWeights(tiny_unet(), "bf16")
    with torch.no_grad():
        for p in source.master_params:
            p.add_(torch.randn_like(p) * 1e-5)
    source.to_model()
    other.load(source.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(source.master_params, other.master_params))
    assert all(torch.equal(a, b) for a, b in zip(source.model_params, other.model_params))


def test_small_updates_accumulate_in_the_masters():
    weights = MasterWeights(tiny_unet(), "bf16")
    before = [p.clone() for p in weights.model_params]
    with torch.no_grad():
        for _ in range(64):
            torch._foreach_add_(weights.master_params, 1e-4)
    weights.to_model()
    moved = [(a - b).abs().max() for a, b in zip(weights.model_params, before)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_steps_follow_fp32(precision):
    reference, half = tiny_unet(), tiny_unet()
    trainers = [
        MixedPrecisionTrainer(model=reference),
        MixedPrecisionTrainer(model=half, precision=precision, initial_lg_loss_scale=8),
    ]
    moves = []
    for trainer in trainers:
        start = [p.detach().clone() for p in trainer.master_params]
        opt = torch.optim.SGD(trainer.master_params, lr=1e-3)
        assert step(trainer, opt)
        moves.append(torch.cat([(p - s).flatten() for p, s in zip(trainer.master_params, start)]))
    cosine = torch.nn.functional.cosine_similarity(*moves, dim=0)
    assert cosine > 0.999 if precision == "fp16" else cosine > 0.98
    assert trainers[0].grad_norm.item() == pytest.approx(trainers[1].grad_norm.item(), rel=0.03)


def test_loss_scale_grows_on_good_steps_and_falls_on_bad_ones():
    trainer = MixedPrecisionTrainer(
        model=tiny_unet(), use_fp16=True, fp16_scale_growth=0.25, initial_lg_loss_scale=8
    )
    opt = torch.optim.SGD(trainer.master_params, lr=1e-3)
    assert step(trainer, opt) and trainer.lg_loss_scale == 8.25
    before = [p.detach().clone() for p in trainer.master_params]
    assert not step(trainer, opt, scale=1e30)
    assert trainer.lg_loss_scale == 7.25
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.master_params))
    assert all(p.grad is None for p in (*trainer.model_params, *trainer.master_params))


def test_loss_scale_has_a_floor():
    trainer = MixedPrecisionTrainer(
        model=tiny_unet(), use_fp16=True, initial_lg_loss_scale=MIN_LG_LOSS_SCALE + 0.5
    )
    opt = torch.optim.SGD(trainer.master_params, lr=1e-3)
    for _ in range(3):
        assert not step(trainer, opt, scale=float("nan"))
    assert trainer.lg_loss_scale == MIN_LG_LOSS_SCALE


def test_fp32_skips_bad_gradients_too():
    trainer = MixedPrecisionTrainer(model=tiny_unet())
    opt = torch.optim.SGD(trainer.master_params, lr=1e-3)
    before = [p.detach().clone() for p in trainer.master_params]
    assert not step(trainer, opt, scale=float("inf"))
    assert (
        all(torch.equal(a, b) for a, b in zip(before, trainer.master_params)) and trainer.lg_loss_scale == 0
    )


def test_gradient_clipping_bounds_the_step():
    trainer = MixedPrecisionTrainer(model=tiny_unet(), grad_clip=1e-3)
    start = [p.detach().clone() for p in trainer.master_params]
    assert step(trainer, torch.optim.SGD(trainer.master_params, lr=1.0))
    moved = torch.cat([(p - s).flatten() for p, s in zip(trainer.master_params, start)]).norm()
    assert trainer.grad_norm > 2e-3 and moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_norms_are_those_before_the_step():
    trainer = MixedPrecisionTrainer(model=tiny_unet())
    norm = torch.cat([p.detach().flatten() for p in trainer.master_params]).norm()
    step(trainer, torch.optim.SGD(trainer.master_params, lr=1.0))
    assert trainer.param_norm.item() == pytest.approx(norm.item(), rel=1e-5)


def test_unknown_precision_and_networks_without_a_torso():
    with pytest.raises(UserError, match="precision"):
        MasterWeights(tiny_unet(), "fp8")
    with pytest.raises(UserError, match="half-precision"):
        MasterWeights(torch.nn.Linear(2, 2), "fp16")


def test_ema_bank_rates_and_warmup():
    p = [torch.zeros(2)]
    bank = EmaBank(p, "0.5,0.9")
    bank.update([torch.ones(2)], 0)
    assert [c[0][0].item() for c in bank.copies] == pytest.approx([0.5, 0.1])
    assert bank.slowest == 0.9
    warm = EmaBank(p, 0.99, warmup=True)
    warm.update([torch.ones(2)], 0)
    assert warm.copies[0][0][0].item() == pytest.approx(1 - 1 / 10)
    warm.reset([torch.full((2,), 7.0)])
    assert warm.copies[0][0][0] == 7


@pytest.mark.parametrize("rates", [0.9, 1, "0.9", "0.9,0.99", [0.9, 0.99]])
def test_ema_rates_in_any_form(rates):
    assert parse_ema_rates(rates)[0] in (0.9, 1.0)


@pytest.mark.parametrize("rates", ["x", "1.5", "", "-0.1"])
def test_bad_ema_rates(rates):
    with pytest.raises(UserError, match="--ema_rate"):
        parse_ema_rates(rates)


def test_meter_averages_and_buckets_by_true_noise_level():
    meter = LossMeter(0.002, 80.0)
    t = torch.tensor([0.002, 0.01, 0.1, 1.0, 79.0, 200.0])
    meter.update({"loss": torch.tensor([1.0, 3.0, 5.0, 7.0, 8.0, 10.0])}, t, torch.ones(6))
    means = meter.read()
    assert means["loss"] == pytest.approx(34 / 6)
    assert [means[f"loss_q{q}"] for q in range(4)] == [2.0, 5.0, 7.0, 9.0]
    assert meter.read() == {}


def test_meter_applies_importance_weights_and_skips_empty_buckets():
    meter = LossMeter(0.002, 80.0)
    meter.update({"loss": torch.tensor([2.0])}, torch.tensor([80.0]), torch.tensor([3.0]))
    assert meter.read() == {"loss": 6.0, "loss_q3": 6.0}
