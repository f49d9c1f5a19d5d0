"""Groups of flags that the scripts' configurations are made of: one field is one flag. Imports no torch.

A field's metadata hold its help text, its unit, its choices, and whether it can change the result of a run: what
cannot (intervals, paths of output, workers) does not count when two runs are compared. Lists are written as text;
`cm.config.parsing` reads them.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from cm.config.parsing import DEFAULT_ATTENTION

CONTINUOUS_MODES = ("continuous_distillation", "continuous_training")
# Objectives whose models are consistency functions
CONSISTENCY_MODES = ("consistency_distillation", "consistency_training", *CONTINUOUS_MODES)
MODES = (*CONSISTENCY_MODES, "progdist")
NETWORKS = ("adm", "ncsnpp", "ddpmpp")
PRECONDS = ("edm", "vp", "ve", "iddpm")
SAMPLERS = (
    "heun",
    "euler",
    "dpm",
    "ancestral",
    "onestep",
    "multistep",
    "progdist",
    "general",
    "pc",
    "rk45",
)
WEIGHT_SCHEDULES = ("snr", "snr+1", "karras", "truncated-snr", "uniform")
LOSS_NORMS = ("l1", "l2", "l2-32", "linf", "lpips", "lpips-max")
EDIT_TASKS = ("inpaint", "colorize", "superres", "stroke", "denoise", "interpolate")
GENERATORS = ("indexed", "determ", "determ-indiv", "dummy")
PRECISIONS = ("fp32", "fp16", "bf16")


def flag(
    default: Any, help: str, *, unit: str = "", choices: tuple[str, ...] = (), result: bool = True
) -> Any:
    """A field that is a flag; its type is the default's. `result` False: the flag cannot change the result."""
    return field(default=default, metadata={"help": help, "unit": unit, "choices": choices, "result": result})


@dataclass(frozen=True)
class RunFlags:
    """Run"""

    preset: str = flag(
        "",
        "named experiment whose values replace the defaults; python -m cm.presets lists them",
        result=False,
    )
    variant: str = flag(
        "release",
        "the preset as in the published command lines or as in the paper's Table 3",
        choices=("release", "paper"),
        result=False,
    )
    config: str = flag("", "JSON file as --dry_run prints it; flags win over it", result=False)
    dry_run: bool = flag(
        False, "print the resolved configuration as JSON, touch nothing and exit", result=False
    )
    out_dir: str = flag(
        "",
        "directory of everything this run writes; empty: $OPENAI_LOGDIR, else runs/<preset or script>-<hash>",
        result=False,
    )
    device: str = flag(
        "auto",
        "where to compute; auto takes CUDA if there is any",
        choices=("auto", "cpu", "cuda"),
        result=False,
    )
    precision: str = flag(
        "", "arithmetic of the network's torso; empty: as --use_fp16 says", choices=("", *PRECISIONS)
    )
    deterministic: bool = flag(
        False, "use torch's deterministic algorithms only (slower, bitwise repeatable)", result=False
    )
    compile: bool = flag(False, "compile the network with torch.compile", result=False)
    channels_last: str = flag(
        "auto",
        "keep activations in channels-last memory format; auto: where it was measured to be faster",
        choices=("auto", "True", "False"),
        result=False,
    )
    startup_timeout: float = flag(
        60.0,
        "how long ranks wait for each other at start-up, in downloads and in saves",
        unit="minutes",
        result=False,
    )
    step_timeout: float = flag(
        10.0, "how long ranks wait for each other within a step", unit="minutes", result=False
    )
    explicit: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """Names that a flag, --config or a preset set; what a checkpoint says does not replace these. Not a flag."""


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    network: str = flag("adm", "network architecture", choices=NETWORKS)
    precond: str = flag(
        "edm",
        "scalings around the network, a column of EDM's Table 1; in edm_train also that column's noise levels "
        "and weighting, unless they are given",
        choices=PRECONDS,
    )
    diffusion_schedule: str = flag(
        "",
        "edm_train, progdist: train in z = alpha x + sigma e with time uniform on this schedule; empty: in x + sigma e",
        choices=("", "cosine", "vp", "ve"),
    )
    sigma_min: float = flag(0.002, "smallest noise level", unit="standard deviation of images in [-1, 1]")
    sigma_max: float = flag(80.0, "largest noise level", unit="standard deviation of images in [-1, 1]")
    sigma_data: float = flag(0.5, "standard deviation of the data that the preconditioning assumes")
    rho: float = flag(7.0, "exponent of the grid of noise levels")
    image_size: int = flag(64, "side of the images", unit="pixels")
    in_channels: int = flag(0, "image channels, 1 or 3; 0: from the data")
    num_classes: int = flag(0, "number of classes with --class_cond; 0: from the data")
    num_channels: int = flag(128, "width of the network's finest level", unit="channels")
    num_res_blocks: int = flag(2, "residual blocks per level on the way down")
    num_heads: int = flag(4, "attention heads, unless --num_head_channels is given")
    num_heads_upsample: int = flag(-1, "attention heads on the way up; -1: as --num_heads")
    num_head_channels: int = flag(-1, "width of an attention head; -1: from --num_heads", unit="channels")
    attention_resolutions: str = flag(
        DEFAULT_ATTENTION,
        "image sides at which the network has attention; of the default those that it has",
        unit="pixels",
    )
    channel_mult: str = flag(
        "", "width of each level, finest first; empty: the default for image_size", unit="num_channels"
    )
    dropout: float = flag(0.0, "dropout probability in residual blocks")
    class_cond: bool = flag(False, "condition on class labels")
    use_checkpoint: bool = flag(
        False, "recompute activations in the backward pass to save memory", result=False
    )
    use_scale_shift_norm: bool = flag(True, "time embedding scales and shifts the norms (False: is added)")
    resblock_updown: bool = flag(False, "resample inside residual blocks")
    use_fp16: bool = flag(False, "same as --precision fp16")
    use_new_attention_order: bool = flag(
        False,
        "accepted for old command lines; the order is always that of the released weights",
        result=False,
    )
    augment_dim: int = flag(
        0, "augmentation labels that the network takes (ncsnpp, ddpmpp); sampling passes none"
    )
    time_scale: float = flag(
        0.0,
        "clock of the network, c_noise = time_scale * ln(sigma) / 4; 0: the architecture's own (adm 1000, others 1)",
    )
    learn_sigma: bool = flag(False, "twice the output channels; the second half is not used")
    weight_schedule: str = flag("karras", "weighting of the loss over noise levels", choices=WEIGHT_SCHEDULES)
    boundary: str = flag(
        "skip",
        "how a consistency function becomes the identity at sigma_min: Eq. 5 or Eq. 4",
        choices=("skip", "piecewise"),
    )
    c_out_formula: str = flag(
        "code",
        "denominator of c_out: sigma^2 as in code and paper, or (sigma - sigma_min)^2",
        choices=("code", "printed"),
    )


