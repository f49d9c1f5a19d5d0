"""The built-in rows of the registry. A newcomer adds one here, or from outside with `cm.register`. Imports no torch."""

from cm.config import options
from cm.config.registry import (
    DataSource,
    Distance,
    Metric,
    Network,
    NoiseLevels,
    Objective,
    Pairs,
    Precond,
    Registry,
    Row,
    Sampler,
    Task,
    Weighting,
)

# Facts that several objectives share
_CONSISTENCY = {"consistency": True, "sampler": "onestep"}
_CONTINUOUS = {**_CONSISTENCY, "continuous": True}
_TRIGFLOW = {**_CONTINUOUS, "make": "cm.objectives.trigflow:trigflow", "boundary": "zero"}
_TRIGFLOW |= {"compares": False, "options": options.TrigFlowOptions}
_FLOW_MAP = {"compares": False, "sampler": "jumps", "continuous": True, "two_times": True}
_TRAJECTORIES = {"sampler": "gamma", "two_times": True, "target": True}
_TRAJECTORIES |= {"make": "cm.objectives.ctm:trajectories", "recipe": "cm.config.auto:trajectories"}
_SEGMENTS = {"sampler": "progdist", "segments": True}

OBJECTIVES: Registry[Objective] = Registry(
    "training_mode",
    {
        "consistency_distillation": Objective(
            make="cm.objectives.consistency:consistency",
            **_CONSISTENCY,
            teacher=True,
            recipe="cm.config.auto:distillation",
        ),
        "consistency_training": Objective(
            make="cm.objectives.consistency:consistency", **_CONSISTENCY, recipe="cm.config.auto:isolation"
        ),
        "continuous_distillation": Objective(
            make="cm.objectives.continuous:continuous",
            **_CONTINUOUS,
            teacher=True,
            options=options.ContinuousOptions,
        ),
        "continuous_training": Objective(
            make="cm.objectives.continuous:continuous", **_CONTINUOUS, options=options.ContinuousOptions
        ),
        "progdist": Objective(
            make="cm.objectives.progressive:progressive",
            teacher=True,
            sampler="progdist",
            stages=True,
            recipe="cm.config.auto:progressive",
        ),
        "ctm": Objective(
            **_TRAJECTORIES,
            teacher=True,
            options=options.TrajectoryOptions,
        ),
        "ctm_training": Objective(**_TRAJECTORIES, options=options.SelfTrajectoryOptions),
        "multistep_distillation": Objective(
            make="cm.objectives.multistep:multistep",
            **_SEGMENTS,
            teacher=True,
            options=options.SegmentDistillationOptions,
        ),
        "multistep_training": Objective(
            make="cm.objectives.multistep:multistep", **_SEGMENTS, options=options.SegmentOptions
        ),
        "edm": Objective(
            make="cm.objectives.edm:denoising",
            compares=False,
            script="edm_train",
            recipe="cm.config.auto:edm",
        ),
        "tcm": Objective(
            make="cm.objectives.truncated:truncated",
            **_CONSISTENCY,
            teacher=True,
            learns_from="consistency",
            boundary="zero",
            lowest="transition_t",
            options=options.TruncatedOptions,
        ),
        "sct": Objective(**_TRIGFLOW),
        "scd": Objective(**_TRIGFLOW, teacher=True),
        "flow_map": Objective(
            make="cm.objectives.flow_map:flow_map", **_FLOW_MAP, options=options.SelfFlowMapOptions
        ),
        "flow_map_distillation": Objective(
            make="cm.objectives.flow_map:distillation",
            **_FLOW_MAP,
            teacher=True,
            options=options.FlowMapOptions,
        ),
        "improved_meanflow": Objective(
            make="cm.objectives.improved_meanflow:improved_meanflow",
            **_FLOW_MAP,
            told_guidance=True,
            options=options.ImprovedMeanFlowOptions,
        ),
        "meanflow": Objective(
            make="cm.objectives.meanflow:meanflow",
            **_FLOW_MAP,
            options=options.MeanFlowOptions,
        ),
        "classifier": Objective(
            make="cm.objectives.classifier:classification",
            compares=False,
            script="classifier_train",
            draws=False,
            recipe="cm.config.auto:classifier",
        ),
    },
)

