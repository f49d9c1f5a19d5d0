"""Classifier guidance on data whose class posterior is known, and the classifier's training objective."""

import math
from types import SimpleNamespace

import pytest
import torch

from cm.diffusion.denoiser import Denoiser, NoisyClassifier
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.guidance import guided
from cm.diffusion.noise_levels import ve_levels
from cm.diffusion.precond import Coefficients, EDMPrecond
from cm.networks.classifier import EncoderUNetModel
from cm.objectives.base import Draw, Roles
from cm.objectives.classifier import ClassifierObjective
from cm.sampling.ancestral import sample_euler_ancestral
from cm.sampling.noise import get_generator
from cm.sampling.ode import sample_euler, sample_heun
from cm.sampling.registry import run_sampler
from cm.seeding import StepRandom

# Two classes at -1 and +1, each N(+-1, 0.3^2) in every coordinate of a point (B, D).
STD = 0.3
DUMMY = get_generator("dummy")


def plain(sigma):
    """c_in = 1, c_noise = sigma."""
    return Coefficients(sigma, sigma, torch.ones_like(sigma), sigma)


def logits(x, sigma):
    """log p(x | y; sigma) up to a constant."""
    variance = STD**2 + sigma**2
    return torch.stack([-((x - m) ** 2).sum(1) / (2 * variance) for m in (-1, 1)], dim=1)


CLASSIFIER = NoisyClassifier(logits, plain)


def class_denoiser(mean):
    return lambda x, sigma: (STD**2 * x + sigma[:, None] ** 2 * mean) / (STD**2 + sigma[:, None] ** 2)


def mixture_denoiser(x, sigma):
    """Exact denoiser of both classes together."""
    weights = torch.softmax(logits(x, sigma), dim=1)
    return sum(weights[:, k : k + 1] * class_denoiser(m)(x, sigma) for k, m in enumerate((-1, 1)))


def points(count=64, scale=1.0):
    return scale * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_gradient_is_that_of_the_log_posterior():
    x, sigma, y = points(5), torch.tensor([0.3, 1, 2, 5, 0.1]).double(), torch.tensor([0, 1, 1, 0, 1])
    variance = (STD**2 + sigma**2)[:, None]
    # d/dx log softmax by hand: for y = 1, 2 p(0 | x) / variance; mirrored for y = 0.
    posterior = torch.softmax(logits(x, sigma), 1)
    other = posterior.gather(1, 1 - y[:, None])
    expected = (2 * other * (2 * y - 1)[:, None] / variance).expand(5, 2)
    torch.testing.assert_close(CLASSIFIER.gradient(y)(x, sigma), expected)
    torch.testing.assert_close(CLASSIFIER.gradient(y, 2.5)(x, sigma), 2.5 * expected)


def test_with_scale_one_the_guided_denoiser_is_the_conditional_one():
    """Bayes: the score of p(x | y) is the score of p(x) plus the gradient of log p(y | x)."""
    x, sigma = points(20, 3.0), torch.linspace(0.05, 8, 20, dtype=torch.float64)
    y = torch.arange(20) % 2
    ours = guided(mixture_denoiser, CLASSIFIER.gradient(y))(x, sigma)
    exact = torch.where(y[:, None] == 1, class_denoiser(1)(x, sigma), class_denoiser(-1)(x, sigma))
    torch.testing.assert_close(ours, exact)


