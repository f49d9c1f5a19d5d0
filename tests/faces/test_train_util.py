"""The loops step by step against golden training runs, and their behaviour."""

import itertools

import numpy as np
import pytest
import torch

from cm.diffusion.noise_levels import LogNormalSampler
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.objectives.curricula import EmaAndScales
from cm.runtime import logger
from cm.storage.checkpoint import complete_checkpoints
from cm.train_util import CMTrainLoop, TrainLoop
from tests.helpers import golden_data
from tests.helpers.models import golden_model, tiny_unet


@pytest.fixture(autouse=True)
def run_dir(tmp_path):
    logger.configure(str(tmp_path), ["csv"])
    yield tmp_path
    logger.reset()


class Scripted(KarrasDenoiser):
    """A denoiser whose draws come from a golden file, in the order of its steps (and micro-batches)."""

    def script(self, g):
        self.g, self.k, self.losses = g, 0, []
        return self

    def _next(self, batch):
        rows = self.g.tensor("noise").flatten(0, 1).split(batch)
        k, self.k = self.k, self.k + 1
        draws = {"noise": rows[k]}
        for key in ("sigmas", "indices"):
            if key in self.g:
                draws[key] = self.g.tensor(key).flatten(0, 1).split(batch)[k]
        return draws

    def training_losses(self, model, x_start, sigmas, model_kwargs=None, noise=None):
        draws = self._next(len(x_start))
        terms = super().training_losses(model, x_start, draws["sigmas"], model_kwargs, draws["noise"])
        return self._keep(terms)

    def consistency_losses(self, model, x_start, num_scales, **kwargs):
        kwargs.update(self._next(len(x_start)))
        return self._keep(super().consistency_losses(model, x_start, num_scales, **kwargs))

    def progdist_losses(self, model, x_start, num_scales, **kwargs):
        kwargs.update(self._next(len(x_start)))
        return self._keep(super().progdist_losses(model, x_start, num_scales, **kwargs))

    def _keep(self, terms):
        self.losses.append(terms["loss"].detach())
        return terms


def edm_loop(g):
    c = g.config
    return TrainLoop(
        model=golden_model(g),
        diffusion=Scripted(weight_schedule=c["weight_schedule"]).script(g),
        data=iter(()),
        batch_size=c["batch_size"],
        microbatch=c["microbatch"],
        lr=c["lr"],
        ema_rate=c["ema_rate"],
        log_interval=10,
        save_interval=-1,
        resume_checkpoint="",
        weight_decay=c["weight_decay"],
        lr_anneal_steps=c["lr_anneal_steps"],
    )


def cm_loop(g, mode):
    c = g.config
    teacher = golden_model(g, "sd_teacher/") if g.keys("sd_teacher/") else None
    schedule = EmaAndScales(**c["ema_and_scales"])
    prefix = "sd_student/" if g.keys("sd_student/") else "sd/"
    target = None if mode == "progdist" else golden_model(g, "sd_target/" if g.keys("sd_target/") else prefix)
    return CMTrainLoop(
        model=golden_model(g, prefix),
        diffusion=Scripted(
            weight_schedule=c["weight_schedule"],
            loss_norm=c["loss_norm"],
            distillation=c["student_distillation"],
        ).script(g),
        target_model=target,
        teacher_model=teacher,
        teacher_diffusion=KarrasDenoiser() if teacher else None,
        training_mode=mode,
        ema_scale_fn=schedule,
        total_training_steps=c["ema_and_scales"]["total_steps"],
        data=iter(()),
        batch_size=c["batch_size"],
        microbatch=-1,
        lr=c["lr"],
        ema_rate=c["ema_rate"],
        log_interval=10,
        save_interval=-1,
        resume_checkpoint="",
        lr_anneal_steps=c.get("lr_anneal_steps", 0),
    )