SAMPLERS: Registry[Sampler] = Registry(
    "sampler",
    {
        "heun": Sampler(
            make="cm.sampling.ode:sample_heun", order=2, other_grids=True, options=options.ChurnOptions
        ),
        "euler": Sampler(make="cm.sampling.ode:sample_euler", order=1, other_grids=True),
        "dpm": Sampler(
            make="cm.sampling.ode:sample_dpm", order=2, other_grids=True, options=options.ChurnOptions
        ),
        "ancestral": Sampler(make="cm.sampling.ancestral:sample_euler_ancestral", other_grids=True),
        "onestep": Sampler(
            make="cm.sampling.consistency:sample_onestep", guidance=False, reads="consistency", visits=1
        ),
        "multistep": Sampler(
            make="cm.sampling.consistency:sample_multistep",
            grid="ts",
            guidance=False,
            reads="consistency",
        ),
        "progdist": Sampler(make="cm.sampling.consistency:sample_progdist", grid="intervals", guidance=False),
        "gamma": Sampler(
            make="cm.sampling.gamma:sample_gamma",
            grid="to_lowest",
            guidance=False,
            reads="jumps",
            options=options.GammaOptions,
        ),
        "addim": Sampler(
            make="cm.sampling.ode:sample_addim", order=1, other_grids=True, options=options.AddimOptions
        ),
        "jumps": Sampler(
            make="cm.sampling.jumps:sample_jumps",
            grid="jumps",
            guidance=False,
            reads="jumps",
            options=options.JumpOptions,
        ),
        "general": Sampler(
            make="cm.sampling.general:sample_general",
            order=2,
            other_grids=True,
            options=options.GeneralOptions,
        ),
        "pc": Sampler(
            make="cm.sampling.predictor_corrector:sample_pc",
            grid="sde",
            options=options.PredictorCorrectorOptions,
        ),
        "rk45": Sampler(
            make="cm.sampling.predictor_corrector:sample_rk45", options=options.RungeKuttaOptions
        ),
    },
)

# Levels that a sampler walks along: make(steps, sigma_min, sigma_max, rho, **options), the last is where it ends
GRIDS: Registry[Row] = Registry(
    "grid",
    {
        "karras": Row(make="cm.sampling.levels:karras"),
        "ts": Row(make="cm.sampling.levels:chosen"),
        "intervals": Row(make="cm.sampling.levels:intervals"),
        "to_lowest": Row(make="cm.sampling.levels:to_lowest"),
        "sde": Row(make="cm.sampling.levels:of_sde"),
        "jumps": Row(make="cm.sampling.levels:of_jumps"),
    },
)

# --time_steps: other grids, columns of EDM's Table 1: make(n, sigma_min, sigma_max, rho)
TIME_STEPS: Registry[Row] = Registry(
    "time_steps",
    {name: Row(make=f"cm.diffusion.noise_schedules:{name}_steps") for name in ("edm", "vp", "ve", "iddpm")},
)

NETWORKS: Registry[Network] = Registry(
    "network",
    {
        "adm": Network(
            make="cm.networks.architecture:adm",
            clock=1000.0,
            two_times=True,
            check="cm.config.rules:check_adm",
            classifier="cm.networks.architecture:adm_classifier",
            options=options.DropoutOptions,
        ),
        "ncsnpp": Network(
            make="cm.networks.architecture:ncsnpp",
            augment=True,
            two_times=True,
            options=options.FourierOptions,
        ),
        "ddpmpp": Network(make="cm.networks.architecture:ddpmpp", augment=True, two_times=True),
        "ddpmpp_scm": Network(make="cm.networks.architecture:ddpmpp_scm", augment=True, two_times=True),
        "ddpmpp_meanflow": Network(
            make="cm.networks.architecture:ddpmpp_meanflow", augment=True, two_times=True, told_guidance=True
        ),
        "edm2": Network(
            make="cm.networks.architecture:edm2",
            two_times=True,
            check="cm.config.rules:check_heads",
            options=options.Edm2Options,
        ),
        "edm2_scm": Network(
            make="cm.networks.architecture:edm2_scm",
            two_times=True,
            check="cm.config.rules:check_heads",
            options=options.Edm2Options,
        ),
    },
)