def test_it_is_algorithm_2_on_the_noise_prediction():
    """e^ = e - sqrt(1 - abar) s grad log p(y | x_t), the gradient taken at x_t = sqrt(abar) x."""
    x, sigma, y, scale = points(4), torch.full((4,), 1.7).double(), torch.tensor([0, 1, 0, 1]), 3.0
    root = (1 / (1 + sigma**2)).sqrt()[:, None]  # sqrt(abar)
    x_t = (root * x).requires_grad_()
    chosen = torch.log_softmax(logits(x_t / root, sigma), 1).gather(1, y[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, x_t)
    eps = (x - mixture_denoiser(x, sigma)) / sigma[:, None] - (1 - root**2).sqrt() * scale * gradient
    ours = guided(mixture_denoiser, CLASSIFIER.gradient(y, scale))(x, sigma)
    torch.testing.assert_close(ours, x - sigma[:, None] * eps)


@pytest.mark.parametrize("sample", [sample_euler, sample_heun])
def test_guided_flows_reach_the_class(sample):
    sigmas = torch.cat([karras_sigmas(40, 0.01, 20.0), torch.zeros(1).double()])
    y = torch.arange(64) % 2
    x = sample(guided(mixture_denoiser, CLASSIFIER.gradient(y)), points(scale=20), sigmas, DUMMY)
    assert ((x > 0) == (y[:, None] == 1)).all()
    for label, mean in ((0, -1), (1, 1)):
        assert x[y == label].mean().item() == pytest.approx(mean, abs=0.15)
    free = sample(mixture_denoiser, points(scale=20), sigmas, DUMMY)
    assert 0.2 < ((free[:, 0] > 0) == (y == 1)).double().mean() < 0.8


def test_algorithm_1_shifts_the_mean_by_the_variance_times_the_gradient():
    class Silent:
        """No noise: what is left of a step is its mean."""

        def randn_like(self, x):
            return torch.zeros_like(x)

    x, y = points(6, 3.0), torch.tensor([0, 1, 0, 1, 0, 1])
    levels = torch.tensor([3.0, 2.0], dtype=torch.float64)
    gradient = CLASSIFIER.gradient(y, 2.0)
    free = sample_euler_ancestral(mixture_denoiser, x, levels, Silent())
    ours = sample_euler_ancestral(mixture_denoiser, x, levels, Silent(), gradient=gradient)
    variance = 2.0**2 * (3.0**2 - 2.0**2) / 3.0**2
    torch.testing.assert_close(ours - free, variance * gradient(x, torch.full((6,), 3.0).double()))


def test_guided_ancestral_sampling_by_name():
    y = torch.arange(64) % 2
    x = run_sampler(
        "ancestral",
        mixture_denoiser,
        points(scale=20),
        DUMMY,
        steps=60,
        sigma_min=0.01,
        sigma_max=20.0,
        options={"gradient": CLASSIFIER.gradient(y)},
    )
    assert ((x[:, 0] > 0) == (y == 1)).all()


def test_the_gradient_leaves_no_graph_and_works_without_grad_mode():
    weight = torch.ones((), requires_grad=True)
    classifier = NoisyClassifier(lambda x, c: weight * logits(x, c), plain)
    with torch.no_grad():
        gradient = classifier.gradient(torch.zeros(4, dtype=torch.long))(points(4), torch.ones(4))
    assert not gradient.requires_grad and weight.grad is None and gradient.abs().sum() > 0


def test_the_objective_is_cross_entropy_on_noisy_images():
    x0, noise = points(6), torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()
    t, y = torch.tensor([0.1, 0.5, 1, 2, 4, 8]).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    objective = ClassifierObjective(ve_levels(SimpleNamespace(sigma_min=0.1, sigma_max=8.0)))
    roles = Roles(Denoiser(logits, plain))
    got = objective.forward(roles, x0, Draw(t=t, noise=noise, weight=torch.ones(6)), 0, y=y)
    log_prob = torch.log_softmax(logits(x0 + t[:, None] * noise, t), 1)
    torch.testing.assert_close(got["loss"], -log_prob.gather(1, y[:, None])[:, 0])
    assert torch.equal(got["accuracy"], (log_prob.argmax(1) == y).float())
    draw = objective.draw(torch.zeros(2000, 2), 0, StepRandom(0, 0, 0, 2000, 2000))
    assert draw.t.log().mean().item() == pytest.approx((math.log(0.1) + math.log(8)) / 2, abs=0.1)


def test_the_network_is_scaled_and_clocked():
    torch.manual_seed(0)
    net = EncoderUNetModel(8, 1, 32, 3, 1, (4,), channel_mult=(1, 1), num_head_channels=16).eval()
    precond = EDMPrecond()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 4.0])
    got = NoisyClassifier(net, precond).logits(x, sigma)
    scaled = x / (sigma**2 + 0.25).sqrt()[:, None, None, None]
    torch.testing.assert_close(got, net(scaled, 250 * sigma.log()))