def play(g, loop, share=1.0):
    """Run every stored step and compare losses, norms, rates and weights."""
    c = g.config
    start = [p.detach().clone() for p in loop.mp_trainer.master_params]
    for k in range(c["steps"]):
        assert loop.opt.param_groups[0]["lr"] == pytest.approx(g["lr_before_step"][k], rel=1e-6, abs=1e-12), k
        cond = {"y": g.tensor("y")[k]} if "y" in g else {}
        loop.diffusion.losses.clear()
        assert loop.run_step(g.tensor("batches")[k], cond)
        losses = torch.cat(loop.diffusion.losses)
        torch.testing.assert_close(losses, g.tensor("loss_per_sample")[k], rtol=2e-4, atol=1e-6)
        assert loop.mp_trainer.grad_norm.item() == pytest.approx(g["grad_norm"][k] * share, rel=1e-4), k
        assert loop.mp_trainer.param_norm.item() == pytest.approx(g["param_norm"][k], rel=1e-4), k
        if k + 1 in c["snap_steps"]:
            compare(g, loop, k + 1, atol=1e-4 if k + 1 > 5 and "teacher" not in snapshots(g) else 5e-6)
    moved = max((a - b).abs().max() for a, b in zip(loop.mp_trainer.master_params, start))
    assert moved > 3e-3
    assert loop.opt.param_groups[0]["lr"] == pytest.approx(g["lr_before_step"][-1], abs=1e-12)


def snapshots(g):
    return {key.split("/")[2] for key in g.keys("snap/")}


def compare(g, loop, step, atol):
    weights = {"model": loop.mp_trainer.master_params}
    weights.update({f"ema_{r}": p for r, p in zip(loop.ema_rate, loop.ema_params)})
    for who in ("target", "teacher"):
        if role := getattr(loop.state, who):
            weights[who] = role.master_params
    for who in snapshots(g):
        params = dict(zip(g.config["param_names"], weights[who], strict=True))
        picked = []
        for p in params.values():
            flat = p.detach().flatten()
            index = np.unique(np.linspace(0, len(flat) - 1, min(len(flat), 32)).astype(int))
            picked.append(flat[index])
        prefix = f"snap/{step}/{who}"
        torch.testing.assert_close(
            torch.cat(picked).double(),
            g.tensor(f"{prefix}/sub").double(),
            rtol=0,
            atol=atol,
            msg=f"{who} at {step}",
        )
        for key in g.keys(f"{prefix}/full/"):
            torch.testing.assert_close(
                params[key.split("/full/")[1]].detach(), g.tensor(key), rtol=0, atol=atol
            )


def test_golden_edm_steps():
    g = golden_data.load("trainstep_edm_plain")
    play(g, edm_loop(g))


def test_golden_microbatches_are_averaged():
    """The stored gradient is the sum over two micro-batches; ours is the mean (docs/parity.md)."""
    g = golden_data.load("trainstep_edm_wd_microbatch")
    loop = edm_loop(g)
    loop.diffusion.losses.clear()
    loop.run_step(g.tensor("batches")[0], {})
    torch.testing.assert_close(
        torch.stack(loop.diffusion.losses), g.tensor("loss_per_sample")[:2], rtol=2e-4, atol=1e-6
    )
    assert loop.mp_trainer.grad_norm.item() == pytest.approx(g["grad_norm"][0] / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "mode"), [("trainstep_cd", "consistency_distillation"), ("trainstep_ct", "consistency_training")]
)
def test_golden_consistency_steps(name, mode):
    g = golden_data.load(name)
    loop = cm_loop(g, mode)
    play(g, loop)
    assert loop.global_step == g.config["steps"]


def test_golden_progressive_steps():
    g = golden_data.load("trainstep_progdist_corrected")
    play(g, cm_loop(g, "progdist"))


# --- behaviour ---


def endless(batch, seed=0, **cond):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(batch, 1, 8, 8, generator=generator).clamp(-1, 1), dict(cond)


def small_loop(cls=TrainLoop, diffusion=None, batch=4, **kwargs):
    options = dict(
        model=tiny_unet(),
        diffusion=diffusion or KarrasDenoiser(),
        data=endless(batch),
        batch_size=batch,
        microbatch=-1,
        lr=1e-3,
        ema_rate="0.9",
        log_interval=2,
        save_interval=-1,
        resume_checkpoint="",
    )
    return cls(**{**options, **kwargs})


def small_cm_loop(mode="consistency_training", **kwargs):
    options = dict(
        diffusion=KarrasDenoiser(loss_norm="l2", distillation=mode != "progdist", weight_schedule="uniform"),
        target_model=tiny_unet(),
        teacher_model=None,
        teacher_diffusion=None,
        training_mode=mode,
        ema_scale_fn=EmaAndScales("fixed", 0.5, "fixed", 10, 10, 100, 10),
        total_training_steps=3,
    )
    return small_loop(CMTrainLoop, **{**options, **kwargs})


