"""CIFAR-10 with NCSN++: the authors' JAX runs, unconditional, 32x32.

The authors' LPIPS has max pooling here, average pooling for the larger images.
"""

from cm.config.presets.base import DRAWS, HALVINGS, Flags, Preset, Result, consistency, progressive, teacher

TABLE_1 = "Song et al. 2023, Table 1"

NCSNPP: Flags = {
    "network": "ncsnpp",
    "image_size": 32,
    "num_channels": 128,
    "channel_mult": "2,2,2",
    "num_res_blocks": 4,
    "attention_resolutions": "16",
    "class_cond": False,
}
# Half-life of half a million images at batch 512
EDM_RATE = "0.9992904691232699"
TRAINING: Flags = {"global_batch_size": 512, "seed": 42}
PAPER_CT: Flags = {"init": "random", "mu_formula": "paper"}


def _results(*rows: tuple[int, float, float]) -> tuple[Result, ...]:
    return tuple(Result(nfe, fid, TABLE_1, inception_score=score) for nfe, fid, score in rows)


def _consistency(
    train: Flags,
    grid: Flags,
    paper: Flags | None = None,
    results: tuple[Result, ...] = (),
    dropout: float = 0.0,
) -> Preset:
    common = {"optimizer": "radam", "lr": 4e-4, "ema_rate": "0.9999", "total_training_steps": 800000}
    return consistency(
        {**NCSNPP, "dropout": dropout, "weight_schedule": "uniform"},
        {**TRAINING, **common, **train},
        grid,
        DRAWS,
        results,
        paper,
        search={"protocol": "cifar10", **DRAWS},
    )


def _distillation(loss_norm: str, lr: float, results: tuple[Result, ...] = ()) -> Preset:
    """mu = 0: the target is the student itself, without gradient."""
    train = {
        "training_mode": "consistency_distillation",
        "target_ema_mode": "fixed",
        "start_ema": 0.0,
        "scale_mode": "fixed",
        "start_scales": 18,
        "loss_norm": loss_norm,
        "lr": lr,
    }
    return _consistency(train, {"steps": 18, "ts": "0,11,17"}, results=results)


def _continuous(method: str, loss_norm: str, *, stop_grad: bool, steps: int, lr: float = 5e-6) -> Preset:
    """Continuous time, distillation or training: both begin with the teacher's weights, and drop out.

    `steps` of training are those of the released checkpoint. The model knows no grid; samples take that of CD.
    """
    train = {
        "training_mode": f"continuous_{method}",
        "init": "teacher",
        "start_scales": 18,
        "loss_norm": loss_norm,
        "stop_grad": stop_grad,
        "lr": lr,
        "total_training_steps": steps,
    }
    return _consistency(train, {"steps": 18, "ts": "0,11,17"}, dropout=0.3)


def _progdist(loss_norm: str, results: tuple[Result, ...] = ()) -> Preset:
    """Raw weights are sampled."""
    train = {**TRAINING, **HALVINGS, "loss_norm": loss_norm, "ema_rate": "0"}
    return progressive({**NCSNPP, "dropout": 0.0}, train, {**DRAWS, "weights": "raw"}, results)


def _edm() -> Preset:
    """The teacher: Adam with a warm-up over ten million images."""
    train = {
        **TRAINING,
        "schedule_sampler": "lognormal",
        "optimizer": "adam",
        "lr": 1e-3,
        "lr_warmup_steps": 19531,
        "ema_rate": EDM_RATE,
        "total_training_steps": 400000,
    }
    model = {**NCSNPP, "dropout": 0.13, "weight_schedule": "karras"}
    return teacher(model, train, 18, results=_results((35, 2.04, 9.84)))


PRESETS: dict[str, Preset] = {
    "cifar10_edm": _edm(),
    "cifar10_cd_l1": _distillation("l1", 2e-4),
    "cifar10_cd_l2": _distillation("l2", 4e-4),
    "cifar10_cd_lpips": _distillation("lpips-max", 4e-4, _results((1, 3.55, 9.48), (2, 2.93, 9.75))),
    "cifar10_ct": _consistency(
        {
            "training_mode": "consistency_training",
            "target_ema_mode": "adaptive",
            "start_ema": 0.9,
            "scale_mode": "progressive",
            "start_scales": 2,
            "end_scales": 150,
            "loss_norm": "lpips-max",
        },
        {"steps": 151},
        PAPER_CT,
        _results((1, 8.70, 8.49), (2, 5.83, 8.85)),
    ),
    # The baseline of Figure 3d
    "cifar10_ct_fixed": _consistency(
        {
            "training_mode": "consistency_training",
            "target_ema_mode": "fixed",
            "start_ema": 0.99,
            "scale_mode": "fixed",
            "start_scales": 120,
            "loss_norm": "lpips-max",
        },
        {"steps": 120},
        {"init": "random"},
    ),
    "cifar10_cont_cd_l2": _continuous("distillation", "l2", stop_grad=False, steps=400000, lr=1e-3),
    "cifar10_cont_cd_l2_stopgrad": _continuous("distillation", "l2", stop_grad=True, steps=400000),
    "cifar10_cont_cd_lpips_stopgrad": _continuous("distillation", "lpips-max", stop_grad=True, steps=400000),
    "cifar10_cont_ct_l2": _continuous("training", "l2", stop_grad=True, steps=800000),
    "cifar10_cont_ct_lpips": _continuous("training", "lpips-max", stop_grad=True, steps=400000),
    "cifar10_pd_l2": _progdist("l2", _results((1, 8.34, 8.69), (2, 5.58, 9.05))),
    "cifar10_pd_lpips": _progdist("lpips-max"),
}
