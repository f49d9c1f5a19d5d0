"""TCM: proposals, pairs and the stage-2 loss against tests/golden_later/tcm.npz; which model stage 1 may be."""

import json
import math
from dataclasses import replace

import pytest
import torch

import cm
from cm.commands import edit
from cm.commands.cli import parse_config
from cm.commands.sample import run_image_sample
from cm.config.derived import last_known, lowest_level
from cm.config.inherit import adopt_teacher, inherit
from cm.config.scripts import CmTrainConfig, SampleConfig, SearchConfig
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.precond import boundary_precond
from cm.diffusion.proposals import Proposal
from cm.errors import UserError
from cm.objectives.base import Draw, Roles
from cm.objectives.curricula import Ratio
from cm.objectives.distances import PseudoHuber
from cm.objectives.pairs import draw_level, lower_level
from cm.objectives.truncated import LOWEST, TruncatedObjective, TruncatedPairs
from cm.seeding import StepRandom
from cm.training.factory import create_objective
from cm.training.roles import load_teacher
from tests.helpers import later
from tests.helpers.golden_data import later as golden
from tests.helpers.later import pair_weight
from tests.helpers.models import save_consistency_model

TCM = golden("tcm")
ZERO = boundary_precond("zero", sigma_data=0.5, sigma_min=0.002, time_scale=1.0)


def close(found, expected, rtol=1e-6, atol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol
    )


def proposal(about):
    law = {"mean": about["P_mean"], "std": about["P_std"], "low": about["lower"], "high": about["upper"]}
    return Proposal(**law, df=about.get("df", math.inf))


@pytest.mark.parametrize("name", TCM.config["proposals"])
def test_proposals(name):
    law, at = proposal(TCM.config["proposals"][name]), TCM.tensor(f"proposal/{name}/grid_log_t")
    close(law.density(at), TCM[f"proposal/{name}/pdf_log_t"], rtol=1e-7)
    close(law.distribution(at), TCM[f"proposal/{name}/cdf_log_t"], rtol=1e-7, atol=1e-12)
    u = TCM.tensor(f"proposal/{name}/u")
    close(law.inverse(u), TCM[f"proposal/{name}/log_t"], rtol=1e-6, atol=1e-9)
    close(law.distribution(law.inverse(u)), u, rtol=1e-10, atol=1e-12)


def test_a_normal_law_cut_far_away_is_the_whole_one():
    u = torch.linspace(0.001, 0.999, 50)
    close(Proposal(0.3, 0.7, -20, 20).inverse(u), Proposal(0.3, 0.7).inverse(u), rtol=1e-9, atol=1e-12)
    narrow = Proposal(0.3, 1e-3, math.log(0.002), math.log(80)).inverse(u)
    close(narrow, Proposal(0.3, 1e-3).inverse(u), rtol=1e-7)


def test_levels_stay_in_the_range():
    law = Proposal(0.0, 0.2, 0.0, math.log(80), df=0.01)
    t = draw_level(law, StepRandom(0, 0, 0, 20000, 20000))
    assert t.min() >= 1 and t.max() <= 80.001
    assert t.median().item() == pytest.approx(1.22, abs=0.02)
    assert (t < 2).double().mean().item() == pytest.approx(0.70, abs=0.02)
    assert (t > 10).double().mean().item() == pytest.approx(0.10, abs=0.01)


def test_step_sizes():
    t = TCM.tensor("delta/t")
    for key in sorted({k.split("/")[1] for k in TCM.keys("delta/ratio") if k.endswith("/r")}):
        r = lower_level(t, float(key.removeprefix("ratio")), floor=LOWEST)
        close(r, TCM[f"delta/{key}/r"], rtol=1e-6, atol=1e-12)
    ratio = Ratio(2.0, 1, 0.999)
    for stage, expected in zip(TCM["delta/stage"], TCM["delta/ratio_q2_limit0p999"]):
        if stage >= 0:
            assert ratio(int(stage)) == pytest.approx(float(expected), rel=1e-12)


def pairs(case):
    law = Proposal(0.0, 0.2, 0.0, math.log(80), df=0.01)
    return TruncatedPairs(
        law, lambda step: case["ratio"], TCM.config["transition_t"], 0.25, case["boundary_weight"]
    )


