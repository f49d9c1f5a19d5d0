"""ImageNet 64x64, LSUN Bedroom and LSUN Cat 256x256: the released models.

Flags are those of the published command lines. Paths and `--generator` are left to the user. No line was published for
training on Cat (Bedroom's serve) nor for progressive distillation (see `_progdist`).
"""

from collections.abc import Sequence

from cm.config.presets.base import DRAWS, HALVINGS, Flags, Preset, Result, consistency, progressive, teacher

TABLE_2 = "Song et al. 2023, Table 2"

IMAGENET64: Flags = {
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_fp16": True,
}
LSUN256: Flags = {
    **IMAGENET64,
    "image_size": 256,
    "num_channels": 256,
    "num_res_blocks": 2,
    "class_cond": False,
    "use_scale_shift_norm": False,
}
EDM: Flags = {"dropout": 0.1, "weight_schedule": "karras"}
CONSISTENCY: Flags = {"dropout": 0.0, "weight_schedule": "uniform"}

# Half-life of 50 million images at batch 4096
SLOW = "0.9999432189950708"
RATES = f"0.999,0.9999,{SLOW}"
RATES_LSUN_CM = f"0.9999,0.99994,{SLOW}"


def _results(*rows: tuple[int, float, float, float]) -> tuple[Result, ...]:
    return tuple(Result(nfe, fid, TABLE_2, precision=p, recall=r) for nfe, fid, p, r in rows)


def _edm(
    model: Flags, train: Flags, batch_size: int, results: Sequence[Result], paper: Flags | None = None
) -> Preset:
    """An EDM teacher and its 40-step Heun samples."""
    train = {"schedule_sampler": "lognormal", "lr": 1e-4, "weight_decay": 0.0, **train}
    draws = {**DRAWS, "s_churn": 0.0, "batch_size": batch_size}
    return teacher({**model, **EDM}, train, 40, draws, results, paper)


def _consistency(
    model: Flags, train: Flags, grid: Flags, batch_size: int, results: Sequence[Result], paper: Flags
) -> Preset:
    """A consistency model. grid: steps, and the ts of two-step sampling where they were published."""
    common = {
        "teacher_dropout": 0.1,
        "schedule_sampler": "uniform",
        "weight_decay": 0.0,
        "lr_anneal_steps": 0,
    }
    draws = {**DRAWS, "batch_size": batch_size}
    few = {**draws, "num_samples": 500}
    model = {**model, **CONSISTENCY}
    return consistency(model, {**common, **train}, grid, few, results, paper, search=draws)


def _distillation(loss_norm: str, **train) -> Flags:
    return {
        "training_mode": "consistency_distillation",
        "target_ema_mode": "fixed",
        "start_ema": 0.95,
        "scale_mode": "fixed",
        "start_scales": 40,
        "total_training_steps": 600000,
        "loss_norm": loss_norm,
        **train,
    }


def _training(**train) -> Flags:
    return {
        "training_mode": "consistency_training",
        "target_ema_mode": "adaptive",
        "start_ema": 0.95,
        "scale_mode": "progressive",
        "start_scales": 2,
        "loss_norm": "lpips",
        **train,
    }


def _progdist(
    model: Flags, loss_norm: str, train: Flags, batch_size: int, results: Sequence[Result]
) -> Preset:
    """Progressive distillation.

    Neither a command line nor a column of Table 3 was published for it: stages, optimiser and weighting are those of
    the authors' CIFAR-10 runs, batch and averages those of the data set's distillation.
    """
    train = {**HALVINGS, "loss_norm": loss_norm, **train}
    return progressive({**model, "dropout": 0.0}, train, {**DRAWS, "batch_size": batch_size}, results)


