"""iCT and ECT: curricula, pairs, distance and losses against the numbers of tests/golden_later and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.scripts import CmTrainConfig
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid, karras_sigmas
from cm.diffusion.precond import ConsistencyPrecond, boundary_precond
from cm.diffusion.proposals import Proposal
from cm.errors import UserError
from cm.objectives.base import Draw, Roles
from cm.objectives.consistency import ConsistencyObjective, at_level, heun_step
from cm.objectives.curricula import EmaAndScales, Ratio, num_scales_doubling
from cm.objectives.distances import PseudoHuber, make_distance
from cm.objectives.pairs import LogNormalGridPairs, RatioPairs, lower_level, pair_at
from cm.sampling.consistency import sample_multistep, sample_onestep
from cm.seeding import StepRandom
from cm.training.factory import create_objective
from tests.helpers import later
from tests.helpers.analytic import Gaussian, free
from tests.helpers.golden_data import later as golden
from tests.helpers.later import pair_weight

ICT, ECT = golden("ict"), golden("ect")
SCHEDULE = EmaAndScales("fixed", 0.0, "fixed", 18, 18, 1, 1)
FLAT = lambda t, r=None: torch.ones_like(t)  # noqa: E731


def close(found, expected, rtol=1e-6, atol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol
    )


def ids(g, prefix):
    """Sets below a prefix: `prefix/<set>/...`."""
    return sorted({key.split("/")[1] for key in g.keys(prefix)})


# --- schedules and draws ---


@pytest.mark.parametrize("name", [k for k in ids(ICT, "curriculum/") if "_" in k])
def test_curriculum_table(name):
    total, start, end = map(int, name.split("_"))
    steps, expected = ICT[f"curriculum/{name}/k"], ICT[f"curriculum/{name}/num_scales"]
    assert [num_scales_doubling(int(k), start, end, total) for k in steps] == expected.tolist()
    assert max(expected) <= end + 1


def test_the_schedule_of_the_flags():
    flags = ["--scale_mode", "doubling", "--start_scales", "10", "--end_scales", "1280"]
    c = parse_config(CmTrainConfig, [*flags, "--total_training_steps", "400000", "--pairs", "lognormal-grid"])
    objective = create_objective(replace(c, training_mode="consistency_training", loss_norm="l2"))
    stages = [objective.num_scales(50000 * k) for k in range(8)]
    assert stages == [11, 21, 41, 81, 161, 321, 641, 1281] and objective.num_scales(10**9) == 1281
    assert objective.num_scales(49999) == 11 and not objective.needs_target


@pytest.mark.parametrize("name", ids(ICT, "grid/"))
def test_grid_and_weights(name):
    n = int(name)
    levels = karras_sigmas(n, 0.002, 80.0).flip(0)
    close(levels, ICT[f"grid/{name}/sigmas"])
    close(pair_weight("inverse-gap", levels[1:], levels[:-1], 0.5), ICT[f"grid/{name}/weight"])


@pytest.mark.parametrize("name", ids(ICT, "pmf/"))
def test_interval_probabilities(name):
    n, mean, std = name.split("_")
    p = LogNormalGridPairs(Grid(), float(mean), float(std)).probabilities(int(n)).flip(0)
    close(p, ICT[f"pmf/{name}/p"])
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    logs = karras_sigmas(int(n), 0.002, 80.0).flip(0).log()
    for side, ends in (("upper", logs[1:]), ("lower", logs[:-1])):
        close((p * ends).sum(), ICT[f"pmf/{name}/E_ln_sigma_{side}"])


def test_draws_have_the_interval_probabilities():
    pairs, n, count = LogNormalGridPairs(Grid(), -1.1, 2.0), 11, 40000
    draw = pairs.draw(torch.zeros(count, 1), 3, n, StepRandom(0, 3, 0, count, count))
    found = torch.bincount(draw.index, minlength=n - 1) / count
    p = pairs.probabilities(n).float()
    assert ((found - p).abs() < 5 * (p / count).sqrt() + 1e-4).all()
    levels = karras_sigmas(n, 0.002, 80.0).float()
    close(draw.t, levels[draw.index])
    close(draw.r, levels[draw.index + 1])
    part = pairs.draw(torch.zeros(5, 1), 3, n, StepRandom(0, 3, 7, 12, count))
    assert torch.equal(part.index, draw.index[7:12]), "rows belong to the global batch"


@pytest.mark.parametrize("case", ECT.config["map_cases"], ids=lambda c: c["id"])
def test_ratio_map(case):
    t = ECT.tensor("map/t").double()
    ratio = Ratio(case["q"], interval=1)(case["stage"])
    k = 0 if case["adj"] == "const" else case["k"]  # n(t) = 1
    close(lower_level(t, ratio, k, case["b"]), ECT[f"map/{case['id']}/r"], rtol=1e-6, atol=1e-12)
    close(ratio, ECT[f"map/{case['id']}/ratio_attribute"])


def test_near_levels_of_the_first_stage_have_no_lower_end():
    """q = 2: r = 0 exactly below ln 7; q = 256 never."""
    t = torch.tensor([0.01, 1.0, math.log(7) - 1e-3, math.log(7) + 1e-3, 80.0])
    assert (lower_level(t, 0.5) > 0).tolist() == [False, False, False, True, True]
    assert (lower_level(t, 1 - 1 / 256) > 0).all()


@pytest.mark.parametrize("name", ids(ECT, "stage/"))
def test_stages(name):
    ratio = Ratio(2.0, interval=25000)
    for step, stage in zip(ECT[f"stage/{name}/iteration"], ECT[f"stage/{name}/stage_rule"]):
        assert ratio(int(step)) == 1 - 2.0 ** -(int(stage) + 1)
    assert Ratio(2.0, 25000, 0.999)(10**7) == 0.999 and Ratio(256.0, 0)(10**7) == 1 - 1 / 256


def test_noise_levels():
    for mean, std, key in ((-1.1, 2.0, "t_m1p1_2"), (-0.8, 1.6, "t_m0p8_1p6")):
        close(torch.exp(mean + std * ECT.tensor("tsample/normal").double()), ECT[f"tsample/{key}"], rtol=1e-5)
    pairs = RatioPairs(Proposal(-1.1, 2.0), Ratio(2.0, 10))
    draw = pairs.draw(torch.zeros(4000, 1), 25, 0, StepRandom(0, 25, 0, 4000, 4000))
    normal = StepRandom(0, 25, 0, 4000, 4000).normal()
    close(draw.t, torch.exp(-1.1 + 2.0 * normal), rtol=1e-6)
    assert torch.equal(draw.r, lower_level(draw.t, 1 - 2**-3)) and (draw.r < draw.t).all()


# --- distance ---


@pytest.mark.parametrize("name", [s for s in ids(ICT, "huber/") if not s.startswith("c_rule")])
def test_pseudo_huber(name):
    for which in sorted({key.split("/")[2] for key in ICT.keys(f"huber/{name}/c")} | {"rule"}):
        a, b = ICT.tensor(f"huber/{name}/a"), ICT.tensor(f"huber/{name}/b")
        a.requires_grad_()
        c = float(ICT[f"huber/{name}/{which}/c"])
        distance = make_distance("pseudo-huber", c=-1.0 if which == "rule" else c)
        value = distance(a, b)
        close(value.detach(), ICT[f"huber/{name}/{which}/value"], rtol=1e-7)
        (grad,) = torch.autograd.grad(value.sum(), a)
        close(grad, ICT[f"huber/{name}/{which}/grad_a"], rtol=1e-7, atol=1e-12)


def test_the_rule_for_c():
    for d, c in zip(ICT["huber/c_rule_dims"], ICT["huber/c_rule"]):
        image = torch.zeros(1, int(d), 1, 1)
        assert PseudoHuber()._width(image) == pytest.approx(float(c), rel=1e-7)


@pytest.mark.parametrize("c", [-1.0, 0.0, 1e-8, 0.06])
def test_equal_images_have_distance_and_gradient_zero(c):
    a = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = PseudoHuber(c)(a, a.detach().clone())
    value.sum().backward()
    assert not value.any() and not a.grad.any()


def test_close_images_keep_their_digits():
    a = torch.zeros(1, 3, 8, 8)
    b = a + 1e-6
    exact = 192 * 1e-12 / (2 * 0.06)
    assert PseudoHuber(0.06)(a, b).item() == pytest.approx(exact, rel=1e-5)
    plain = (192 * 1e-12 + 0.06**2) ** 0.5 - 0.06
    assert np.float32(plain) != 0 and (b.square().sum() + 0.06**2).sqrt().item() - 0.06 != pytest.approx(
        exact, rel=1e-2
    ), "the printed form loses them"


def test_curvature_of_the_distance():
    f, v = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    distance = PseudoHuber(0.03)
    close(distance.direction(f, v), super(PseudoHuber, distance).direction(f, v), rtol=1e-9)
    with pytest.raises(UserError, match="--huber_c 0"):
        PseudoHuber(0.0).direction(f, v)


# --- losses ---


def objective(weight="inverse-gap", c=-1.0, distillation=False, solver="heun"):
    return ConsistencyObjective(
        SCHEDULE,
        make_distance("pseudo-huber", c=c),
        lambda t, r=None: pair_weight(weight, t, r, 0.5),
        pairs=None,
        distillation=distillation,
        ode_solver=solver,
    )


def run_case(g, case, data, loss, net, precond, dtype, draw):
    """Losses of the stored pairs; gradients of their mean are left in the network."""
    denoiser = Denoiser(net, precond)
    x0 = g.tensor(f"data/{data}/x0").to(dtype)
    terms = loss.forward(Roles(denoiser), x0, draw, 0, **later.labels(g, f"data/{data}", net))
    terms["loss"].mean().backward()
    return terms["loss"].detach()


def far(case):
    """How close the pairs are: tolerances of losses and gradients in fp32, by tests/golden_later/README.md."""
    if case.get("N", 0) >= 321 or case.get("stage", 0) >= 7 or case.get("q") == 256:
        return 5e-3, 5e-3
    near = case.get("N", 0) > 21 or case.get("stage", 0) >= 4
    return (2e-3, 1e-3) if near else (1e-4, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", ICT.config["cases"], ids=lambda c: c["id"])
def test_ict_losses(case, dtype):
    name, key, n = case["net"], f"case/{case['id']}", case["N"]
    net = later.network(ICT, name, dtype)
    index = n - 2 - ICT.tensor(f"{key}/index")  # ours counts from sigma_max
    draw = pair_at(Grid(), n, index, ICT.tensor(f"data/{name}/noise").to(dtype))
    close(draw.t, ICT[f"{key}/t"])
    close(draw.r, ICT[f"{key}/r"])
    draw = replace(draw, t=ICT.tensor(f"{key}/t").to(dtype), r=ICT.tensor(f"{key}/r").to(dtype))
    precond = ConsistencyPrecond(time_scale=1.0)
    loss = run_case(ICT, case, name, objective(c=float(ICT[f"{key}/c"])), net, precond, dtype, draw)
    exact = dtype == torch.float64
    rtol, grad_tolerance = (1e-7, 1e-6) if exact else far(case)
    close(loss, ICT[f"{key}/loss"], rtol=rtol)
    later.check_gradients(ICT, f"{key}/grad_of_mean/", net, grad_tolerance)
    assert (loss / ICT.tensor(f"{key}/loss_elementwise_WRONG") - 1).abs().min() > 0.5, "one norm per image"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", ECT.config["cases"], ids=lambda c: c["id"])
def test_ect_losses(case, dtype):
    key = f"case/{case['id']}"
    edm2 = case["net"] == "edm2"  # its numbers are fp32, its weighting 1 / c_out^2
    data, weight = case["net"], "karras" if edm2 else "inverse-gap"
    if edm2 and dtype == torch.float64:
        pytest.skip("fp32 numbers")
    net = later.network(ECT, case["net"], dtype)
    t = ECT.tensor(f"{key}/t").to(dtype)
    r = lower_level(t, Ratio(case["q"], 1)(case["stage"]), ECT.config["k"], ECT.config["b"])
    close(r, ECT[f"{key}/r"], rtol=1e-6 if dtype == torch.float64 else 1e-5, atol=1e-7)
    draw = Draw(t, ECT.tensor(f"data/{data}/noise").to(dtype), torch.ones_like(t), r.to(dtype))
    precond = boundary_precond("zero", sigma_data=0.5, sigma_min=0.002, time_scale=1.0)
    loss = run_case(ECT, case, data, objective(weight, case["c"]), net, precond, dtype, draw)
    rtol, grad_tolerance = (1e-6, 1e-6) if dtype == torch.float64 else far(case)
    close(loss, ECT[f"{key}/loss"], rtol=rtol)
    later.check_gradients(ECT, f"{key}/grad_of_mean/", net, grad_tolerance)


def test_the_weighting_of_edm2_is_that_of_edm():
    """1 / t^2 + 1 / sigma_data^2 is 1 / c_out^2: row karras."""
    for case in (c for c in ECT.config["cases"] if c["net"] == "edm2"):
        t, r = (ECT.tensor(f"case/{case['id']}/{name}").double() for name in "tr")
        close(pair_weight("karras", t, r, 0.5), ECT[f"case/{case['id']}/weight"], rtol=1e-5)
        close(lower_level(t, Ratio(case["q"], 1)(case["stage"])), r, rtol=1e-5, atol=1e-9)


def test_a_lower_end_at_zero_does_not_ask_the_network():
    def net(x, t):
        assert (t > 0).all()
        return x * float("nan") if (t == 1.0).all() else torch.full_like(x, torch.nan)

    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = at_level(Denoiser(net, free), x, torch.tensor([0.0, 0.0, 0.5]))
    assert torch.equal(found[:2], x[:2]) and found[2].isnan().all()


def test_scalings_and_samples():
    """One function for training and evaluation; the public evaluation shifts by 0.003, which is our sigma_min."""
    zero = boundary_precond("zero", sigma_data=0.5, sigma_min=0.002, time_scale=1.0)
    shifted = ConsistencyPrecond(sigma_min=0.003, time_scale=1.0)
    for precond, key in ((zero, "train_scalings"), (shifted, "eval_scalings_public")):
        c = precond(ECT.tensor(f"{key}/sigma").double())
        close(c.c_skip, ECT[f"{key}/c_skip"], rtol=1e-5)
        close(c.c_out, ECT[f"{key}/c_out"], rtol=1e-5, atol=1e-8)
    net = later.network(ECT, "ddpmpp", torch.float32)

    class Noise:
        def randn_like(self, x):
            return ECT.tensor("sample/noise")

    for precond, key in ((zero, "train_scalings"), (shifted, "public_eval_scalings")):
        denoiser = Denoiser(net, precond)
        with torch.no_grad():
            start = 80 * ECT.tensor("sample/latents")
            one = sample_onestep(denoiser, start, torch.tensor([80.0]))
            two = sample_multistep(denoiser, start, torch.tensor([80.0, 0.821, 0.0]), Noise(), sigma_min=0.0)
        close(one, ECT[f"sample/{key}/one_step"], rtol=1e-4, atol=1e-5)
        close(two, ECT[f"sample/{key}/two_step_mid0p821"], rtol=1e-4, atol=1e-5)


# --- closed forms ---


def test_the_exact_consistency_function_is_a_minimum_of_distillation_as_r_nears_t():
    """With the exact denoiser as teacher the loss of the exact function is of third order in the gap (Heun)."""
    exact = Gaussian(eps=0.0)
    losses = []
    for gap in (0.2, 0.1, 0.05):
        x0 = exact.sample((64, 1, 4, 4), torch.Generator().manual_seed(0))
        t = torch.linspace(0.5, 3.0, 64, dtype=torch.float64)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        draw = Draw(t, noise, torch.ones_like(t), t * (1 - gap))
        student = Denoiser(lambda x, s: exact.flow(x, s, torch.tensor(0.0)), free)
        roles = Roles(student, teacher=Denoiser(exact.denoise, free))
        losses.append(objective(c=0.0, distillation=True).forward(roles, x0, draw, 0)["loss"].mean().item())
    orders = np.log2(np.array(losses[:-1]) / np.array(losses[1:]))
    assert (orders > 1.8).all(), orders  # distance of order 3, weight 1 / gap


def test_training_has_no_gradient_at_the_exact_function_as_r_nears_t():
    """ECT with squared distance: E over x0 given x_t. The gradient of f's offset and scale vanishes with the gap."""
    exact = Gaussian(mean=0.3, std=0.5, eps=0.0)
    count = 200000
    slopes = []
    for gap in (0.4, 0.1):
        generator = torch.Generator().manual_seed(2)
        x0 = exact.sample((count, 1), generator)
        noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        t = torch.full((count,), 1.0, dtype=torch.float64)
        draw = Draw(t, noise, torch.ones_like(t), t * (1 - gap))
        theta = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)

        def student(x, s, theta=theta):
            return theta[0] + theta[1] * exact.flow(x, s, torch.tensor(0.0))

        loss = ConsistencyObjective(
            SCHEDULE, make_distance("l2"), lambda t, r: 1 / (t - r), pairs=None, distillation=False
        )
        value = loss.forward(Roles(Denoiser(student, free)), x0, draw, 0)["loss"].mean()
        slopes.append(torch.autograd.grad(value, theta)[0].abs().max().item())
    # First order in the gap: a quarter of the gap, a quarter of the gradient.
    assert slopes[1] < 0.4 * slopes[0] and slopes[1] < 0.03, slopes


