"""Options that come with a name: dataclasses of flags that belong to rows of the registry. Imports no torch."""

import math
from dataclasses import dataclass

from cm.config.choices import (
    ADDIM_VARIANCES,
    CORRECTORS,
    NOISE_SCHEDULES,
    PRECISIONS,
    PREDICTORS,
    SDES,
    STATE_SCALES,
)
from cm.config.fields import fixed, flag


@dataclass(frozen=True)
class ChurnOptions:
    """Sampling"""

    s_churn: float = flag(0.0, "noise that heun and dpm add back, over all steps", low=0)
    s_tmin: float = flag(0.0, "smallest noise level with churn", low=0)
    s_tmax: float = flag(math.inf, "largest noise level with churn", low=0, finite=False)
    s_noise: float = flag(1.0, "scale of churn's noise", low=0)


@dataclass(frozen=True)
class GeneralOptions(ChurnOptions):
    """Sampler general"""

    noise_schedule: str = flag(
        "linear",
        "sigma(t), whose time the solver steps in; vp runs from --sigma_min to --sigma_max",
        choices=NOISE_SCHEDULES.names,
    )
    state_scale: str = flag("none", "s(t) of the state; vp: unit variance", choices=STATE_SCALES.names)
    solver_order: int = flag(2, "order of the solver, 1 or 2", low=1, high=2, argument="order")
    solver_alpha: float = flag(
        1.0, "second order: 1 Heun, 0.5 midpoint, 0.667 Ralston", above=0, high=1, argument="alpha"
    )


@dataclass(frozen=True)
class SdeOptions:
    """Samplers of SDEs"""

    sde: str = flag("ve", "the SDE", choices=SDES.names)


@dataclass(frozen=True)
class PredictorCorrectorOptions(SdeOptions):
    """Sampler pc"""

    predictor: str = flag("reverse_diffusion", "predictor", choices=PREDICTORS.names)
    corrector: str = flag("langevin", "corrector", choices=CORRECTORS.names)
    corrector_steps: int = flag(1, "steps of the corrector at each level", low=0)
    snr: float = flag(0.16, "signal-to-noise ratio of a Langevin step", low=0)


@dataclass(frozen=True)
class RungeKuttaOptions(SdeOptions):
    """Sampler rk45"""

    tolerance: float = flag(1e-5, "relative and absolute tolerance", above=0)


@dataclass(frozen=True)
class FourierOptions:
    """Network"""

    fourier_scale: float = flag(
        16.0, "standard deviation of the frequencies that embed the noise level; 0.02 in iCT", above=0
    )


@dataclass(frozen=True)
class DropoutOptions:
    """Network"""

    dropout_resolutions: str = flag(
        "", "image sides whose blocks have --dropout, as a list; empty: all", unit="pixels"
    )


@dataclass(frozen=True)
class Edm2Options(DropoutOptions):
    """Network"""

    logvar_channels: int = flag(
        128, "features of the head that learns the logarithm of the loss's variance; 0: no head", low=0
    )


@dataclass(frozen=True)
class LogNormalOptions:
    """Noise levels"""

    p_mean: float = flag(-1.2, "mean of ln(sigma) of lognormal")
    p_std: float = flag(1.2, "standard deviation of ln(sigma) of lognormal", low=0)


@dataclass(frozen=True)
class GridOptions:
    """Noise levels"""

    num_timesteps: int = flag(40, "grid points of uniform and loss-second-moment", low=2)


@dataclass(frozen=True)
class ContinuousOptions:
    """Continuous time"""

    stop_grad: bool = flag(
        True, "hold the derivative along the trajectory constant; False: distillation only"
    )
    clock: str = flag(
        "t",
        "the derivative is by the noise level, as in the released models, or by the position on the grid, the limit "
        "of the discrete losses",
        choices=("t", "grid"),
    )


@dataclass(frozen=True)
class PairLevelOptions:
    """Pairs"""

    p_mean: float = flag(-1.1, "mean of ln(t) of the pairs")
    p_std: float = flag(2.0, "standard deviation of ln(t) of the pairs", above=0)


@dataclass(frozen=True)
class RatioOptions(PairLevelOptions):
    """Pairs"""

    truncate: bool = flag(False, "draw t between --sigma_min and --sigma_max only")
    ratio_q: float = flag(2.0, "r / t of far levels is 1 - q^-(s+1) at stage s", above=1)
    ratio_steps: int = flag(25000, "length of a stage; 0: there is one", unit="steps", low=0)
    ratio_max: float = flag(1.0, "largest r / t of far levels", above=0, high=1)
    ratio_k: float = flag(
        8.0, "how much lower r is at near levels: 1 - r / t is 1 + k / (1 + e^(b t)) times as large"
    )
    ratio_b: float = flag(1.0, "b of that factor", above=0)


