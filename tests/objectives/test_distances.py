"""Distances: closed forms, golden LPIPS, its weights files, precision and derivatives."""

import copy
import functools
import hashlib
import shutil
import subprocess
import sys
import types
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from cm.config.rows import DISTANCES
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.objectives import lpips
from cm.objectives.distances import make_distance
from cm.runtime.torchvision_operators import declare_missing_operators
from tests.helpers import golden_data
from tests.helpers.lpips_files import write_golden_files, write_small_files
from tests.helpers.models import golden_model


@pytest.fixture(scope="module")
def golden_files(tmp_path_factory):
    """Folder with weights files of the golden rule (60 MB)."""
    folder = tmp_path_factory.mktemp("lpips_golden")
    write_golden_files(folder)
    yield str(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with small weights files."""
    folder = tmp_path_factory.mktemp("lpips")
    write_small_files(folder)
    return folder


@pytest.fixture(scope="module")
def perceptual(files):
    """LPIPS with average pooling, images as they are."""
    return make_distance("lpips", path=str(files), size=0)


def images(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches in [-1, 1]."""
    return tuple(2 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) - 1)


# Images of 64 pixels: zero, but for one 2 x 2 patch of height 3 that a resize to 32 x 32 turns into one pixel.
PATCH = torch.zeros(2, 1, 64, 64)
PATCH[1, :, 10:12, 20:22] = 3.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("l1", 4 * 3 / 64**2), ("l2", 4 * 9 / 64**2), ("l2-32", 9 / 32**2), ("linf", 3.0)],
)
def test_pixel_distances_in_closed_form(name, expected):
    distance = make_distance(name)
    assert_close(distance(PATCH, torch.zeros_like(PATCH)), torch.tensor([0.0, expected]))
    assert_close(distance(torch.zeros_like(PATCH), PATCH), torch.tensor([0.0, expected]))
    assert distance(PATCH.half(), PATCH.half()).dtype == torch.float32


def test_l2_at_32_resizes_as_interpolate_does():
    a, b = images(2, 3, 20, 48)
    resized = [F.interpolate(x, (32, 32), mode="bilinear", align_corners=False) for x in (a, b)]
    assert_close(make_distance("l2-32")(a, b), (resized[0] - resized[1]).square().mean((1, 2, 3)))


@pytest.mark.parametrize("name", ["l1", "l2", "l2-32", "linf"])
def test_pixel_distances_refuse_unlike_shapes(name):
    with pytest.raises(ValueError, match=r"\(2, 1, 64, 64\) and \(1, 1, 64, 64\)"):
        make_distance(name)(PATCH, PATCH[:1])


def test_unknown_names_and_options_are_named():
    with pytest.raises(
        UserError,
        match="loss_norm must be one of l1, l2, l2-32, linf, lpips, lpips-max, pseudo-huber, got 'l3'",
    ):
        make_distance("l3")
    with pytest.raises(UserError, match="--lpips_size 8"):
        make_distance("lpips", size=8)
    with pytest.raises(UserError, match="precision must be one of fp32, fp16, bf16, got 'fp8'"):
        make_distance("lpips", precision="fp8")
    assert callable(DISTANCES.load("lpips")())


