"""Groups of flags that the scripts' configurations are made of: one field is one flag. Imports no torch.

A field knows its help text, unit, choices, bounds, and whether it can change the result of a run (`cm.config.fields`):
what cannot (intervals, paths of output, workers) does not count when two runs are compared. Options that belong to one
objective, sampler, distance or task stand beside its row (`cm.config.options`). Lists are written as text;
`cm.config.parsing` reads them.
"""

from dataclasses import dataclass, field

from cm.config.choices import (
    DIFFUSION_SCHEDULES,
    GENERATORS,
    LR_SCHEDULES,
    ODE_SOLVERS,
    OPTIMIZERS,
    PRECISIONS,
)
from cm.config.fields import flag
from cm.config.options import ChurnOptions
from cm.config.parsing import DEFAULT_ATTENTION
from cm.config.rows import (
    DISTANCES,
    NETWORKS,
    NOISE_LEVELS,
    OBJECTIVES,
    PAIRS,
    PRECONDS,
    SAMPLERS,
    WEIGHTINGS,
)

WEIGHTS = "raw, ema:RATE, posthoc:LENGTH or target; empty: the slowest average that the file has"


@dataclass(frozen=True)
class RunFlags:
    """Run"""

    preset: str = flag(
        "",
        "named experiment whose values replace the defaults (cm presets lists them); auto: chosen for the data, the "
        "teacher and this machine",
        result=False,
        main=True,
    )
    variant: str = flag(
        "release",
        "the preset as in the published command lines or as in the paper's Table 3",
        choices=("release", "paper"),
        result=False,
    )
    config: str = flag(
        "", "JSON or YAML file of flags, or the config.json of a run; flags win over it", result=False
    )
    dry_run: bool = flag(
        False, "print the resolved configuration as JSON, touch nothing and exit", result=False, main=True
    )
    out_dir: str = flag(
        "",
        "directory of everything this run writes; empty: $OPENAI_LOGDIR, else runs/<preset or script>-<hash>",
        result=False,
        main=True,
    )
    device: str = flag(
        "auto",
        "where to compute; auto takes CUDA if there is any",
        choices=("auto", "cpu", "cuda"),
        result=False,
        main=True,
    )
    precision: str = flag(
        "",
        "arithmetic of the network's torso; empty: as --use_fp16 says",
        choices=lambda: ("", *PRECISIONS),
        main=True,
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
        above=0,
    )
    step_timeout: float = flag(
        10.0, "how long ranks wait for each other within a step", unit="minutes", result=False, above=0
    )
    plugin: str = flag(
        "",
        "modules of your own that add objectives, samplers, networks ...: files or importable names, as a list",
        result=False,
        main=True,
    )
    explicit: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """Names that a flag, --config or a preset set; what a checkpoint says does not replace these. Not a flag."""


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    network: str = flag("adm", "network architecture", registry=NETWORKS, main=True)
    precond: str = flag(
        "edm",
        "scalings around the network, a column of EDM's Table 1; in edm_train also that column's noise levels "
        "and weighting, unless they are given",
        choices=PRECONDS.names,
    )
    diffusion_schedule: str = flag(
        "",
        "edm_train, progdist, multistep: train in z = alpha x + sigma e with time uniform on this schedule; empty: in "
        "x + sigma e",
        choices=lambda: ("", *DIFFUSION_SCHEDULES),
    )
    sigma_min: float = flag(
        0.002, "smallest noise level", unit="standard deviation of images in [-1, 1]", above=0
    )
    sigma_max: float = flag(80.0, "largest noise level", unit="as --sigma_min", high=1e18)
    sigma_data: float = flag(0.5, "standard deviation of the data that the preconditioning assumes", above=0)
    rho: float = flag(7.0, "exponent of the grid of noise levels", low=1)
    image_size: int = flag(
        64, "side of the images; 0: from the data or the model", unit="pixels", main=True, low=0
    )
    patch_size: int = flag(
        1,
        "side of the patches whose pixels are the network's channels: 2 quarters the work; 1: none. Levels and "
        "--attention_resolutions count patches",
        unit="pixels",
        low=1,
    )
    in_channels: int = flag(0, "image channels, 1 or 3; 0: from the data", low=0)
    num_classes: int = flag(0, "number of classes with --class_cond; 0: from the data", low=0)
    num_channels: int = flag(128, "width of the network's finest level", unit="channels", main=True, low=1)
    num_res_blocks: int = flag(2, "residual blocks per level on the way down", main=True, low=1)
    num_heads: int = flag(4, "attention heads, unless --num_head_channels is given", low=1)
    num_heads_upsample: int = flag(
        -1, "attention heads on the way up; -1: as --num_heads", low=1, unset=(-1,)
    )
    num_head_channels: int = flag(
        -1, "width of an attention head; -1: from --num_heads", unit="channels", low=1, unset=(-1,)
    )
    attention_resolutions: str = flag(
        DEFAULT_ATTENTION,
        "image sides at which the network has attention; of the default those that it has",
        unit="pixels",
    )
    channel_mult: str = flag(
        "",
        "width of each level, finest first; empty: the default for image_size",
        unit="num_channels",
        main=True,
    )
    dropout: float = flag(0.0, "dropout probability in residual blocks", low=0, below=1)
    class_cond: bool = flag(False, "condition on class labels", main=True)
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
        0, "augmentation labels that the network takes (ncsnpp, ddpmpp); sampling passes none", low=0
    )
    time_scale: float = flag(
        0.0,
        "clock of the network, c_noise = time_scale * ln(sigma) / 4; 0: the architecture's own (adm 1000, others 1)",
        low=0,
    )
    learn_sigma: bool = flag(False, "twice the output channels; the second half is not used")
    weight_schedule: str = flag("karras", "weighting of the loss over noise levels", registry=WEIGHTINGS)
    boundary: str = flag(
        "skip",
        "where and how a consistency function is the identity: at sigma_min by Eq. 5 or Eq. 4, at 0 by EDM's scalings",
        choices=("skip", "piecewise", "zero"),
    )
    c_out_formula: str = flag(
        "code",
        "denominator of c_out: sigma^2 as in code and paper, or (sigma - sigma_min)^2",
        choices=("code", "printed"),
    )
    class_names: tuple[str, ...] = field(default=(), repr=False, compare=False)
    # Least and largest scale of guidance that the network is told, where training drew it; from the model's file
    told_scales: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """What the classes are called, by the data or the model file; empty: not known. Not a flag."""