@dataclass(frozen=True)
class TruncatedOptions(RatioOptions):
    """Truncated training"""

    p_mean: float = flag(0.0, "location of ln(t)")
    p_std: float = flag(0.2, "scale of ln(t)", above=0)
    t_df: float = flag(
        0.01, "degrees of freedom of Student's t, the law of ln(t); inf: a normal one", above=0, finite=False
    )
    truncate: bool = fixed(True)
    ratio_q: float = flag(1000.0, "r / t of far levels is 1 - q^-(s+1) at stage s", above=1)
    ratio_steps: int = flag(0, "length of a stage; 0: there is one", unit="steps", low=0)
    ratio_max: float = flag(0.999, "largest r / t of far levels", above=0, high=1)
    transition_t: float = flag(
        1.0, "noise level above which the student learns; below it, the teacher is", above=0
    )
    boundary_share: float = flag(0.25, "share of the rows that are at --transition_t", low=0, below=1)
    boundary_weight: float = flag(0.1, "weight of the mean loss of those rows", low=0)


@dataclass(frozen=True)
class TrigFlowOptions:
    """TrigFlow"""

    p_mean: float = flag(-1.0, "mean of ln(sigma)")
    p_std: float = flag(1.4, "standard deviation of ln(sigma)", above=0)
    truncate: bool = flag(True, "draw noise levels between --sigma_min and --sigma_max only")
    tangent_warmup: int = flag(
        10000, "steps over which the tangent's second part grows in", unit="steps", low=0
    )
    tangent_norm: str = flag(
        "l2",
        "how tangents are bounded: g / (|g| + c) by the norm or the root mean square, or cut to [-1, 1]",
        choices=("l2", "rms", "clip"),
    )
    tangent_c: float = flag(0.1, "c of g / (|g| + c)", above=0)
    tangent_step: float = flag(
        0.0,
        "a difference over this step of ln(sigma) instead of the derivative, where a network has none; 0: none",
        low=0,
    )
    adaptive_weight: bool = flag(True, "learn the weight of each noise level beside the network")


@dataclass(frozen=True)
class SegmentOptions:
    """Multistep consistency models"""

    segments: int = flag(
        4, "segments of the noise levels, each of which is one step of a sample", low=1, main=True
    )
    teacher_steps: int = flag(64, "intervals of the fine grid at the beginning", low=1)
    teacher_steps_end: int = flag(1280, "intervals of the fine grid in the end", low=1)
    teacher_steps_ramp: int = flag(100000, "length of the way from the one to the other", unit="steps", low=0)


@dataclass(frozen=True)
class SegmentDistillationOptions(SegmentOptions):
    """Multistep consistency models"""

    addim_variance: str = flag(
        "snr",
        "what the teacher's aDDIM steps add back: 0.1 / (2 + SNR), 0.75 of its squared error, or nothing (DDIM)",
        choices=ADDIM_VARIANCES.names,
    )


@dataclass(frozen=True)
class FlowTimeOptions:
    """Flow maps"""

    time_law: str = flag(
        "sorted",
        "how t and r < t are drawn: logit-normal ones, sorted; r cut at t; or gaps of 1, 1/2 ...",
        choices=("sorted", "capped", "dyadic"),
    )
    t_mean: float = flag(-2.0, "mean of ln(t / (1 - t)), which is ln(sigma)")
    t_std: float = flag(2.0, "standard deviation of it", above=0)
    r_mean: float = flag(-2.0, "the same of r")
    r_std: float = flag(2.0, "the same of r", above=0)
    octaves: int = flag(7, "number of gaps of --time_law dyadic", low=1, high=20)
    gap_share: float = flag(
        0.75, "share of the rows with r < t; the others learn the velocity", low=0, high=1
    )
    norm_p: float = flag(0.75, "p of the weight 1 / (error + c)^p; 0: none", low=0)
    norm_c: float = flag(1e-3, "c of that weight", above=0)


@dataclass(frozen=True)
class MeanFlowOptions(FlowTimeOptions):
    """Flow maps"""

    omega: float = flag(
        1.0, "omega of the guidance that the student learns, whose scale is omega / (1 - kappa)", above=0
    )
    kappa: float = flag(0.0, "kappa of it: share of the student's own velocity of the class", low=0, below=1)
    guided_from: float = flag(0.0, "first time t at which it acts, from 0 (images) to 1", low=0, high=1)
    guided_to: float = flag(1.0, "last time t at which it acts", low=0, high=1)


@dataclass(frozen=True)
class ImprovedMeanFlowOptions(FlowTimeOptions):
    """Flow maps"""

    t_mean: float = flag(-0.4, "mean of ln(t / (1 - t)), which is ln(sigma)")
    t_std: float = flag(1.0, "standard deviation of it", above=0)
    r_mean: float = flag(-0.4, "the same of r")
    r_std: float = flag(1.0, "the same of r", above=0)
    gap_share: float = flag(0.5, "share of the rows with r < t; the others learn the velocity", low=0, high=1)
    norm_p: float = flag(1.0, "p of the weight 1 / (error + c)^p; 0: none", low=0)
    norm_c: float = flag(0.01, "c of that weight", above=0)
    omega_max: float = flag(8.0, "largest scale of guidance that training draws; the smallest is 1", above=1)
    omega_beta: float = flag(1.0, "the density of that scale falls as scale^-beta", low=0)