@dataclass(frozen=True)
class DataFlags:
    """Data"""

    data_dir: str = flag("", "training images: folder, zip or npz, local or remote (gs://, az://)")
    labels: str = flag(
        "auto",
        "where class labels come from: sub-folders, file-name prefixes, dataset.json, or the first of json, folder, "
        "prefix that there is",
        choices=("auto", "folder", "prefix", "json"),
    )
    composite: str = flag(
        "drop",
        "background under transparent pixels; drop forgets the alpha channel",
        choices=("drop", "white", "black"),
    )
    random_crop: bool = flag(False, "crop at random instead of at the centre")
    random_flip: bool = flag(True, "mirror half of the images")
    skip_unreadable: bool = flag(False, "leave out damaged images instead of stopping at the first")
    num_workers: int = flag(
        4, "processes per rank that decode images; 0: in the training process", result=False
    )


@dataclass(frozen=True)
class OptimFlags:
    """Optimisation"""

    schedule_sampler: str = flag(
        "uniform",
        "how training draws noise levels",
        choices=("uniform", "loss-second-moment", "lognormal", "lognormal-even"),
    )
    lr: float = flag(1e-4, "learning rate", unit="per step")
    lr_schedule: str = flag(
        "",
        "decay of the learning rate; late_decay: flat for a fifth, then linear to a tenth; "
        "empty: linear if --lr_anneal_steps is given, else constant",
        choices=("", "constant", "linear", "late_decay"),
    )
    lr_anneal_steps: int = flag(
        0,
        "length of the learning rate's decay; 0: a stage of progdist, else --total_training_steps",
        unit="steps",
    )
    lr_warmup_steps: int = flag(0, "linear warm-up of the learning rate", unit="steps")
    optimizer: str = flag("radam", "optimiser", choices=("radam", "adam", "adamw"))
    beta1: float = flag(0.9, "decay of the optimiser's first moment")
    beta2: float = flag(0.999, "decay of the optimiser's second moment")
    adam_eps: float = flag(1e-8, "added to the root of the second moment")
    weight_decay: float = flag(0.0, "weight decay (decoupled for adamw)", unit="per step and learning rate")
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0: no limit")
    global_batch_size: int = flag(2048, "images per step over all ranks", unit="images")
    batch_size: int = flag(
        -1, "images per step and rank; replaces --global_batch_size; -1: from it", unit="images"
    )
    microbatch: int = flag(
        -1,
        "images per forward pass; gradients are averaged over the batch; -1: the whole batch",
        unit="images",
        result=False,
    )
    ema_rate: str = flag(
        "0.9999", "decay rates of the averages of the weights that are kept, as a list", unit="per step"
    )
    ema_warmup: bool = flag(False, "bound each rate by (1 + step) / (10 + step)")
    ema_device: str = flag(
        "auto",
        "where the averages are kept; cpu: in host memory, which spares a GPU's; auto: beside the weights",
        choices=("auto", "cpu"),
        result=False,
    )
    shard_optimizer: bool = flag(
        False, "share the optimizer's moments and the averages out over the ranks; same numbers", result=False
    )
    fp16_scale_growth: float = flag(1e-3, "growth of log2 of the fp16 loss scale", unit="per good step")
    seed: int = flag(0, "seed of initial weights and of every draw in training")


