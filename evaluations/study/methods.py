"""What a study trains and measures, as data: the methods in order, their titles, teachers and ways to sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cm.config import presets

TEACHER = "edm"
MANY = "heun18"  # what a study calls the teacher's own samples
EVALUATIONS = {MANY: 35}  # of the network for a sample; else the number in the set's name
# A study may be so much longer or shorter: flags that count steps
LENGTHS = (
    *("total_training_steps", "save_interval", "distill_steps_per_iter", "ratio_steps", "tangent_warmup"),
    *("lr_anneal_steps", "teacher_steps_ramp", "split_steps"),
)


@dataclass(frozen=True)
class Method:
    """One row of a study. teacher: the method whose model it learns from; empty: none.

    sets: name of a sample set -> flags that draw it; {m} is a noise level of `middles` that is searched, {4m} and {m/4}
    are its multiples. models: sets that are drawn with the model of a stage: how many stages were over.
    edits: whether it edits test images, too. figure: a run of the paper's figures in miniature: one-step distances
    while it learns, and nothing else.
    like, flags: a variation of that method, and what it changes; for what it shows, one evaluation is enough.
    """

    title: str
    teacher: str = TEACHER
    script: str = "cm_train"
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    middles: tuple[float, ...] = (0.2, 0.4, 0.8, 1.6, 3.2)
    models: Mapping[str, int] = field(default_factory=dict)
    edits: bool = False
    figure: bool = False
    like: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def searches(self) -> bool:
        """Whether a set asks for a noise level that is to be searched."""
        return any("{m}" in str(value) for flags in self.sets.values() for value in flags.values())


@dataclass(frozen=True)
class Study:
    """A data set and the methods on it. train, test: file names in the folder that --data names."""

    data: str
    train: str
    test: str
    preset: str
    methods: Mapping[str, Method]
    epochs: int  # of the classifier


CONSISTENCY = {
    "nfe1": {"sampler": "onestep"},
    "nfe2": {"sampler": "multistep", "sigmas": "80,{m}"},
    "nfe4": {"sampler": "multistep", "sigmas": "80,{4m},{m},{m/4}"},
    "nfe8": {"sampler": "multistep", "sigmas": "80,{8m},{4m},{2m},{m},{m/2},{m/4},{m/8}"},
}
PROGRESSIVE = {f"nfe{n}": {"sampler": "progdist", "steps": n} for n in (1, 2, 4, 8)}
# 16, 8 and 4 steps take one stage's length each, 2 and 1 twice that
PROGRESSIVE_STAGES = {"nfe2": 5, "nfe4": 3, "nfe8": 2}
DENOISER = {
    MANY: {"sampler": "heun", "steps": 18},
    "nfe1": {"sampler": "heun", "steps": 1},
    **{f"nfe{n}": {"sampler": "euler", "steps": n} for n in (2, 4, 8)},
}
JUMPS = {f"nfe{n}": {"sampler": "jumps", "steps": n} for n in (1, 2, 4, 8)}
GAMMA = {f"nfe{n}": {"sampler": "gamma", "steps": n} for n in (1, 2, 4, 8)}
METHODS = {
    "edm": Method("EDM teacher", "", "edm_train", DENOISER),
    "cd": Method("CD", sets=CONSISTENCY),
    "cd_huber": Method("CD, iCT's loss", sets=CONSISTENCY, edits=True),
    "ct": Method("CT", sets=CONSISTENCY, edits=True),
    "ect": Method("ECT", sets=CONSISTENCY),
    "ict": Method("iCT", sets=CONSISTENCY),
    "pd": Method("PD", sets=PROGRESSIVE, models=PROGRESSIVE_STAGES),
    "scd": Method("sCD", sets=CONSISTENCY),
    "sct": Method("sCT", sets=CONSISTENCY),
    "cont_cd": Method("continuous CD", sets=CONSISTENCY),
    "cont_ct": Method("continuous CT", sets=CONSISTENCY),
    # It learned nothing below its transition at 1
    "tcm": Method(
        "TCM, after ECT",
        "ect",
        sets={n: CONSISTENCY[n] for n in ("nfe1", "nfe2")},
        middles=(1.2, 1.6, 2.4, 3.2),
    ),
    "meanflow": Method("MeanFlow", sets=JUMPS),
    "meanflow_random": Method("MeanFlow, from random weights", "", sets=JUMPS),
    "improved_meanflow": Method("improved MeanFlow, from random weights", "", sets=JUMPS),
    "lmd": Method("Lagrangian map distillation", sets=JUMPS),
    "emd": Method("Eulerian map distillation", sets=JUMPS),
    "esd": Method("ESD", sets=JUMPS),
    "lsd": Method("LSD", sets=JUMPS),
    "psd": Method("PSD", sets=JUMPS),
    "alphaflow": Method("alpha-Flow", sets=JUMPS),
    "soflow": Method("SoFlow", sets=JUMPS),
    "shortcut": Method("shortcut model", sets=JUMPS),
    "ctm": Method("CTM", sets=GAMMA),
    "ctm_training": Method("CTM without its teacher's steps", sets=GAMMA),
    # A model for each number of steps
    **{
        f"mcd{n}": Method(f"multistep CD, segments: {n}", sets={f"nfe{n}": PROGRESSIVE[f"nfe{n}"]})
        for n in (1, 2, 4, 8)
    },
    **{
        f"mct{n}": Method(f"multistep CT, segments: {n}", sets={f"nfe{n}": PROGRESSIVE[f"nfe{n}"]})
        for n in (1, 2, 4, 8)
    },
}
ONE = {"nfe1": CONSISTENCY["nfe1"]}


def _variation(like: str, title: str, **flags: Any) -> Method:
    return Method(title, sets=ONE, like=like, flags=flags)


# EDM's weight: the network's own output learns equally from all levels
EQUAL = {"weight_schedule": "karras"}
# Pairs mostly from where a student's error arises
MIDDLE = {"pairs": "lognormal-grid", "p_mean": 0.5, "p_std": 1.5}
# The settings of plain CD
SLOW = {"start_ema": 0.9, "lr": 1e-3}
PAPER = {"p_std": 2.0}
VARIATIONS = {
    # Why CD misses its bar: rate, target, grid, weight, distance, pairs
    "cd_rate": _variation("cd", "CD, rate 3e-4", lr=3e-4),
    "cd_mu0": _variation("cd", "CD, mu = 0", start_ema=0.0),
    "cd_n9": _variation("cd", "CD, N = 9", start_scales=9),
    "cd_karras": _variation("cd", "CD, weight of EDM", **EQUAL),
    "cd_lognormal": _variation("cd", "CD, weight of EDM, more pairs of middle levels", **EQUAL, **MIDDLE),
    "cd_huber1": _variation("cd", "CD, pseudo-Huber, weight 1", loss_norm="pseudo-huber"),
    # What brought CD with iCT's loss to its bar: target, grid, pairs, rate, length
    "cd_huber_mu9": _variation("cd_huber", "CD, iCT's loss, mu = 0.9, rate 1e-3", **SLOW),
    "cd_huber_mu9_n12": _variation("cd_huber", "the same, N = 12", **SLOW, start_scales=12),
    "cd_huber_mu9_n30": _variation("cd_huber", "the same, N = 30", **SLOW, start_scales=30),
    "cd_huber_mu9_middle": _variation("cd_huber", "the same, more pairs of middle levels", **SLOW, **MIDDLE),
    "cd_huber_rate1": _variation("cd_huber", "CD, iCT's loss, rate 1e-3", lr=1e-3),
    "cd_huber_rate1_n30": _variation("cd_huber", "the same, N = 30", lr=1e-3, start_scales=30),
    "cd_huber_rate4": _variation("cd_huber", "CD, iCT's loss, rate 4e-3", lr=4e-3),
    "cd_huber_long": _variation("cd_huber", "CD, iCT's loss, twice as long", total_training_steps=1600),
    # Why iCT was behind CT with the paper's pairs: their law, its last N, its first N, its rate
    "ict_paper": _variation("ict", "iCT, pairs from ln(t) ~ N(-1.1, 2) as in the paper", **PAPER),
    "ict_s20": _variation("ict", "the same, N from 10 to 20", **PAPER, end_scales=20),
    "ict_s0": _variation("ict", "the same, N from 2 to 64", **PAPER, start_scales=2, end_scales=64),
    "ict_rate": _variation("ict", "the same, rate 5e-4", **PAPER, lr=5e-4),
    # Whether Lagrangian maps want more pairs of high levels, where the one step of a sample begins
    "lmd_wide": _variation(
        "lmd",
        "Lagrangian map distillation, ln(t) of deviation 2.5",
        t_mean=0.0,
        t_std=2.5,
        r_mean=-1.5,
        r_std=2.5,
    ),
    # The ablation of iCT (Song & Dhariwal 2023, Figure 5): each takes one of its parts away
    "ict_mu": _variation("ict", "iCT with a target network, mu = 0.9", start_ema=0.9),
    "ict_l2": _variation("ict", "iCT with l2", loss_norm="l2"),
    "ict_weight": _variation("ict", "iCT with weight 1", weight_schedule="uniform"),
    "ict_steps": _variation(
        "ict", "iCT with CT's N(k), 2 to 17", scale_mode="progressive", start_scales=2, end_scales=17
    ),
}
# The teacher without patches: the same levels, four times the pixels, as many steps as take the same time
UNPATCHED = {
    "edm_pixels": Method(
        "EDM teacher without patches, a quarter of the steps",
        "",
        "edm_train",
        {MANY: DENOISER[MANY]},
        like=TEACHER,
        flags={"patch_size": 1, "attention_resolutions": "14", "total_training_steps": 1000},
    )
}
# Runs of the paper's figures that are no method of the study
FIGURE_RUNS = {
    name.removeprefix("fashion_"): Method(name.removeprefix("fashion_"), sets=ONE, figure=True)
    for name in presets.PRESETS
    if name.startswith("fashion_fig")
}
STUDIES = {
    "fashion": Study(
        data="/usr/share/datasets/fashion-mnist",
        train="train-images-idx3-ubyte.gz",
        test="t10k-images-idx3-ubyte.gz",
        preset="fashion",
        methods={**METHODS, **VARIATIONS, **UNPATCHED, **FIGURE_RUNS},
        epochs=14,
    )
}


def evaluations_of(sample_set: str) -> int:
    """How often the network is evaluated for a sample of a set."""
    return EVALUATIONS.get(sample_set) or int(sample_set.removeprefix("nfe"))


def set_flags(flags: Mapping[str, Any], middle: float | None) -> dict[str, Any]:
    """The flags of a sample set with the searched noise level in its place."""
    if middle is None:
        return dict(flags)
    levels = {"m": f"{middle:g}"}
    for k in (2, 4, 8):
        levels |= {f"{k}m": f"{k * middle:g}", f"m/{k}": f"{middle / k:g}"}
    return {n: v.format(**levels) if isinstance(v, str) else v for n, v in flags.items()}


def preset_of(study: Study, name: str) -> str:
    """The preset that a method is trained by."""
    return f"{study.preset}_{study.methods[name].like or name}"


def training_flags(study: Study, name: str, scale: float) -> dict[str, Any]:
    """The flags beside --preset that make a method of its preset, `scale` times as long."""
    method = study.methods[name]
    flags = {**presets.values(preset_of(study, name), "release", method.script), **method.flags}
    longer = (
        {n: max(round(flags[n] * scale), 1) for n in LENGTHS if flags.get(n, 0) > 0} if scale != 1 else {}
    )
    return {**method.flags, **longer}


def images_seen(study: Study, name: str, scale: float = 1.0) -> int:
    """How many images a method is trained on, its teacher's not counted."""
    flags = presets.values(preset_of(study, name), "release", study.methods[name].script)
    flags |= training_flags(study, name, scale)
    return flags["total_training_steps"] * flags["global_batch_size"]
