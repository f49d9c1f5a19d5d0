"""Editing: orthogonal operators, what is known stays, golden numbers, and new tasks in ten lines each."""

import math

import numpy as np
import pytest
import torch

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import ConsistencyPrecond
from cm.karras_diffusion import iterative_colorization, iterative_inpainting, iterative_superres
from cm.sampling.editing import LinearEdit, colorize, edit_images, inpaint, luma, reflect, slerp, superres
from cm.sampling.noise import IndexedGenerator
from tests.helpers import golden_data
from tests.helpers.analytic import Gaussian
from tests.helpers.models import golden_model

LEVELS = {
    1: [80.0, 0.002],
    3: [80.0, 3.0, 0.4, 0.002],
    2: [80.0, 2.5, 0.5],
}  # the last one ends above sigma_min
LUMA = torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]


def _images(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1


def _luma(x):
    return (x * LUMA.to(x)).sum(1)


def _left_half_known(width):
    return (torch.arange(width) < width // 2).float()


# ---- examples of new tasks: each is one LinearEdit --------------------------------------------


def uncrop(height, width, border):
    """Uncropping: the middle is known, a border around it is generated."""
    mask = torch.zeros(height, width)
    mask[border : height - border, border : width - border] = 1
    return inpaint(mask)


def demosaic(height, width):
    """Demosaicing: each pixel knows one colour, in the Bayer pattern RGGB."""
    mask = torch.zeros(3, height, width)
    mask[0, ::2, ::2] = mask[1, ::2, 1::2] = mask[1, 1::2, ::2] = mask[2, 1::2, 1::2] = 1
    return LinearEdit(mask)


def known_channel(channel):
    """One colour channel is known."""
    return LinearEdit((torch.arange(3) == channel).float()[:, None, None])


def low_pass(height, width, cutoff):
    """Deblurring: the cosine coefficients below `cutoff` are known (orthonormal DCT in both directions)."""

    def matrix(n):
        k, i = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
        rows = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
        rows[0] /= math.sqrt(2)
        return rows

    a, b = matrix(height), matrix(width)
    mask = (torch.arange(height) < cutoff)[:, None] & (torch.arange(width) < cutoff)
    return LinearEdit(mask, lambda x: a.to(x) @ x @ b.to(x).T, lambda c: a.to(c).T @ c @ b.to(c))


EDITS = {
    "inpaint": lambda: inpaint(_left_half_known(24)),
    "colorize": colorize,
    "superres2": lambda: superres(2),
    "superres8": lambda: superres(8),
    "uncrop": lambda: uncrop(16, 24, 3),
    "demosaic": lambda: demosaic(16, 24),
    "channel": lambda: known_channel(1),
    "low_pass": lambda: low_pass(16, 24, 5),
}


# ---- operators --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_operators_are_orthogonal(name, dtype, tolerance):
    edit, x, y = EDITS[name](), _images(2, 3, 16, 24, dtype=dtype), _images(2, 3, 16, 24, dtype=dtype).flip(0)
    ax, ay = edit.transform(x), edit.transform(y)
    assert ax.numel() == x.numel()
    assert ax.dtype == dtype
    assert torch.allclose(edit.inverse(ax), x, atol=tolerance)
    assert torch.allclose((ax * ay).sum(), (x * y).sum(), rtol=tolerance * 10)


@pytest.mark.parametrize("name", EDITS)
def test_projection(name):
    """It keeps what is known, is idempotent, and moves the image by the least amount."""
    edit, images, other = EDITS[name](), _images(2, 3, 16, 24), torch.randn(2, 3, 16, 24)
    projected = edit.project(images, other)
    mask = edit.mask.to(images)
    assert torch.allclose(mask * edit.transform(projected), mask * edit.transform(images), atol=1e-5)
    assert torch.allclose(
        (1 - mask) * edit.transform(projected), (1 - mask) * edit.transform(other), atol=1e-5
    )
    assert torch.allclose(edit.project(images, projected), projected, atol=1e-5)
    assert torch.allclose(edit.project(images, images), images, atol=1e-5)
    assert torch.allclose(edit.project(edit.measure(images), other), projected, atol=1e-5)


def test_reflection_swaps_axis_and_first_basis_vector():
    axis = torch.nn.functional.normalize(torch.tensor([0.2, 0.5, -0.3, 0.7], dtype=torch.float64), dim=0)
    matrix = reflect(torch.eye(4, dtype=torch.float64), axis)
    assert torch.allclose(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(matrix[0], axis)


def test_luma():
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.4, 0.4, 0.4]]).reshape(4, 3, 1, 1)
    grey = luma(x)
    assert grey.shape == x.shape
    assert torch.allclose(grey[:, 0], grey[:, 2])
    assert torch.allclose(grey[:, 0, 0, 0], torch.tensor([0.2989, 0.5870, 0.1140, 0.4]), atol=1e-4)