PRECONDS: Registry[Precond] = Registry(
    "precond",
    {
        "edm": Precond(make="cm.diffusion.precond:EDMPrecond", piecewise=True),
        # sigma(t) for t from 1e-5 to 1
        "vp": Precond(
            make="cm.diffusion.precond:vp_column",
            span=(0.001, 152.17),
            training={"schedule_sampler": "vp", "weight_schedule": "snr"},
        ),
        "ve": Precond(
            make="cm.diffusion.precond:ve_column",
            model={"sigma_min": 0.02, "sigma_max": 100.0},
            training={"schedule_sampler": "ve", "weight_schedule": "snr"},
        ),
        # u_999 and u_0
        "iddpm": Precond(
            make="cm.diffusion.precond:iddpm_column",
            span=(0.0064, 20291.2),
            model={"sigma_min": 0.006425412771141183},
            training={"schedule_sampler": "iddpm", "weight_schedule": "snr"},
        ),
        # A network that was trained on z = (1 - t) x0 + t n; noise alone is at an infinite level
        "flow": Precond(make="cm.diffusion.precond:flow_column", model={"sigma_max": 1e6}),
        # A network that was trained in TrigFlow's coordinates
        "trigflow": Precond(make="cm.diffusion.precond:trigflow_column"),
        # The levels of t = 0 and 999
        "ddpm": Precond(
            make="cm.diffusion.precond:ddpm_column",
            span=(0.01, 157.41),
            model={"sigma_min": 0.010000500037503126},
            training={"schedule_sampler": "ddpm", "weight_schedule": "snr"},
        ),
    },
)

DISTANCES: Registry[Distance] = Registry(
    "loss_norm",
    {
        "l1": Distance(make="cm.objectives.distances:L1", curved=False),
        "l2": Distance(make="cm.objectives.distances:L2"),
        "l2-32": Distance(make="cm.objectives.distances:L2At32"),
        "linf": Distance(make="cm.objectives.distances:LInf", curved=False),
        "lpips": Distance(make="cm.objectives.lpips:average_pooled", options=options.LpipsOptions),
        "lpips-max": Distance(make="cm.objectives.lpips:max_pooled", options=options.LpipsOptions),
        "pseudo-huber": Distance(make="cm.objectives.distances:PseudoHuber", options=options.HuberOptions),
    },
)

WEIGHTINGS: Registry[Weighting] = Registry(
    "weight_schedule",
    {
        "snr": Weighting(make="cm.diffusion.weightings:snr_weight"),
        "snr+1": Weighting(make="cm.diffusion.weightings:snr_plus_one"),
        "karras": Weighting(make="cm.diffusion.weightings:karras"),
        "truncated-snr": Weighting(make="cm.diffusion.weightings:truncated_snr"),
        "uniform": Weighting(make="cm.diffusion.weightings:uniform"),
        "inverse-gap": Weighting(make="cm.diffusion.weightings:inverse_gap", pairs=True),
        "jump": Weighting(make="cm.diffusion.weightings:jump", pairs=True),
    },
)