def test_lpips_golden(golden_files):
    g = golden_data.load("loss_lpips")
    distance = make_distance("lpips", path=golden_files, size=0)
    for case in g.config["raw_cases"]:
        a = (2 * g.tensor(f"raw/{case}/a") - 1).requires_grad_(f"raw/{case}/grad_a" in g)
        value = distance(a, 2 * g.tensor(f"raw/{case}/b") - 1)
        assert_close(value.detach(), g.tensor(f"raw/{case}/value"), rtol=1e-4, atol=0)
        if a.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), a)
            expected = g.tensor(f"raw/{case}/grad_a")
            assert_close(2 * gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("case", ["ct", "cd", "progdist"])
def test_losses_with_lpips_golden(golden_files, case):
    g = golden_data.load("loss_lpips")
    student, target, teacher = (golden_model(g, f"sd_{who}/") for who in ("student", "target", "teacher"))
    options = dict(sigma_max=80.0, sigma_min=0.002, weight_schedule="uniform", loss_norm="lpips")
    distance = make_distance("lpips", path=golden_files)
    diffusion = KarrasDenoiser(**options, distillation=case != "progdist", distance=distance)
    inputs = dict(noise=g.tensor("noise"), indices=g.tensor(f"loss/{case}/indices"))
    if case != "ct":
        inputs |= dict(teacher_model=teacher, teacher_diffusion=KarrasDenoiser(**options))
    if case == "progdist":
        losses = diffusion.progdist_losses
    else:
        losses = functools.partial(diffusion.consistency_losses, target_model=target)
    with torch.no_grad():
        terms = losses(student, g.tensor("x_start"), g.config["num_scales"][case], **inputs)
    assert_close(terms["loss"], g.tensor(f"loss/{case}/value"), rtol=1e-3, atol=0)


def test_operators_are_declared_only_where_torchvisions_do_not_load(monkeypatch):
    tried = []
    monkeypatch.setattr(torch.ops, "load_library", tried.append)
    monkeypatch.setattr(torch.library, "Library", None)
    assert declare_missing_operators.__wrapped__() is None
    assert [Path(path).parent.name for path in tried] == ["torchvision"]
    assert Path(tried[0]).name.startswith("_C.")


def test_piq_is_imported_whether_or_not_torchvisions_operators_load():
    """In a new process. Operators that are only declared have no code that could give wrong results."""
    code = """if True:
        import torch
        from cm.objectives.lpips import import_piq
        from cm.runtime.torchvision_operators import declare_missing_operators
        import_piq()
        import torchvision
        assert torchvision.extension._has_ops() == (declare_missing_operators() is None)
        assert torchvision.models.vgg16
        try:
            assert torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5).tolist() == [0]
        except RuntimeError as error:
            assert "Couldn't load custom C++ ops" in str(error)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lpips_equals_piqs_own_class(files, monkeypatch):
    piq = lpips.import_piq()
    vgg = types.SimpleNamespace(features=lpips._vgg_features(files / lpips.VGG_FILE))
    monkeypatch.setattr(piq.perceptual, "vgg16", lambda **options: copy.deepcopy(vgg))
    linear = torch.load(files / lpips.LINEAR_FILE, weights_only=True)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, progress: linear)
    a, b = images(2, 3, 32, 32)
    values = []
    for name, replace_pooling in (("lpips", True), ("lpips-max", False)):
        theirs = piq.LPIPS(replace_pooling=replace_pooling, reduction="none")((a + 1) / 2, (b + 1) / 2)
        values.append(make_distance(name, path=str(files), size=0)(a, b))
        assert_close(values[-1], theirs, rtol=1e-5, atol=0)
    assert not torch.allclose(*values, rtol=1e-2)


def test_lpips_resizes_small_images_only(files, perceptual):
    a, b = images(1, 3, 16, 24)
    resized = [F.interpolate(x, (40, 40), mode="bilinear", align_corners=False) for x in (a, b)]
    at_40 = make_distance("lpips", path=str(files), size=40)
    assert_close(at_40(a, b), perceptual(*resized))
    assert at_40.options.size == 40 and make_distance("lpips").options.size == 224
    large = [torch.zeros(1, 3, 256, 256), torch.ones(1, 3, 256, 256)]
    assert_close(at_40._prepare(large[1]), torch.ones(1, 3, 256, 256))
    with pytest.raises(UserError, match="8 pixels are too small for LPIPS unless --lpips_size"):
        perceptual(*images(1, 3, 8, 8))


def test_lpips_of_grey_images_is_that_of_three_equal_channels(perceptual):
    a, b = images(2, 1, 16, 16)
    assert_close(perceptual(a, b), perceptual(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"\(2, 2, 16, 16\)"):
        perceptual(*images(2, 2, 16, 16))
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\) and \(1, 1, 16, 16\)"):
        perceptual(a, b[:1])


def test_lpips_of_equal_images_is_zero_and_symmetric(perceptual):
    a, b = images(2, 3, 16, 16)
    assert torch.equal(perceptual(a, a), torch.zeros(2))
    assert_close(perceptual(a, b), perceptual(b, a))
    assert perceptual(a, b).shape == (2,) and (perceptual(a, b) > 0.01).all()


def test_lpips_is_frozen_and_in_evaluation_mode(perceptual):
    a, b = images(1, 3, 16, 16)
    a.requires_grad_()
    perceptual(a, b).sum().backward()
    network = perceptual._network
    assert a.grad.any()
    assert not network.training
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lpips_precision_is_a_choice(files, perceptual, precision):
    a, b = images(2, 3, 16, 16)
    exact = perceptual(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perceptual(a, b), exact)
    assert perceptual(a.half(), b.half()).dtype == torch.float32
    assert torch.equal(perceptual(a, b), exact)  # half-precision images left the weights alone
    rough = make_distance("lpips", path=str(files), size=0, precision=precision)(a, b)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert_close(rough, exact, rtol=0.05, atol=0)


def test_lpips_loaded_in_inference_mode_can_still_be_differentiated(files):
    distance = make_distance("lpips", path=str(files), size=0)
    a, b = images(1, 3, 16, 16)
    with torch.inference_mode():
        distance(a, b)
    a.requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad.any()


def test_lpips_second_derivative_equals_finite_differences(files):
    distance = make_distance("lpips", path=str(files), size=0)
    distance.load(torch.device("cpu"), torch.float64)
    a, v = (x.double() for x in images(3, 16, 16))
    a, v = a[None], v[None]
    gradient = torch.func.grad(lambda y, other: distance(y, other).sum())
    for b in (a, 0.9 * a):  # equal images too: there continuous-time losses take it
        _, product = torch.func.jvp(lambda y, b=b: gradient(y, b), (a,), (v,))
        difference = (gradient(a + 1e-5 * v, b) - gradient(a - 1e-5 * v, b)) / 2e-5
        assert_close(product, difference, rtol=1e-6, atol=1e-9)


def test_lpips_of_dead_features_has_finite_derivatives():
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (first,) = torch.autograd.grad(lpips._unit_channels(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.isfinite().all() and second.isfinite().all()
    x = torch.randn(1, 4, 2, 2)
    assert_close(lpips._unit_channels(x), F.normalize(x, dim=1))


class TestWeightsFiles:
    """What is found, fetched and refused."""

    @pytest.fixture()
    def hub(self, tmp_path, monkeypatch):
        """An empty cache of torch hub."""
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        return tmp_path / "hub" / "checkpoints"

    def test_missing_and_offline(self, hub, monkeypatch):
        def offline(*args, **options):
            raise urllib.error.URLError("no route to host")

        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        with pytest.raises(UserError) as error:
            make_distance("lpips")(*images(1, 3, 16, 16))
        message = str(error.value)
        assert "\n" not in message and "no route to host" in message
        for part in (str(hub), "--lpips_path", *lpips.URLS, *lpips.URLS.values()):
            assert part in message

    def test_each_missing_file_is_fetched_once(self, hub, files, monkeypatch):
        hub.mkdir(parents=True)
        shutil.copy(files / lpips.LINEAR_FILE, hub)
        fetched = []

        def fetch(url, path, hash_prefix, progress):
            fetched.append((url, hash_prefix))
            shutil.copy(files / Path(path).name, path)

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        for _ in range(2):
            make_distance("lpips").load(torch.device("cpu"))
        assert fetched == [("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")]

    def test_what_has_no_known_hash_is_held_to_that_of_its_first_use(self, hub, files, monkeypatch, capsys):
        monkeypatch.setattr(
            torch.hub,
            "download_url_to_file",
            lambda url, path, *a, **k: shutil.copy(files / Path(path).name, path),
        )
        make_distance("lpips").load(torch.device("cpu"))  # fetched
        linear = hub / lpips.LINEAR_FILE
        found = hashlib.sha256(linear.read_bytes()).hexdigest()
        assert f"{linear}: SHA-256 {found}" in capsys.readouterr().out
        (hub / f"{lpips.LINEAR_FILE}.sha256").unlink()
        make_distance("lpips").load(torch.device("cpu"))  # put there by another program
        assert found in capsys.readouterr().out
        make_distance("lpips").load(torch.device("cpu"))
        assert found not in capsys.readouterr().out
        torch.save([w + 1 for w in torch.load(linear)], linear)
        with pytest.raises(UserError, match=f"{lpips.LINEAR_FILE}: SHA-256 is .*, expected {found[:16]}"):
            make_distance("lpips").load(torch.device("cpu"))

    def test_folder_without_the_files_is_refused_at_once(self, tmp_path):
        with pytest.raises(
            UserError, match=f"missing in {tmp_path}: vgg16-397923af.pth .from https://download"
        ):
            make_distance("lpips", path=str(tmp_path))

    @pytest.mark.parametrize("name", [lpips.VGG_FILE, lpips.LINEAR_FILE])
    def test_damaged_and_foreign_files(self, tmp_path, files, name):
        for other in lpips.URLS:
            shutil.copy(files / other, tmp_path)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{name} is not a readable weights file"):
            make_distance("lpips", path=str(tmp_path)).load(torch.device("cpu"))
        for content in ({"features.0.weight": torch.zeros(1)}, [torch.ones(3)] * 5, torch.ones(2)):
            torch.save(content, tmp_path / name)
            with pytest.raises(UserError, match=f"{name} does not hold"):
                make_distance("lpips", path=str(tmp_path)).load(torch.device("cpu"))

    def test_code_in_a_file_is_not_run(self, tmp_path, files):
        shutil.copy(files / lpips.VGG_FILE, tmp_path)
        (tmp_path / lpips.LINEAR_FILE).write_bytes(
            b"cos\nmkdir\n(V" + str(tmp_path / "run").encode() + b"\ntR."
        )
        with pytest.raises(UserError, match="not a readable weights file"):
            make_distance("lpips", path=str(tmp_path)).load(torch.device("cpu"))
        assert not (tmp_path / "run").exists()