def test_first_coefficient_is_luma_and_patch_mean():
    x = _images(2, 3, 16, 24, dtype=torch.float64)
    norm = float((LUMA.double() ** 2).sum() ** 0.5)
    assert torch.allclose(colorize().transform(x)[:, 0] * norm, _luma(x))
    for factor in (2, 4, 8):
        means = torch.nn.functional.avg_pool2d(x, factor)
        assert torch.allclose(superres(factor).transform(x)[..., 0], means * factor)
        blocks = means.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        assert torch.allclose(superres(factor).picture(x), blocks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operators_accept_half_precision(dtype):
    for make in EDITS.values():
        assert (
            make().project(_images(1, 3, 16, 24, dtype=dtype), torch.randn(1, 3, 16, 24, dtype=dtype)).dtype
            == dtype
        )


# ---- the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", LEVELS)
@pytest.mark.parametrize("name", EDITS)
def test_what_is_known_stays(name, count):
    """For every number of steps, and although the denoiser knows nothing of the images."""
    images, edit, levels = _images(2, 3, 16, 24), EDITS[name](), torch.tensor(LEVELS[count])
    denoise = Gaussian(0.3, 0.5).denoise
    out = edit_images(denoise, images, levels, IndexedGenerator(0), edit)
    mask = edit.mask.to(images)
    assert torch.allclose(mask * edit.transform(out), mask * edit.transform(images), atol=1e-4)
    assert not torch.allclose(out, images, atol=0.1)
    if levels[-1] > 0.002:
        noisy = edit_images(denoise, images, levels, IndexedGenerator(0), edit, final_project=False)
        assert not torch.allclose(mask * edit.transform(noisy), mask * edit.transform(images), atol=0.1)


def test_one_evaluation_per_level_on_the_known_start():
    seen = []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return torch.zeros_like(x)

    images = _images(64, 3, 8, 8)
    edit_images(
        denoise, images, torch.tensor([0.5, 0.3, 0.1]), IndexedGenerator(0), superres(4), sigma_min=0.1
    )
    assert [float(sigma[0]) for _, sigma in seen] == pytest.approx([0.5, 0.3])
    start = seen[0][0] - superres(4).measure(images)
    assert start.std() == pytest.approx(0.5, rel=0.03)
    assert abs(start.mean()) < 0.01


def test_without_edit_the_images_are_noised_and_denoised():
    """With the exact consistency function of N(mean, std^2), denoising keeps the distribution."""
    data = Gaussian(0.2, 0.5)
    images = data.sample((200, 3, 8, 8), torch.Generator().manual_seed(0))
    out = edit_images(data.consistency, images, torch.tensor([2.0, 0.002]), IndexedGenerator(0))
    assert out.mean() == pytest.approx(0.2, abs=0.02)
    assert out.std() == pytest.approx(0.5, abs=0.02)
    assert not torch.allclose(out, images, atol=0.5)


def test_slerp():
    a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-6)
    unit = torch.eye(2)
    assert torch.allclose(
        slerp(unit[:1], unit[1:], 1 / 3), torch.tensor([[math.cos(math.pi / 6), 0.5]]), atol=1e-6
    )
    rows = slerp(a, b, torch.tensor([0.0, 1.0]))
    assert torch.allclose(rows[0], a[0], atol=1e-6)
    assert torch.allclose(rows[1], b[1], atol=1e-6)
    with pytest.raises(ValueError, match="different shapes"):
        slerp(a, b[:1], 0.5)


def test_shape_errors_name_both_shapes():
    images, sigmas, generator = _images(2, 3, 9, 8), torch.tensor([1.0, 0.002]), IndexedGenerator(0)
    denoise = Gaussian().denoise
    with pytest.raises(ValueError, match=r"\(7, 7\) does not broadcast to \(2, 3, 9, 8\)"):
        edit_images(denoise, images, sigmas, generator, inpaint(torch.ones(7, 7)))
    with pytest.raises(ValueError, match=r"4 x 4 do not divide images \(2, 3, 9, 8\)"):
        edit_images(denoise, images, sigmas, generator, superres(4))
    with pytest.raises(ValueError, match="needs 3 channels"):
        edit_images(denoise, images[:, :1], sigmas, generator, colorize())
    with pytest.raises(ValueError, match="at least 2"):
        superres(1)
    with pytest.raises(ValueError, match="needs a mask"):
        iterative_inpainting(denoise, images, images, (0, 39))


# ---- golden -----------------------------------------------------------------------------------


class Recorded:
    """A generator that hands out stored noise in call order."""

    def __init__(self, noise):
        self.noise = iter(noise)

    def randn_like(self, x):
        return next(self.noise)


def _inpainting_mask(white, batch):
    """Groups of seven images know the white and the black part in turn."""
    known = [white if (b // 7) % 2 == 0 else 1 - white for b in range(batch)]
    return torch.from_numpy(np.stack(known))[:, None].float()


def test_golden_editing():
    golden = golden_data.load("editing")
    settings = golden.config["denoiser"]
    precond = ConsistencyPrecond(settings["sigma_data"], settings["sigma_min"])
    denoiser = Denoiser(golden_model(golden), precond)
    functions = {
        "colorization": iterative_colorization,
        "inpainting": iterative_inpainting,
        "superres": iterative_superres,
    }
    for case in golden.config["cases"]:
        images, noise = golden.tensor(f"{case['id']}/images"), golden.tensor(f"{case['id']}/noise")
        extra = {}
        if case["task"] == "inpainting":
            extra["mask"] = _inpainting_mask(golden[f"{case['id']}/white"], len(images))
        before = images.clone()
        out, picture = functions[case["task"]](
            denoiser,
            images,
            80 * noise[0],
            case["ts"],
            t_min=case["t_min"],
            t_max=case["t_max"],
            rho=case["rho"],
            steps=case["steps"],
            generator=Recorded(noise[1:]),
            **extra,
        )
        np.testing.assert_allclose(out, golden[f"{case['id']}/out"], rtol=0, atol=1e-5, err_msg=case["id"])
        np.testing.assert_allclose(picture, golden[f"{case['id']}/out_images"], rtol=0, atol=1e-5)
        assert torch.equal(images, before)


def test_iterative_functions_have_a_default_generator():
    out, _ = iterative_superres(
        Gaussian().denoise, _images(1, 1, 8, 8), torch.randn(1, 1, 8, 8) * 80, (0, 39), factor=4
    )
    assert out.shape == (1, 1, 8, 8)