def test_a_solvers_step_to_zero_is_eulers():
    exact = Gaussian()
    x = exact.sample((2, 3), torch.Generator().manual_seed(0))
    t, r = torch.tensor([1.0, 1.0]).double(), torch.tensor([0.0, 0.4]).double()
    found = heun_step(exact.denoise, x, t, r)
    torch.testing.assert_close(found[0], exact.denoise(x, t)[0])
    torch.testing.assert_close(found[1], heun_step(exact.denoise, x[1:], t[1:], r[1:])[0])


# --- planted faults and bad input ---


def faulty_losses(fault):
    """The iCT loss of a stored case with a fault, and the stored one."""
    case = ICT.config["cases"][0]
    key, name = f"case/{case['id']}", case["net"]
    net = later.network(ICT, name)
    t, r = (ICT.tensor(f"{key}/{x}") for x in "tr")
    draw = Draw(t, ICT.tensor(f"data/{name}/noise").double(), torch.ones_like(t), r)
    loss = objective(c=float(ICT[f"{key}/c"]))
    if fault == "Huber per element":
        c = float(ICT[f"{key}/c"])
        loss.distance = lambda a, b: (((a - b).square() + c**2).sqrt() - c).flatten(1).mean(1)
    elif fault == "neighbour's weight":
        levels = ICT.tensor(f"grid/{case['N']}/sigmas")
        i = ICT.tensor(f"{key}/index")
        loss.weight = lambda t, r: (
            1 / (levels[(i + 2).clamp_max(case["N"] - 1)] - levels[i + 1]).abs().clamp_min(1e-9)
        )
    else:
        draw = replace(draw, t=r, r=t)
    return run_case(
        ICT, case, name, loss, net, ConsistencyPrecond(time_scale=1.0), torch.float64, draw
    ), ICT.tensor(f"{key}/loss")