@dataclass(frozen=True)
class FlowMapOptions(FlowTimeOptions):
    """Flow maps"""

    identity: str = flag(
        "eulerian",
        "what the exact map obeys: the derivative by t along the flow, by r, or two steps for one",
        choices=("eulerian", "lagrangian", "progressive"),
    )
    flow_path: str = flag(
        "linear", "path whose velocities are compared", choices=("linear", "trigonometric", "vp", "edm")
    )
    split_start: float = flag(
        0.5, "progressive: share of the gap that the first of two steps takes", above=0, below=1
    )
    split_end: float = flag(0.5, "the same after --split_steps", above=0, below=1)
    split_steps: int = flag(0, "steps over which that share changes", unit="steps", low=0)
    split_uniform: bool = flag(False, "draw that share anew for every row instead")
    gap_power: float = flag(0.0, "power of t - r that errors of rows with r < t are multiplied by")


@dataclass(frozen=True)
class SelfFlowMapOptions(FlowMapOptions):
    """Flow maps"""

    flow_velocity: str = flag(
        "data",
        "the flow's velocity is that of image and noise, or what the network itself has learned of it",
        choices=("data", "self"),
    )


@dataclass(frozen=True)
class TrajectoryOptions:
    """Consistency trajectories"""

    max_teacher_steps: int = flag(0, "most steps of the grid from t to u; 0: as many as it has", low=0)
    dsm_weight: float = flag(1.0, "weight of denoising score matching; 0: none", low=0)
    dsm_adaptive: bool = flag(True, "that weight times the ratio of both gradients of the last layer")
    target_jump: str = flag(
        "student",
        "who jumps from u to s, where the student's jump ends; none: s is u",
        choices=("student", "target", "none"),
    )


@dataclass(frozen=True)
class SelfTrajectoryOptions(TrajectoryOptions):
    """Consistency trajectories"""

    iterate: bool = flag(False, "go from t to u by the steps of the grid instead of in one jump")


@dataclass(frozen=True)
class GammaOptions:
    """Sampler gamma"""

    gamma: float = flag(
        0.0, "0: deterministic jumps; 1: to the lowest level and back up, as multistep does", low=0, high=1
    )


@dataclass(frozen=True)
class AddimOptions:
    """Sampler addim"""

    addim_eta: float = flag(
        0.1, "eta of the variance eta / (2 + SNR) that is added back", low=0, argument="eta"
    )


@dataclass(frozen=True)
class JumpOptions:
    """Sampler jumps"""

    spacing: str = flag(
        "linear",
        "equal steps in the time of this path, or on Karras's grid",
        choices=("linear", "trigonometric", "karras"),
    )


@dataclass(frozen=True)
class HuberOptions:
    """Distances"""

    huber_c: float = flag(
        -1.0, "c of pseudo-huber, where square turns to norm; 0: the norm; -1: 0.00054 sqrt(values of an image)",
        low=0, unset=(-1,), argument="c",
    )  # fmt: skip


@dataclass(frozen=True)
class LpipsOptions:
    """LPIPS"""

    lpips_path: str = flag(
        "", "folder with LPIPS weights; empty: torch's hub cache", result=False, argument="path"
    )
    lpips_size: int = flag(
        224, "side to which LPIPS enlarges images below 256; 0: never", unit="pixels", low=0, argument="size"
    )
    lpips_precision: str = flag("fp32", "arithmetic of LPIPS", choices=PRECISIONS.names, argument="precision")


@dataclass(frozen=True)
class InpaintOptions:
    """Task inpaint"""

    mask: str = flag(
        "center:0.5",
        "what to generate: a picture (white), box:x,y,w,h, center:F, random:F, left or text:S",
        main=True,
    )


@dataclass(frozen=True)
class ProjectOptions:
    """Tasks that hold something fixed"""

    final_project: bool = flag(True, "replace what is known once more at the very end")


@dataclass(frozen=True)
class InpaintTask(InpaintOptions, ProjectOptions):
    """Task inpaint"""


@dataclass(frozen=True)
class SuperresOptions(ProjectOptions):
    """Task superres"""

    factor: int = flag(8, "side of the patches whose mean is known", unit="pixels", low=2, main=True)


@dataclass(frozen=True)
class StrokeOptions:
    """Task stroke"""

    sigma_start: float = flag(1.0, "noise level from which the painting is completed", main=True)
    repeat: int = flag(1, "how often the result is completed again", low=1)


@dataclass(frozen=True)
class DenoiseOptions:
    """Task denoise"""

    sigma: float = flag(0.5, "noise level of the input", main=True)
    noisy_input: bool = flag(False, "the input carries that noise already; else it is added")


@dataclass(frozen=True)
class InterpolateOptions:
    """Task interpolate"""

    between: str = flag("", "seeds or .npy files of noise (C, H, W), as a list of two or more", main=True)
    frames: int = flag(9, "images from one noise to the next, both included", unit="images", low=2)
    frame_ms: int = flag(120, "time that a frame is shown", unit="milliseconds", low=1, result=False)
    animation: str = flag("gif", "animation format", choices=("gif", "apng"), result=False)