def _imagenet64() -> dict[str, Preset]:
    cd: Flags = {"lr": 8e-6, "global_batch_size": 2048, "ema_rate": RATES}
    cd_grid: Flags = {"steps": 40, "ts": "0,22,39"}
    ct = _training(
        end_scales=200,
        total_training_steps=800000,
        lr=1e-4,
        global_batch_size=2048,
        ema_rate=RATES,
    )
    pd: Flags = {"global_batch_size": 2048, "ema_rate": RATES}
    lpips_source = "Song et al. 2023, as quoted in arXiv:2403.06807"
    return {
        # The published line does not stop; EDM trains on 2500 million images.
        "imagenet64_edm": _edm(
            IMAGENET64,
            {"global_batch_size": 4096, "ema_rate": RATES, "total_training_steps": 610352},
            64,
            _results((79, 2.44, 0.71, 0.67)),
        ),
        "imagenet64_cd_l2": _consistency(
            IMAGENET64, _distillation("l2", **cd), cd_grid, 256, (), {"ema_rate": SLOW}
        ),
        "imagenet64_cd_lpips": _consistency(
            IMAGENET64,
            _distillation("lpips", **cd),
            cd_grid,
            256,
            _results((1, 6.20, 0.68, 0.63), (2, 4.70, 0.69, 0.64)),
            {"ema_rate": SLOW},
        ),
        "imagenet64_ct": _consistency(
            IMAGENET64,
            ct,
            {"steps": 201, "ts": "0,106,200"},
            256,
            _results((1, 13.0, 0.71, 0.47), (2, 11.1, 0.69, 0.56)),
            {"lr": 8e-6, "ema_rate": SLOW, "init": "random", "mu_formula": "paper"},
        ),
        "imagenet64_pd_l2": _progdist(
            IMAGENET64, "l2", pd, 256, _results((1, 15.39, 0.59, 0.62), (2, 8.95, 0.63, 0.65))
        ),
        "imagenet64_pd_lpips": _progdist(
            IMAGENET64, "lpips", pd, 256, (Result(1, 7.88, lpips_source), Result(2, 5.74, lpips_source))
        ),
    }


def _lsun(
    edm_steps: int,
    edm_results: Sequence[Result],
    ts: dict[str, Flags],
    results: dict[str, Sequence[Result]],
) -> dict[str, Preset]:
    """The six models of one LSUN category. ts: method -> published two-step time points."""
    common: Flags = {"global_batch_size": 256, "ema_rate": RATES_LSUN_CM}
    large: Flags = {"global_batch_size": 2048}
    cd_paper: Flags = {**large, "ema_rate": SLOW}
    ct = _training(end_scales=150, total_training_steps=1000000, lr=5e-5, **common)
    cd = {n: _distillation(n, lr=1e-5, **common) for n in ("l2", "lpips")}
    return {
        # The published line does not stop; the number of steps is the paper's.
        "edm": _edm(
            LSUN256,
            {"global_batch_size": 256, "ema_rate": RATES, "total_training_steps": edm_steps},
            8,
            edm_results,
            large,
        ),
        **{
            f"cd_{norm}": _consistency(
                LSUN256,
                train,
                {"steps": 40, **ts.get(f"cd_{norm}", {})},
                32,
                results.get(f"cd_{norm}", ()),
                cd_paper,
            )
            for norm, train in cd.items()
        },
        "ct": _consistency(
            LSUN256,
            ct,
            {"steps": 151, **ts["ct"]},
            32,
            results["ct"],
            {**cd_paper, "lr": 1e-5, "init": "random", "mu_formula": "paper"},
        ),
        **{
            f"pd_{norm}": _progdist(LSUN256, norm, common, 32, results.get(f"pd_{norm}", ()))
            for norm in ("l2", "lpips")
        },
    }


BEDROOM = _lsun(
    600000,
    _results((79, 3.57, 0.66, 0.45)),
    ts={"cd_l2": {"ts": "0,18,39"}, "cd_lpips": {"ts": "0,17,39"}, "ct": {"ts": "0,67,150"}},
    results={
        "cd_lpips": _results((1, 7.80, 0.66, 0.34), (2, 5.22, 0.68, 0.39)),
        "ct": _results((1, 16.0, 0.60, 0.17), (2, 7.85, 0.68, 0.33)),
        "pd_l2": _results((1, 16.92, 0.47, 0.27), (2, 8.47, 0.56, 0.39)),
    },
)
# No two-step time points were published for distilled Cat models: `ternary_search` finds them.
CAT = _lsun(
    300000,
    _results((79, 6.69, 0.70, 0.43)),
    ts={"ct": {"ts": "0,62,150"}},
    results={
        "cd_lpips": _results((1, 11.0, 0.65, 0.36), (2, 8.84, 0.66, 0.40)),
        "ct": _results((1, 20.7, 0.56, 0.23), (2, 11.7, 0.63, 0.36)),
        "pd_l2": _results((1, 29.6, 0.51, 0.25), (2, 15.5, 0.59, 0.36)),
    },
)

PRESETS: dict[str, Preset] = {
    **_imagenet64(),
    **{f"bedroom256_{method}": preset for method, preset in BEDROOM.items()},
    **{f"cat256_{method}": preset for method, preset in CAT.items()},
}