@dataclass(frozen=True)
class LoopFlags:
    """Training loop"""

    log_interval: int = flag(10, "steps between log lines", unit="steps", result=False)
    save_interval: int = flag(
        10000, "steps between checkpoints; -1: one at the end", unit="steps", result=False
    )
    resume_checkpoint: str = flag("", "checkpoint or model file of another run to go on from")
    resume: str = flag(
        "auto",
        "go on from the newest checkpoint in the run directory: if there is one, never, or fail without one",
        choices=("auto", "never", "must"),
        result=False,
    )
    resume_with_changes: bool = flag(
        False, "resume although flags that change the result differ", result=False
    )
    keep_last: int = flag(0, "checkpoints to keep, newest first; 0: all", result=False)
    keep_every: int = flag(0, "with --keep_last, also keep each multiple of this", unit="steps", result=False)
    mirror: str = flag(
        "",
        "other folder, local or remote (gs://, az://), that gets a copy of each checkpoint and of the logs, and from "
        "which an empty run directory takes the newest",
        result=False,
    )
    async_save: bool = flag(True, "write checkpoints in the background", result=False)
    on_save_error: str = flag("stop", "what a failed save does", choices=("stop", "warn"), result=False)
    max_hours: float = flag(0.0, "save and stop after this time; 0: no limit", unit="hours", result=False)
    max_bad_steps: int = flag(
        50,
        "stop after this many steps in a row without finite loss and gradients",
        unit="steps",
        result=False,
    )
    tensorboard: bool = flag(False, "also log for TensorBoard", result=False)
    preview_count: int = flag(
        16, "images in the sample grid that training draws; 0: none", unit="images", result=False
    )
    preview_interval: int = flag(
        0, "steps between sample grids; 0: at each checkpoint", unit="steps", result=False
    )


