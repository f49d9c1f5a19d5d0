"""Options that come with a name: dataclasses of flags that belong to rows of the registry. Imports no torch."""

import math
from dataclasses import dataclass

from cm.config.choices import CORRECTORS, NOISE_SCHEDULES, PRECISIONS, PREDICTORS, SDES, STATE_SCALES
from cm.config.fields import flag


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
        "linear", "sigma(t), whose time the solver steps in", choices=NOISE_SCHEDULES.names
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