@pytest.mark.parametrize("fault", ["Huber per element", "neighbour's weight", "ends exchanged"])
def test_planted_faults_are_seen(fault):
    found, expected = faulty_losses(fault)
    with pytest.raises(AssertionError):
        close(found, expected, rtol=5e-3)


def test_student_and_target_share_their_masks():
    """With dropout and one noise level for both ends the images are equal, and only then."""
    net = later.network(ICT, ICT.config["cases"][0]["net"], torch.float32).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 0.7)
    draw = Draw(t, torch.zeros_like(x0), torch.ones_like(t), t.clone())
    loss = ConsistencyObjective(SCHEDULE, PseudoHuber(0.0), FLAT, pairs=None, distillation=False)
    denoiser = Denoiser(net, ConsistencyPrecond(time_scale=1.0))
    assert not loss.forward(Roles(denoiser), x0, draw, 0)["loss"].any()
    assert (denoiser(x0, t) - denoiser(x0, t)).abs().max() > 1e-3, "another pass has other masks"


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--pairs", "ratio"], "--pairs ratio needs --boundary zero, got skip"),
        (["--huber_c", "-2", "--loss_norm", "pseudo-huber"], "--huber_c must be at least 0, or -1 for unset"),
        (["--huber_c", "0.1"], "--huber_c is for --loss_norm pseudo-huber"),
        (["--scale_mode", "doubling", "--start_scales", "20", "--end_scales", "10"], "--end_scales 10"),
        (["--pairs", "ratio", "--boundary", "zero", "--ratio_q", "1"], "--ratio_q must be above 1"),
        (["--pairs", "ratios"], "--pairs must be one of .*ratio"),
    ],
)
def test_bad_flags(argv, match):
    with pytest.raises(UserError, match=match) as error:
        parse_config(CmTrainConfig, argv)
    assert "\n" not in str(error.value)