@dataclass(frozen=True)
class DataFlags:
    """Data"""

    data_dir: str = flag("", "training images: folder, zip or npz, local or remote (gs://, az://)", main=True)
    labels: str = flag(
        "auto",
        "where class labels come from: sub-folders, file-name prefixes, dataset.json, or the first of json, folder, "
        "prefix that there is; none: nowhere",
        choices=("auto", "folder", "prefix", "json", "none"),
        main=True,
    )
    composite: str = flag(
        "drop",
        "background under transparent pixels; drop forgets the alpha channel",
        choices=("drop", "white", "black"),
    )
    label_dropout: float = flag(
        0.0,
        "probability with which training hides the class of an image, for --guidance",
        low=0,
        below=1,
    )
    random_crop: bool = flag(False, "crop at random instead of at the centre")
    random_flip: bool = flag(True, "mirror half of the images")
    skip_unreadable: bool = flag(False, "leave out damaged images instead of stopping at the first")
    num_workers: int = flag(
        4, "processes per rank that decode images; 0: in the training process", result=False, low=0
    )


@dataclass(frozen=True)
class OptimFlags:
    """Optimisation"""

    schedule_sampler: str = flag("uniform", "how training draws noise levels", choices=NOISE_LEVELS.names)
    lr: float = flag(1e-4, "learning rate", unit="per step", main=True, low=0)
    lr_schedule: str = flag(
        "",
        "decay of the learning rate; late_decay: flat for a fifth, then linear to a tenth; "
        "empty: linear if --lr_anneal_steps is given, else constant",
        choices=lambda: ("", *LR_SCHEDULES),
    )
    lr_anneal_steps: int = flag(
        0,
        "length of the learning rate's decay; 0: a stage of progdist, else --total_training_steps",
        unit="steps",
        low=0,
    )
    lr_warmup_steps: int = flag(0, "linear warm-up of the learning rate", unit="steps", low=0)
    optimizer: str = flag("radam", "optimiser", choices=OPTIMIZERS.names)
    beta1: float = flag(0.9, "decay of the optimiser's first moment", low=0, below=1)
    beta2: float = flag(0.999, "decay of the optimiser's second moment", low=0, below=1)
    adam_eps: float = flag(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = flag(
        0.0, "weight decay (decoupled for adamw)", unit="per step and learning rate", low=0
    )
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0: no limit", low=0)
    global_batch_size: int = flag(2048, "images per step over all ranks", unit="images", main=True, low=1)
    batch_size: int = flag(
        -1,
        "images per step and rank; replaces --global_batch_size; -1: from it",
        unit="images",
        low=1,
        unset=(-1,),
    )
    microbatch: int = flag(
        -1,
        "images per forward pass; gradients are averaged over the batch; -1: the whole batch",
        unit="images",
        result=False,
        main=True,
        low=1,
        unset=(-1,),
    )
    ema_rate: str = flag(
        "0.9999",
        "decay rates of the averages of the weights that are kept, as a list",
        unit="per step",
        main=True,
    )
    ema_warmup: bool = flag(False, "bound each rate by (1 + step) / (10 + step)")
    ema_profiles: str = flag(
        "",
        "relative lengths of power-function averages whose snapshots give averages of any length after training, as "
        "a list: 0.05,0.10; empty: none",
    )
    ema_device: str = flag(
        "auto",
        "where the averages are kept; cpu: in host memory, which spares a GPU's; auto: beside the weights",
        choices=("auto", "cpu"),
        result=False,
    )
    # optimizer: moments and averages; fsdp: weights and gradients, too
    shard: str = flag("none", "what the ranks share out", choices=("none", "optimizer", "fsdp"), result=False)
    fp16_scale_growth: float = flag(
        1e-3, "growth of log2 of the fp16 loss scale", unit="per good step", low=0
    )
    seed: int = flag(0, "seed of initial weights and of every draw in training", main=True, low=0)


@dataclass(frozen=True)
class LoopFlags:
    """Training loop"""

    log_interval: int = flag(10, "steps between log lines", unit="steps", result=False, main=True, low=1)
    save_interval: int = flag(
        10000,
        "steps between checkpoints; -1: one at the end",
        unit="steps",
        result=False,
        main=True,
        low=1,
        unset=(-1,),
    )
    resume_checkpoint: str = flag("", "checkpoint or model file of another run to go on from")
    resume: str = flag(
        "auto",
        "go on from the newest checkpoint in the run directory: if there is one, never, or fail without one",
        choices=("auto", "never", "must"),
        result=False,
        main=True,
    )
    resume_with_changes: bool = flag(
        False, "resume although flags that change the result differ", result=False
    )
    keep_last: int = flag(0, "checkpoints to keep, newest first; 0: all", result=False, low=0)
    keep_every: int = flag(
        0, "with --keep_last, also keep each multiple of this", unit="steps", result=False, low=0
    )
    mirror: str = flag(
        "",
        "other folder, local or remote (gs://, az://), that gets a copy of each checkpoint and of the logs, and from "
        "which an empty run directory takes the newest",
        result=False,
    )
    async_save: bool = flag(True, "write checkpoints in the background", result=False)
    on_save_error: str = flag("stop", "what a failed save does", choices=("stop", "warn"), result=False)
    max_hours: float = flag(
        0.0, "save and stop after this time; 0: no limit", unit="hours", result=False, low=0
    )
    max_bad_steps: int = flag(
        50,
        "stop after this many steps in a row without finite loss and gradients",
        unit="steps",
        result=False,
        low=1,
    )
    tensorboard: bool = flag(False, "also log for TensorBoard", result=False)
    wandb: str = flag("", "also log to this project of Weights & Biases", result=False)
    preview_count: int = flag(
        16, "images in the sample grid that training draws; 0: none", unit="images", result=False, low=0
    )
    preview_interval: int = flag(
        0, "steps between sample grids; 0: at each checkpoint", unit="steps", result=False, main=True, low=0
    )


@dataclass(frozen=True)
class ConsistencyFlags:
    """Consistency and distillation"""

    training_mode: str = flag(
        "consistency_distillation",
        "objective",
        choices=lambda: [n for n, row in OBJECTIVES.items() if row.script == "cm_train"],
        registry=OBJECTIVES,
        main=True,
    )
    teacher_model_path: str = flag("", "EDM teacher: file or run directory", main=True)
    teacher_dropout: float = flag(
        0.1, "dropout of the teacher network (it never drops in distillation)", low=0, below=1
    )
    init: str = flag(
        "auto",
        "initial weights; auto: the teacher's if there is a teacher path, else random",
        choices=("auto", "random", "teacher"),
        main=True,
    )
    target_ema_mode: str = flag(
        "fixed", "mu of the target network: --start_ema, or mu(k)", choices=("fixed", "adaptive"), main=True
    )
    start_ema: float = flag(0.0, "mu of the target network, or mu0 of mu(k)", unit="per step", main=True)
    mu_formula: str = flag(
        "code",
        "mu(k) over N(k) - 1 as the released models, or over N(k) as the paper prints it",
        choices=("code", "paper"),
    )
    scale_mode: str = flag(
        "fixed",
        "grid points: --start_scales, N(k), N(k) of iCT, or halving intervals",
        choices=("fixed", "progressive", "doubling", "progdist"),
        main=True,
    )
    start_scales: int = flag(
        40,
        "grid points N, s0 of N(k), or first number of intervals of progdist; continuous: of its samples",
        main=True,
        low=1,
    )
    end_scales: int = flag(40, "s1 of N(k)", main=True, low=1)
    distill_steps_per_iter: int = flag(
        50000, "length of a stage of progdist; the last two take double", unit="steps", low=1
    )
    pairs: str = flag("grid", "how pairs of noise levels t > r are drawn", registry=PAIRS)
    loss_norm: str = flag(
        "lpips", "distance between images (lpips-max: VGG with max pooling)", registry=DISTANCES, main=True
    )
    ode_solver: str = flag("heun", "one-step solver of consistency distillation", choices=ODE_SOLVERS.names)
    total_training_steps: int = flag(600000, "steps to train, K of N(k)", unit="steps", main=True, low=0)


@dataclass(frozen=True)
class SamplingFlags(ChurnOptions):
    """Sampling"""

    generator: str = flag(
        "indexed",
        "source of noise; indexed: sample i depends on (seed, i) only",
        choices=GENERATORS.names,
        main=True,
    )
    seed: int = flag(42, "seed of noise and labels", main=True, low=0)
    clip_denoised: bool = flag(True, "clamp every prediction to [-1, 1]", main=True)
    num_samples: int = flag(10000, "images to draw", unit="images", main=True, low=1)
    batch_size: int = flag(16, "images per batch and rank", unit="images", result=False, main=True, low=1)
    sampler: str = flag("heun", "sampler", registry=SAMPLERS, main=True)
    steps: int = flag(40, "points of the grid of noise levels (progdist: intervals)", main=True, low=1)
    model_path: str = flag("", "model: file or run directory", main=True)
    weights: str = flag("", WEIGHTS, main=True)
    classes: str = flag("", "labels to draw in turn, as a list; empty: at random", main=True)


@dataclass(frozen=True)
class GuidanceFlags:
    """Guidance"""

    guidance: str = flag(
        "1",
        "scale of guidance, of samples or of the teacher; 2,0.3,5: only between these noise levels; 1:4: drawn between "
        "these and told to the student; 1: a model as it is, or a classifier's own gradient; see --guide",
        main=True,
    )
    guide: str = flag(
        "",
        "file or run that guides: a classifier of noisy images, or a smaller or earlier model; empty: the model "
        "itself without a class, after --label_dropout",
    )