@pytest.mark.parametrize("make", [small_loop, small_cm_loop])
def test_training_stops_at_its_step_count_and_saves_once(make, run_dir):
    loop = make(total_training_steps=5, save_interval=2)
    loop.run_loop()
    assert loop.step == 5
    assert [p.name for p in complete_checkpoints(run_dir)] == ["step_000002", "step_000004", "step_000005"]


@pytest.mark.parametrize("make", [small_loop, small_cm_loop])
def test_an_interval_of_minus_one_saves_at_the_end_only(make, run_dir):
    make(total_training_steps=2, save_interval=-1).run_loop()
    assert [p.name for p in complete_checkpoints(run_dir)] == ["step_000002"]


def test_anneal_steps_end_training_too():
    loop = small_loop(lr_anneal_steps=3)
    loop.run_loop()
    assert loop.step == 3 and loop.opt.param_groups[0]["lr"] == 0


def test_an_overridden_loss_takes_effect():
    class Mine(KarrasDenoiser):
        def training_losses(self, model, x_start, sigmas, model_kwargs=None, noise=None):
            self.seen = (sigmas, noise)
            return {"loss": (model(x_start, sigmas) ** 2).flatten(1).mean(1), "mine": sigmas}

    diffusion = Mine()
    loop = small_loop(diffusion=diffusion)
    loop.run_step(*next(loop.data))
    assert diffusion.seen[0].shape == (4,) and diffusion.seen[1].shape == (4, 1, 8, 8)
    assert "mine" in loop.meter.read()


class OwnSampler:
    def sample(self, batch_size, device):
        return torch.linspace(1, 2, batch_size, device=device), torch.full((batch_size,), 3.0, device=device)


class OwnLogNormal(LogNormalSampler):
    sample = OwnSampler.sample


@pytest.mark.parametrize("sampler", [OwnSampler(), OwnLogNormal()])
def test_a_schedule_sampler_from_outside_takes_effect(sampler):
    class Seen(KarrasDenoiser):
        def training_losses(self, model, x_start, sigmas, model_kwargs=None, noise=None):
            self.sigmas = sigmas
            return super().training_losses(model, x_start, sigmas, model_kwargs, noise)

    diffusion = Seen()
    loop = small_loop(diffusion=diffusion, schedule_sampler=sampler)
    loop.run_step(*next(loop.data))
    assert torch.equal(diffusion.sigmas, torch.linspace(1, 2, 4))
    loop.save()


def test_microbatches_give_the_gradient_of_the_whole_batch():
    norms = []
    for microbatch in (-1, 1, 3):
        loop = small_loop(batch=7, microbatch=microbatch, data=endless(7))
        loop.run_step(*next(loop.data))
        norms.append((loop.mp_trainer.grad_norm.item(), loop.mp_trainer.master_params[0].clone()))
    for norm, weight in norms[1:]:
        assert norm == pytest.approx(norms[0][0], rel=1e-5)
        torch.testing.assert_close(weight, norms[0][1], rtol=0, atol=1e-6)


def test_draws_follow_seed_and_step():
    def losses(seed, steps=2):
        loop = small_loop(seed=seed)
        for _ in range(steps):
            loop.run_step(*next(loop.data))
        return loop.meter.read()["loss"]

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("mode", ["consistency_distillation", "progdist"])
def test_distillation_without_a_teacher_is_an_error(mode):
    with pytest.raises(UserError, match="--teacher_model_path"):
        small_cm_loop(mode, ema_scale_fn=EmaAndScales("fixed", 0.0, "progdist", 4, 4, 9, 3))


def test_unknown_training_mode():
    with pytest.raises(UserError, match="training_mode must be one of"):
        small_cm_loop("consistency")


def test_consistency_training_takes_no_notice_of_a_teacher():
    loop = small_cm_loop(teacher_model=tiny_unet(), teacher_diffusion=KarrasDenoiser())
    loop.run_step(*next(loop.data))
    assert loop.roles.teacher is None


def test_target_follows_with_mu_of_the_same_step():
    loop = small_cm_loop(ema_scale_fn=lambda step: (0.25 * step, 5))
    before = [p.clone() for p in loop.target_model.parameters()]
    loop.run_step(*next(loop.data))
    assert all(
        torch.equal(a, b) for a, b in zip(loop.target_model.parameters(), loop.mp_trainer.master_params)
    )
    loop.run_step(*next(loop.data))
    student, target = (next(m.parameters()) for m in (loop.model, loop.target_model))
    assert not torch.equal(student, target) and not torch.equal(before[0], target)


