"""What only a GPU can show: the real loop on CUDA. Run by `pytest -m gpu` where there is one."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cm.sampling.noise import get_generator
from cm.sampling.registry import run_sampler
from cm.tools.bench.precision import losses, overlay
from cm.tools.bench.runs import Options, random_model, sample_config, train_config, training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = "cuda"
CASES = ["edm", "cd", "ct", "pd"]


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products in fp32, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def config(case: str, *flags: str, device: str = DEVICE):
    return train_config(Options(device=device, flags=flags), case)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_one_flag(case, precision):
    steps = 4
    with training(config(case, "--precision", precision)) as trainer:
        for _ in range(8):  # RAdam's first steps are torch's own; cuDNN looks for its kernels
            trainer.run_step(*next(trainer.data))
        batches = [next(trainer.data) for _ in range(steps)]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for batch in batches:
                    trainer.run_step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message).lower()]
    assert len(waits) == steps, waits


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_on_the_gpu_is_training_on_the_cpu(case):
    here, there = (losses(config(case, device=device), 10) for device in (DEVICE, "cpu"))
    torch.testing.assert_close(here, there, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_overlays(case, precision):
    exact = losses(config(case), 40)
    rough = losses(replace(config(case), precision=precision), 40)
    assert overlay(exact, rough, windows=4)["largest_gap"] < 0.05


@pytest.mark.parametrize(
    "flags",
    [
        ("--channels_last", "True"),
        pytest.param(("--compile", "True"), marks=pytest.mark.slow),
        ("--use_checkpoint", "True"),
        ("--microbatch", "3"),
    ],
    ids=lambda flags: flags[0],
)
def test_levers_change_nothing_but_rounding(flags):
    plain, pulled = losses(config("cd"), 6), losses(config("cd", *flags), 6)
    torch.testing.assert_close(plain, pulled, rtol=2e-3, atol=1e-5)


def test_a_background_save_is_what_was_there_when_it_began():
    with training(config("cd", "--async_save", "True")) as trainer:
        trainer.run_step(*next(trainer.data))
        before = [p.detach().cpu().clone() for p in trainer.state.student.master_params]
        trainer.save()
        for _ in range(3):  # goes on while the write is under way
            trainer.run_step(*next(trainer.data))
        trainer.saver.wait()
        (saved,) = Path(trainer.saver.run_dir).glob("checkpoints/step_*/model*.pt")
        state = torch.load(saved, weights_only=True)
        after = [state[n] for n in trainer.state.student.weights.names]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_step_samples_are_those_of_the_cpu(precision):
    mode = ("--training_mode", "consistency_distillation", "--sampler", "onestep")
    images = []
    for device, flags in ((DEVICE, ("--precision", precision)), ("cpu", ())):
        model = random_model(sample_config(Options(device=device, flags=flags), mode))
        generator = get_generator("indexed", num_samples=4, seed=0)
        generator.set_rows(range(4))
        c = model.config
        x = 80 * generator.randn(4, c.in_channels, c.image_size, c.image_size, device=model.device)
        images.append(run_sampler("onestep", model.denoiser, x, generator, steps=18).cpu())
    limit = 1e-3 if precision == "fp32" else 0.1
    torch.testing.assert_close(*images, rtol=0, atol=limit)