@dataclass(frozen=True)
class ConsistencyFlags:
    """Consistency and distillation"""

    training_mode: str = flag("consistency_distillation", "objective", choices=MODES)
    teacher_model_path: str = flag("", "EDM teacher: file or run directory")
    teacher_dropout: float = flag(0.1, "dropout of the teacher network (it never drops in distillation)")
    init: str = flag(
        "auto",
        "initial weights; auto: the teacher's if there is a teacher path, else random",
        choices=("auto", "random", "teacher"),
    )
    target_ema_mode: str = flag(
        "fixed", "mu of the target network: --start_ema, or mu(k)", choices=("fixed", "adaptive")
    )
    start_ema: float = flag(0.0, "mu of the target network, or mu0 of mu(k)", unit="per step")
    mu_formula: str = flag(
        "code",
        "mu(k) over N(k) - 1 as the released models, or over N(k) as the paper prints it",
        choices=("code", "paper"),
    )
    scale_mode: str = flag(
        "fixed",
        "grid points: --start_scales, N(k), or halving intervals",
        choices=("fixed", "progressive", "progdist"),
    )
    start_scales: int = flag(
        40, "grid points N, s0 of N(k), or first number of intervals of progdist; continuous: of its samples"
    )
    end_scales: int = flag(40, "s1 of N(k)")
    distill_steps_per_iter: int = flag(
        50000, "length of a stage of progdist; the last two take double", unit="steps"
    )
    loss_norm: str = flag(
        "lpips", "distance between images (lpips-max: VGG with max pooling)", choices=LOSS_NORMS
    )
    stop_grad: bool = flag(
        True, "continuous: hold the derivative along the trajectory constant; False: distillation only"
    )
    clock: str = flag(
        "t",
        "continuous: the derivative is by the noise level, as in the released models, or by the position on the grid, "
        "the limit of the discrete losses",
        choices=("t", "grid"),
    )
    ode_solver: str = flag("heun", "one-step solver of consistency distillation", choices=("heun", "euler"))
    lpips_path: str = flag("", "folder with LPIPS weights; empty: torch's hub cache", result=False)
    lpips_size: int = flag(224, "side to which LPIPS enlarges images below 256; 0: never", unit="pixels")
    lpips_precision: str = flag("fp32", "arithmetic of LPIPS", choices=PRECISIONS)
    total_training_steps: int = flag(600000, "steps to train, K of N(k)", unit="steps")


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling"""

    generator: str = flag(
        "indexed", "source of noise; indexed: sample i depends on (seed, i) only", choices=GENERATORS
    )
    seed: int = flag(42, "seed of noise and labels")
    clip_denoised: bool = flag(True, "clamp every prediction to [-1, 1]")
    num_samples: int = flag(10000, "images to draw", unit="images")
    batch_size: int = flag(16, "images per batch and rank", unit="images", result=False)
    sampler: str = flag("heun", "sampler", choices=SAMPLERS)
    s_churn: float = flag(0.0, "noise that heun and dpm add back, over all steps")
    s_tmin: float = flag(0.0, "smallest noise level with churn")
    s_tmax: float = flag(math.inf, "largest noise level with churn")
    s_noise: float = flag(1.0, "scale of churn's noise")
    steps: int = flag(40, "points of the grid of noise levels (progdist: intervals)")
    model_path: str = flag("", "model: file or run directory")
    weights: str = flag("", "raw, ema:RATE or target; empty: the slowest average that the file has")
    classes: str = flag("", "labels to draw in turn, as a list; empty: at random")


@dataclass(frozen=True)
class SolverFlags:
    """Samplers of the family"""

    time_steps: str = flag(
        "",
        "which noise levels heun, euler, dpm, ancestral and general visit: a column of EDM's Table 1; "
        "empty: as edm does",
        choices=("", *PRECONDS),
    )
    noise_schedule: str = flag(
        "linear",
        "general: sigma(t), whose time the solver steps in",
        choices=("linear", "ve", "vp", "cosine"),
    )
    state_scale: str = flag("none", "general: s(t) of the state; vp: unit variance", choices=("none", "vp"))
    solver_order: int = flag(2, "general: order of the solver, 1 or 2")
    solver_alpha: float = flag(1.0, "general: second order: 1 Heun, 0.5 midpoint, 0.667 Ralston")
    sde: str = flag("ve", "pc, rk45: the SDE", choices=("ve", "vp", "subvp", "edm"))
    predictor: str = flag(
        "reverse_diffusion",
        "pc: predictor",
        choices=("reverse_diffusion", "euler_maruyama", "ancestral", "none"),
    )
    corrector: str = flag("langevin", "pc: corrector", choices=("langevin", "annealed_langevin", "none"))
    corrector_steps: int = flag(1, "pc: steps of the corrector at each level")
    snr: float = flag(0.16, "pc: signal-to-noise ratio of a Langevin step")
    tolerance: float = flag(1e-5, "rk45: relative and absolute tolerance")


@dataclass(frozen=True)
class GuidanceFlags:
    """Classifier guidance"""

    classifier_path: str = flag("", "classifier of noisy images: file or run directory; empty: no guidance")
    classifier_scale: float = flag(1.0, "weight of the classifier's gradient")
    classifier_width: int = flag(128, "guided-diffusion's classifier: channels of its first level")
    classifier_depth: int = flag(
        2, "guided-diffusion's classifier: blocks per level; 4 for 64x64_classifier.pt"
    )
    classifier_attention_resolutions: str = flag(
        "32,16,8", "guided-diffusion's classifier: resolutions with attention"
    )
    classifier_pool: str = flag("attention", "guided-diffusion's classifier: pooling", choices=("attention",))
    classifier_use_scale_shift_norm: bool = flag(
        True, "guided-diffusion's classifier: its embedding scales and shifts norms"
    )
    classifier_resblock_updown: bool = flag(True, "guided-diffusion's classifier: residual blocks resample")
    classifier_noise_schedule: str = flag(
        "",
        "guided-diffusion's classifier: schedule of its times; empty: cosine for 64 pixels, else linear",
        choices=("", "cosine", "linear"),
    )
