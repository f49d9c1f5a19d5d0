"""Paths and predictions: round trips, the closed-form Gaussian on each path, and the facts of the flow-map sheet."""

import math

import pytest
import torch

from cm.diffusion.paths import (
    EDM,
    LINEAR,
    PREDICTIONS,
    VP_COSINE,
    change_path,
    convert,
    trigonometric,
)

TRIG = trigonometric(0.5)
PATHS = {"edm": EDM, "linear": LINEAR, "trig": TRIG, "vp": VP_COSINE}
SIGMA = torch.tensor([0.01, 0.3, 1.0, 5.0, 70.0], dtype=torch.float64)
LOWER = torch.tensor([0.0, 0.1, 0.002, 4.9, 1.0], dtype=torch.float64)
MU, S = 0.3, 0.7
KINDS = [
    (name, kind) for name in PATHS for kind in PREDICTIONS if kind != "trigflow" or name in ("trig", "vp")
]


def point(seed=0):
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(v):
    return v.reshape(-1, 1, 1)


@pytest.mark.parametrize("name", PATHS)
def test_time_and_level_are_inverse_and_slopes_are_derivatives(name):
    path = PATHS[name]
    t = path.time(SIGMA)
    torch.testing.assert_close(path.level(t), SIGMA, rtol=1e-12, atol=0)
    t = t.clamp_max(path.time(torch.tensor(60.0).double()))
    h = 1e-6 * t
    for slope, function in zip(path.slopes(t), (path.alpha, path.beta)):
        torch.testing.assert_close((function(t + h) - function(t - h)) / (2 * h), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("a", KINDS, ids="-".join)
def test_round_trips(a):
    for b in KINDS:
        round_trip(*a, *b)


def round_trip(pa, ka, pb, kb):
    z, value = point(0), point(1)
    t, r = PATHS[pa].time(SIGMA), PATHS[pa].time(LOWER)
    there = convert(value, z, t, r, (PATHS[pa], ka), (PATHS[pb], kb))
    moved, time = change_path(z, t, PATHS[pa], PATHS[pb])
    back = convert(there, moved, time, PATHS[pb].time(LOWER), (PATHS[pb], kb), (PATHS[pa], ka))
    # The numbers of the way, not of the ends, bound what can be exact.
    scale = max(value.abs().max(), there.abs().max(), moved.abs().max(), z.abs().max()).item()
    torch.testing.assert_close(back, value, rtol=1e-12, atol=1e-12 * max(1, scale))


@pytest.mark.parametrize("name", PATHS)
def test_the_gaussian_on_every_path(name):
    """Its flow map in x0 + sigma n, written as every prediction on every path."""
    path = PATHS[name]
    x = point() * (1 + column(SIGMA))
    end = MU + ((S**2 + column(LOWER) ** 2) / (S**2 + column(SIGMA) ** 2)).sqrt() * (x - MU)
    t, r = path.time(SIGMA), path.time(LOWER)
    z, time = change_path(x, SIGMA, EDM, path)
    torch.testing.assert_close(time, t)
    at = [column(f(v)) for v in (t, r) for f in (path.alpha, path.beta)]
    alpha_t, beta_t, alpha_r, beta_r = at
    variance_t, variance_r = alpha_t**2 * S**2 + beta_t**2, alpha_r**2 * S**2 + beta_r**2
    mine = alpha_r * MU + (variance_r / variance_t).sqrt() * (z - alpha_t * MU)
    found = convert(end, x, SIGMA, LOWER, (EDM, "endpoint"), (path, "endpoint"))
    torch.testing.assert_close(found, mine, rtol=1e-10, atol=1e-10)
    u = convert(end, x, SIGMA, LOWER, (EDM, "endpoint"), (path, "average_velocity"))
    torch.testing.assert_close(z - column(t - r) * u, mine, rtol=1e-9, atol=1e-9)
    # The denoiser's velocity is the derivative of the flow map.
    denoised = (S**2 * x + column(SIGMA) ** 2 * MU) / (S**2 + column(SIGMA) ** 2)
    v = convert(denoised, x, SIGMA, SIGMA, (EDM, "clean"), (path, "velocity"))
    h = 1e-6 * t
    a, b = column(path.alpha(t - h)), column(path.beta(t - h))
    behind = a * MU + ((a**2 * S**2 + b**2) / variance_t).sqrt() * (z - alpha_t * MU)
    torch.testing.assert_close((z - behind) / column(h), v, rtol=1e-4, atol=1e-4 * v.abs().max().item())
    same = convert(denoised, x, SIGMA, SIGMA, (EDM, "clean"), (path, "average_velocity"))
    torch.testing.assert_close(same, v)


def test_the_formulas_of_the_papers():
    z, value, t, r = point(0), point(1), TRIG.time(SIGMA), TRIG.time(LOWER)
    # Lu & Song 2025: D = cos t z - sin t sigma_d F; a step turns by t - r.
    clean = convert(value, z, t, t, (TRIG, "trigflow"), (TRIG, "clean"))
    torch.testing.assert_close(clean, column(t.cos()) * z - column(t.sin()) * 0.5 * value)
    turned = convert(value, z, t, r, (TRIG, "trigflow"), (TRIG, "endpoint"))
    gap = column(t - r)
    torch.testing.assert_close(turned, gap.cos() * z - gap.sin() * 0.5 * value)
    # Kim et al. 2024: G = (r / t) x + (1 - r / t) g
    jump = convert(value, z, SIGMA, LOWER, (EDM, "clean"), (EDM, "endpoint"))
    ratio = column(LOWER / SIGMA)
    torch.testing.assert_close(jump, ratio * z + (1 - ratio) * value)
    # Geng et al. 2025: u = (z - g) / t on the EDM path
    u = convert(value, z, SIGMA, LOWER, (EDM, "clean"), (EDM, "average_velocity"))
    torch.testing.assert_close(u, (z - value) / column(SIGMA))
    # Lipman et al. 2023: v = n - x0
    t = LINEAR.time(SIGMA)
    noise = (z - column(1 - t) * value) / column(t)
    torch.testing.assert_close(
        convert(value, z, t, t, (LINEAR, "clean"), (LINEAR, "velocity")), noise - value
    )
    # DDPM's noise on VP
    t = VP_COSINE.time(SIGMA)
    noise = convert(value, z, t, t, (VP_COSINE, "clean"), (VP_COSINE, "noise"))
    alpha, beta = column(torch.cos(math.pi / 2 * t)), column(torch.sin(math.pi / 2 * t))
    torch.testing.assert_close(alpha * value + beta * noise, z)


def test_points_of_other_paths():
    x = point()
    z, t = change_path(x, SIGMA, EDM, TRIG)
    torch.testing.assert_close(t, torch.atan(SIGMA / 0.5))
    torch.testing.assert_close(z, column(t.cos()) * x)
    z, t = change_path(x, SIGMA, EDM, LINEAR)
    torch.testing.assert_close(t, SIGMA / (1 + SIGMA))
    torch.testing.assert_close(z, x / column(1 + SIGMA))