NOISE_LEVELS: Registry[NoiseLevels] = Registry(
    "schedule_sampler",
    {
        "uniform": NoiseLevels(
            make="cm.diffusion.noise_levels:UniformSampler", grid=True, options=options.GridOptions
        ),
        "loss-second-moment": NoiseLevels(
            make="cm.diffusion.noise_levels:LossSecondMomentResampler", grid=True, options=options.GridOptions
        ),
        "lognormal": NoiseLevels(
            make="cm.diffusion.noise_levels:lognormal", options=options.LogNormalOptions
        ),
        "lognormal-even": NoiseLevels(
            make="cm.diffusion.noise_levels:lognormal_even", options=options.LogNormalOptions
        ),
        "vp": NoiseLevels(make="cm.diffusion.noise_levels:vp_levels"),
        "ve": NoiseLevels(make="cm.diffusion.noise_levels:ve_levels"),
        "iddpm": NoiseLevels(make="cm.diffusion.noise_levels:iddpm_uniform_levels"),
        "ddpm": NoiseLevels(make="cm.diffusion.noise_levels:ddpm_uniform_levels"),
    },
)

# How a consistency loss draws its pairs t > r
PAIRS: Registry[Pairs] = Registry(
    "pairs",
    {
        "grid": Pairs(make="cm.objectives.pairs:grid_pairs"),
        "lognormal-grid": Pairs(
            make="cm.objectives.pairs:lognormal_grid_pairs", options=options.PairLevelOptions
        ),
        "ratio": Pairs(make="cm.objectives.pairs:ratio_pairs", options=options.RatioOptions, boundary="zero"),
    },
)

TASKS: Registry[Task] = Registry(
    "task",
    {
        "inpaint": Task(make="cm.commands.edit:inpaint_task", options=options.InpaintTask),
        "colorize": Task(make="cm.commands.edit:colorize_task", options=options.ProjectOptions),
        "superres": Task(make="cm.commands.edit:superres_task", options=options.SuperresOptions),
        "stroke": Task(
            make="cm.commands.edit:free_task", first_level="sigma_start", options=options.StrokeOptions
        ),
        "denoise": Task(
            make="cm.commands.edit:free_task", first_level="sigma", options=options.DenoiseOptions
        ),
        "interpolate": Task(
            make="cm.commands.edit:free_task", first_level="sigma_max", options=options.InterpolateOptions
        ),
    },
)

# Tried in this order; a plug-in's come first
DATA_SOURCES: Registry[DataSource] = Registry(
    "data source",
    {
        "torchvision": DataSource(
            make="cm.data.libraries:TorchvisionSource", matches="cm.data.libraries:is_torchvision", named=True
        ),
        "hf": DataSource(
            make="cm.data.libraries:HuggingFaceSource",
            matches="cm.data.libraries:is_hugging_face",
            named=True,
        ),
        "webdataset": DataSource(
            make="cm.data.webdataset:WebDatasetSource", matches="cm.data.webdataset:is_webdataset", named=True
        ),
        "store": DataSource(make="cm.data.sources:StoreSource", matches="cm.data.sources:is_prepared"),
        "idx": DataSource(make="cm.data.idx:IdxSource", matches="cm.data.idx:is_idx"),
        "folder": DataSource(make="cm.data.sources:FolderSource", matches="cm.storage.filesystem:isdir"),
        "zip": DataSource(make="cm.data.sources:ZipSource", matches="cm.data.sources:is_zip"),
        "named-npz": DataSource(
            make="cm.data.npz_names:NamedNpzSource", matches="cm.data.npz_names:is_named_npz"
        ),
        "npz": DataSource(make="cm.data.sources:NpzSource", matches="cm.data.sources:is_npz"),
    },
)

METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "inception_score": Metric(
            make="evaluations.metrics:inception", title="Inception Score", elsewhere="Classifier score"
        ),
        "fid": Metric(
            make="evaluations.metrics:fid",
            title="FID",
            elsewhere="Fréchet distance",
            needs="pool",
            collective=True,
        ),
        "sfid": Metric(make="evaluations.metrics:sfid", title="sFID", needs="spatial", collective=True),
        "precision": Metric(make="evaluations.metrics:precision", title="Precision", needs="images"),
        "recall": Metric(make="evaluations.metrics:recall", title="Recall", needs="images"),
        "kid": Metric(
            make="evaluations.metrics:kid", title="KID", elsewhere="Kernel distance", digits=6, needs="images"
        ),
        "accuracy": Metric(make="evaluations.metrics:accuracy", title="Accuracy", labels=True),
    },
)
