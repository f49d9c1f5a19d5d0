"""Small choices by name: where each one is implemented. Imports no torch."""

from cm.config.registry import simple

PRECISIONS = simple(
    "precision",
    {"fp32": "torch:float32", "fp16": "torch:float16", "bf16": "torch:bfloat16"},
)
OPTIMIZERS = simple(
    "optimizer",
    {"radam": "torch.optim:RAdam", "adam": "torch.optim:Adam", "adamw": "torch.optim:AdamW"},
)
LR_SCHEDULES = simple(
    "lr_schedule",
    {
        "constant": "cm.training.learning_rate:constant",
        "linear": "cm.training.learning_rate:linear_to_zero",
        "late_decay": "cm.training.learning_rate:late_decay",
        "inverse_sqrt": "cm.training.learning_rate:inverse_sqrt",
    },
)
# One-step solvers of the teacher's flow
ODE_SOLVERS = simple(
    "ode_solver",
    {"heun": "cm.objectives.consistency:heun_step", "euler": "cm.objectives.consistency:euler_step"},
)
# How much a prediction is too smooth: the variance that aDDIM adds back
ADDIM_VARIANCES = simple(
    "addim_variance",
    {
        "snr": "cm.diffusion.ddim:of_snr",
        "error": "cm.diffusion.ddim:of_error",
        "none": "cm.diffusion.ddim:none",
    },
)
# Sources of noise for sampling: make(num_samples, seed)
GENERATORS = simple(
    "generator",
    {
        "indexed": "cm.sampling.noise:indexed",
        "determ": "cm.sampling.noise:DeterministicGenerator",
        "determ-indiv": "cm.sampling.noise:DeterministicIndividualGenerator",
        "dummy": "cm.sampling.noise:dummy",
    },
)
# sigma(t) of the general sampler: make(sigma_min, sigma_max)
NOISE_SCHEDULES = simple(
    "noise_schedule",
    {name: f"cm.diffusion.noise_schedules:{name}_curve" for name in ("linear", "ve", "vp", "cosine")},
)
# s(t) of the general sampler
STATE_SCALES = simple(
    "state_scale",
    {"none": "cm.diffusion.noise_schedules:ConstantScale", "vp": "cm.diffusion.noise_schedules:VPScale"},
)
# Schedules of z = alpha x + sigma e
DIFFUSION_SCHEDULES = simple(
    "diffusion_schedule",
    {
        "cosine": "cm.diffusion.noise_schedules:CosineSchedule",
        "vp": "cm.diffusion.noise_schedules:VPSchedule",
        "ve": "cm.diffusion.alpha_sigma:VARIANCE_EXPLODING",
    },
)
# make(sigma_min, sigma_max)
SDES = simple(
    "sde",
    {
        "ve": "cm.diffusion.sde:ve_sde",
        "vp": "cm.diffusion.sde:vp_sde",
        "subvp": "cm.diffusion.sde:subvp_sde",
        "edm": "cm.diffusion.sde:edm_sde",
    },
)
PREDICTORS = simple(
    "predictor",
    {
        "reverse_diffusion": "cm.sampling.predictor_corrector:reverse_diffusion",
        "euler_maruyama": "cm.sampling.predictor_corrector:euler_maruyama",
        "ancestral": "cm.sampling.predictor_corrector:ancestral",
        "none": "cm.sampling.predictor_corrector:stay",
    },
)
CORRECTORS = simple(
    "corrector",
    {
        "langevin": "cm.sampling.predictor_corrector:langevin_step",
        "annealed_langevin": "cm.sampling.predictor_corrector:annealed_langevin_step",
        "none": "cm.sampling.predictor_corrector:NO_CORRECTION",
    },
)
# Estimates of a divergence
PROBES = simple(
    "probe",
    {
        "rademacher": "cm.sampling.likelihood:rademacher",
        "gaussian": "cm.sampling.likelihood:gaussian",
        "exact": "cm.sampling.likelihood:EXACT",
    },
)