def run_case(case, dtype, change=lambda draw, objective: (draw, objective)):
    """(losses, total, student) of a stored case, its gradients taken."""
    key = f"case/{case['id']}"
    student, stage1 = (later.network(TCM, name, dtype, "stage1/student") for name in ("student", "stage1"))
    weight = "inverse-gap" if case["weighting"] == "default" else "karras"
    objective = TruncatedObjective(
        PseudoHuber(case["c"]), lambda t, r: pair_weight(weight, t, r, 0.5), pairs=pairs(case)
    )
    boundary, t = TCM.tensor(f"{key}/boundary"), TCM.tensor(f"{key}/t").to(dtype)
    # fp32 knows nothing between t' and t' + 1e-8
    t = torch.where(boundary, torch.full_like(t, TCM.config["transition_t"]), t)
    count = int(boundary.sum())
    weights = torch.where(boundary, case["boundary_weight"] * len(t) / count, len(t) / (len(t) - count))
    draw = objective.pairs.at(t, 0, TCM.tensor("data/noise").to(dtype), weights.to(dtype))
    draw, objective = change(draw, objective)
    roles = Roles(Denoiser(student, ZERO), teacher=Denoiser(stage1, ZERO))
    x0 = TCM.tensor("data/x0").to(dtype)
    loss = objective.forward(roles, x0, draw, 0)["loss"]
    total = (loss * draw.weight).mean()
    total.backward()
    return loss.detach(), total.item(), student, draw


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", TCM.config["cases"], ids=lambda c: c["id"])
def test_stage_two_losses(case, dtype):
    key = f"case/{case['id']}"
    loss, total, student, draw = run_case(case, dtype)
    close(draw.r, TCM[f"{key}/r"], rtol=1e-6 if dtype == torch.float64 else 1e-5)
    assert ((draw.r < TCM.config["transition_t"]) == TCM.tensor(f"{key}/uses_stage1_as_target")).all()
    rtol, grads = (2e-6, 1e-6) if dtype == torch.float64 else (5e-3, 5e-3)
    close(loss, TCM[f"{key}/loss_per_sample"], rtol=rtol)
    close(total, TCM[f"{key}/total_w0p1"], rtol=rtol)
    later.check_gradients(TCM, f"{key}/grad_of_total/", student, grads)


@pytest.mark.parametrize("fault", ["student below", "stage 1 everywhere", "boundary weight forgotten"])
def test_planted_faults_are_seen(fault):
    def change(draw, objective):
        if fault == "student below":
            objective.pairs = replace(objective.pairs, transition=-1.0)
        elif fault == "stage 1 everywhere":
            objective.pairs = replace(objective.pairs, transition=1e9)
        else:
            draw = replace(draw, weight=torch.ones_like(draw.weight))
        return draw, objective

    wrong = 0
    for case in TCM.config["cases"]:
        _, total, _, _ = run_case(case, torch.float64, change)
        wrong += abs(total / float(TCM[f"case/{case['id']}/total_w0p1"]) - 1) > 1e-3
    assert wrong == len(TCM.config["cases"])


def test_boundary_rows_are_an_exact_share_of_the_global_batch():
    law = Proposal(0.0, 0.2, 0.0, math.log(80), df=0.01)
    for batch, share, count in ((16, 0.25, 4), (30, 0.25, 7), (3, 0.25, 0), (16, 0.0, 0)):
        p = TruncatedPairs(law, Ratio(1000.0, 0, 0.999), 1.0, share, 0.1)
        draw = p.draw(torch.zeros(batch, 2), 0, StepRandom(0, 0, 0, batch, batch))
        at = draw.t == 1.0
        assert int(at.sum()) == count and (draw.t[~at] > 1).all() and (draw.r[at] < 1).all()
        losses = torch.rand(batch)
        total = (losses * draw.weight).mean()
        expected = losses[~at].mean() + (0.1 * losses[at].mean() if count else 0)
        torch.testing.assert_close(total, expected)
        part = p.draw(torch.zeros(2, 2), 0, StepRandom(0, 0, 1, 3, batch))
        assert torch.equal(part.t, draw.t[1:3]) and torch.equal(part.weight, draw.weight[1:3])


def test_the_stage_one_model_drops_out_under_the_students_masks():
    """With equal weights and equal ends all images are equal, whichever network the target comes from."""
    nets = [later.network(TCM, "student", torch.float32, "stage1/student") for _ in range(2)]
    for net in nets:
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
    nets[0].train()
    t = torch.full((4,), 2.0)
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = Draw(t, x0, torch.ones(4), t.clone())
    for transition in (1.0, 9.0):
        p = replace(pairs(TCM.config["cases"][0]), transition=transition)
        objective = TruncatedObjective(PseudoHuber(0.0), lambda t, r: torch.ones_like(t), pairs=p)
        roles = Roles(Denoiser(nets[0], ZERO), teacher=Denoiser(nets[1], ZERO))
        assert not objective.forward(roles, x0, draw, 0)["loss"].any()


# --- which model stage 1 may be ---

FLAGS = ["--training_mode", "tcm", "--boundary", "zero", "--loss_norm", "pseudo-huber"]


def config(*argv):
    return parse_config(CmTrainConfig, [*FLAGS, *argv])