def test_bad_batches_are_skipped_counted_and_end_the_run():
    loop = small_loop()
    loop.guard.max_bad_steps = 3
    bad = torch.full((4, 1, 8, 8), float("nan"))
    before = [p.detach().clone() for p in loop.mp_trainer.master_params]
    assert not loop.run_step(bad, {}) and loop.step == 1
    assert loop.run_step(*next(loop.data)) and loop.state.bad_steps == 0
    loop.run_step(bad, {})
    loop.run_step(bad, {})
    with pytest.raises(UserError, match="--max_bad_steps"):
        loop.run_step(bad, {})
    assert loop.state.skipped == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, loop.mp_trainer.master_params))


def resumed(make, steps, cut, run_dir):
    """Weights after `steps` steps, with a stop and a new loop after `cut`."""
    loop = make()
    data = loop.data
    for _ in range(cut):
        loop.run_step(*next(data))
    loop.save()
    again = make()
    again.load(complete_checkpoints(run_dir)[-1])
    assert again.step == cut
    for _ in range(steps - cut):
        again.run_step(*next(data))
    return again


MAKERS = {
    "edm": small_loop,
    "edm_anneal": lambda: small_loop(lr_anneal_steps=20),
    "edm_bf16": lambda: small_loop(precision="bf16"),
    "edm_fp16": lambda: small_loop(use_fp16=True),
    "edm_dropout": lambda: small_loop(model=tiny_unet(dropout=0.3)),
    "ct": small_cm_loop,
    "cd": lambda: small_cm_loop(
        "consistency_distillation", teacher_model=tiny_unet(), teacher_diffusion=KarrasDenoiser()
    ),
    "pd": lambda: small_cm_loop(
        "progdist",
        teacher_model=tiny_unet(),
        teacher_diffusion=KarrasDenoiser(),
        ema_scale_fn=EmaAndScales("fixed", 0.0, "progdist", 4, 4, 9, 2),
        lr_anneal_steps=2,
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("cut", [3, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, cut, run_dir):
    make = MAKERS[name]
    whole = make()
    for _ in range(6):
        whole.run_step(*next(whole.data))
    again = resumed(make, 6, cut, run_dir)
    for who in ("student", "target", "teacher"):
        a, b = (getattr(loop.state, who) for loop in (whole, again))
        assert (a is None) == (b is None)
        if a is not None:
            assert all(torch.equal(x, y) for x, y in zip(a.master_params, b.master_params)), who
    assert all(
        torch.equal(x, y)
        for x, y in zip(itertools.chain(*whole.ema_params), itertools.chain(*again.ema_params))
    )
    assert whole.opt.param_groups[0]["lr"] == again.opt.param_groups[0]["lr"]
    assert whole.mp_trainer.lg_loss_scale == again.mp_trainer.lg_loss_scale
    for x, y in zip(
        whole.opt.state_dict()["state"].values(), again.opt.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(x[k], y[k]) for k in x)


def test_resume_from_files_with_the_original_names(run_dir):
    loop = small_cm_loop()
    for _ in range(2):
        loop.run_step(*next(loop.data))
    loop.save()
    folder = complete_checkpoints(run_dir)[-1]
    again = small_cm_loop(resume_checkpoint=str(folder / "model000002.pt"))
    assert again.step == 2
    for a, b in (
        (loop.state.target, again.state.target),
        (loop.state.student.weights, again.state.student.weights),
    ):
        assert all(torch.equal(x, y) for x, y in zip(a.master_params, b.master_params))
    (folder / "ema_0.9_000002.pt").unlink()
    lonely = small_cm_loop(resume_checkpoint=str(folder / "model000002.pt"))
    assert torch.equal(lonely.ema_params[0][0], lonely.mp_trainer.master_params[0])
    with pytest.raises(UserError, match="model<step>"):
        small_cm_loop(resume_checkpoint=str(folder / "state.json"))


def test_checkpoint_of_another_network_names_the_tensors(run_dir):
    loop = small_loop()
    loop.save()
    with pytest.raises(UserError, match=r"in the file, .* in the model"):
        small_loop(model=tiny_unet(num_channels=64)).load(complete_checkpoints(run_dir)[-1])