def test_objective_from_flags():
    objective = create_objective(config("--transition_t", "0.5", "--t_df", "inf", "--p_std", "2"))
    p = objective.pairs
    assert objective.needs_teacher and not objective.needs_target
    assert (p.law.low, p.law.df, p.law.std, p.transition) == (math.log(0.5), math.inf, 2.0, 0.5)
    assert p.ratio(10**6) == 0.999


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--boundary", "skip"], "--training_mode tcm needs --boundary zero, got skip"),
        (["--transition_t", "80"], r"--transition_t 80.0 must be below --sigma_max 80.0"),
        (["--transition_t", "0"], "--transition_t must be positive"),
        (["--boundary_share", "1"], "--boundary_share must be below 1"),
    ],
)
def test_bad_flags(argv, match):
    with pytest.raises(UserError, match=match):
        config(*argv)


def test_stage_one_must_be_a_consistency_model_with_the_same_boundary(tmp_path):
    stage1, denoiser, skip = (tmp_path / f"{name}.pt" for name in ("stage1", "edm", "skip"))
    ect = {"training_mode": "consistency_training", "pairs": "ratio", "loss_norm": "pseudo-huber"}
    save_consistency_model(stage1, boundary="zero", **ect)
    c = config("--teacher_model_path", str(stage1))
    adopted = adopt_teacher(c, load_teacher(c.teacher_model_path, "consistency").config, str(stage1))
    assert (adopted.training_mode, adopted.boundary, adopted.loss_norm) == ("tcm", "zero", "pseudo-huber")
    save_consistency_model(skip, training_mode="consistency_training", loss_norm="l2")
    c = config("--teacher_model_path", str(skip))
    with pytest.raises(UserError, match=r"identity at another noise level.*--boundary skip, not zero"):
        adopt_teacher(c, load_teacher(c.teacher_model_path, "consistency").config, str(skip))
    save_consistency_model(
        denoiser, training_mode="progdist", scale_mode="progdist", start_scales=4, loss_norm="l2"
    )
    with pytest.raises(UserError, match=r"was trained by progdist: a teacher is a consistency model"):
        load_teacher(str(denoiser), "consistency")
    save_consistency_model(stage1, boundary="zero", training_mode="tcm", loss_norm="pseudo-huber")
    c = config("--teacher_model_path", str(stage1))
    with pytest.raises(UserError, match="by tcm itself, above its transition_t only"):
        adopt_teacher(c, load_teacher(c.teacher_model_path, "consistency").config, str(stage1))


# --- sampling stays above t' ---


def test_levels_that_a_model_knows():
    c = config("--transition_t", "1.5")
    assert lowest_level(c) == 1.5 and lowest_level(replace(c, training_mode="consistency_training")) == 0.002
    for steps in (2, 18, 40):
        levels = karras_sigmas(steps, c.sigma_min, c.sigma_max, c.rho)
        assert last_known(c, steps) == int((levels >= 1.5).sum()) - 1
        assert last_known(replace(c, training_mode="consistency_training"), steps) == steps - 1
    exactly = config("--transition_t", repr(levels[13].item()))
    assert last_known(exactly, 40) == 13


def test_a_model_is_not_asked_below_its_transition(tmp_path):
    path, out = str(tmp_path / "tcm.pt"), tmp_path / "out"
    save_consistency_model(
        path, boundary="zero", training_mode="tcm", loss_norm="pseudo-huber", transition_t=2.0, in_channels=1,
        class_cond=False,
    )  # fmt: skip

    def sample(*argv):
        common = ["--model_path", path, "--num_samples", "1", "--out_dir", str(out), "--overwrite", "True"]
        run_image_sample(parse_config(SampleConfig, [*common, *argv]))
        return json.loads(next(out.glob("*.json")).read_text())["sigmas"]

    assert sample("--sampler", "multistep")[1] >= 2, "two steps by default"
    assert sample("--sampler", "multistep", "--sigmas", "80,2")[1] == 2
    for argv in (["--sigmas", "80,1.9"], ["--ts", "0,12"]):
        with pytest.raises(UserError, match=r"noise level .*: the model was trained from 2 up only") as error:
            sample("--sampler", "multistep", *argv)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--transition_t 0.5 contradicts .* trained with 2.0"):
        sample("--training_mode", "tcm", "--transition_t", "0.5")
    model = cm.load(path)
    assert model.sample(1, steps=4).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match="from 2 up only"):
        model.denoise(torch.zeros(1, 1, 8, 8), 0.5)
    levels = edit.noise_levels(model.edit._config("inpaint"))
    assert (levels[:-1] >= 2).all() and levels[-1] == pytest.approx(0.002)
    search = inherit(parse_config(SearchConfig, ["--model_path", path]), model._model.file.config, path)
    assert int(search.end) == last_known(search, search.steps) < search.steps - 1


def test_without_stage_one(tmp_path):
    from cm.config.validation import require_inputs

    with pytest.raises(UserError, match="--training_mode tcm needs --teacher_model_path"):
        require_inputs(config("--data_dir", str(tmp_path)))
    assert json.dumps(
        TCM.config["boundary_rule"]
    )  # the rule that the numbers were made by is stored with them
