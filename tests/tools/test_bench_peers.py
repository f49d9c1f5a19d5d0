"""Peers of a training step do the arithmetic of the step that they stand beside."""

import ast
import json
import types

import pytest
import torch

from cm.seeding import StepRandom
from cm.tools.bench import original_checkout, peers
from cm.tools.bench.runs import Options, train_config, training
from cm.tools.bench.train import share_by_phase

SMALL = ("--image_size", "8", "--channel_mult", "1", "--attention_resolutions", "8", "--batch_size", "2")
LAST = ("--channels_last", "True")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["edm", "cd"])
def test_the_original_arithmetic_moves_the_weights_as_the_trainer_does(case, precision, monkeypatch):
    config = train_config(Options(device="cpu", flags=(*SMALL, *LAST, "--precision", precision)), case)
    with training(config) as trainer:
        with torch.no_grad():  # or most gradients would be zero behind the layers that start at zero
            for p in trainer.state.student.master_params:
                p.add_(0.02 * torch.randn_like(p))
        trainer.state.student.weights.to_model()

        def draws(seed, step, start, stop, count, device):
            return StepRandom(trainer.seed, step, start, stop, count, device)

        monkeypatch.setattr(peers, "FreshDraws", draws)
        loops, left_out = peers.peer_loops(trainer, config)
        loop = loops["original"]
        assert all(p.is_contiguous() for p in loop.roles.student.net.parameters())
        before = [p.detach().clone() for p in trainer.state.student.master_params]
        batch = next(trainer.data)
        loop.step(*batch)
        trainer.run_step(*batch)
        moved = torch.cat([(a - b).flatten() for a, b in zip(trainer.state.student.master_params, before)])
        names = trainer.state.student.weights.names
        theirs = dict(zip((n for n, _ in loop.roles.student.net.named_parameters()), loop.params))
        assert list(theirs) == names
        if precision == "fp32":
            peer_moved = torch.cat([(theirs[n] - b).flatten() for n, b in zip(names, before)])
        else:  # masters are two flat tensors there: first vectors, then the rest
            order = [i for flat in (True, False) for i, b in enumerate(before) if (b.ndim <= 1) == flat]
            peer_moved = torch.cat(loop.masters).detach() - torch.cat([before[i].flatten() for i in order])
            pieces = moved.split([b.numel() for b in before])
            moved = torch.cat([pieces[i] for i in order])
        assert moved.abs().max() > 0
        tolerance = 1e-3 if precision == "fp32" else 0.1
        assert (moved - peer_moved).norm() < tolerance * moved.norm()
        if case == "cd":
            assert loop.target is not None and len(loop.averages) == 1
    assert set(loops) | set(left_out) == {"original", "diffusers"}


def test_the_step_of_a_checkout(tmp_path, monkeypatch):
    """Our package has the original's names, so that this checkout can stand for one; without a process of its own."""
    asked = []

    def here(command, **settings):
        asked.append(json.loads(command[-1]))
        return types.SimpleNamespace(returncode=0, stdout=json.dumps(original_checkout.main(asked[-1])))

    monkeypatch.setattr(peers.subprocess, "run", here)
    options = Options(device="cpu", cases=("cd",), warmup=0, repeats=2, flags=SMALL)
    config = train_config(options, "cd")
    found = peers.checkout_step(".", config, options)
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert asked[0]["batch"] == 2 and asked[0]["model"]["image_size"] == 8 and asked[0]["scales"] == 4
    with pytest.raises(SystemExit, match="has no package cm"):
        peers.checkout_step(str(tmp_path), config, options)


def test_a_checkout_that_fails_is_named(tmp_path):
    options = Options(device="cpu", cases=("cd",), warmup=0, repeats=1, flags=SMALL)
    (tmp_path / "torch.py").write_text("raise ImportError('no flash_attn here')")
    with pytest.raises(RuntimeError, match="no flash_attn here"):
        peers.checkout_step(str(tmp_path), train_config(options, "cd"), options)


def test_shares_of_the_ceiling_by_phase():
    """2 images, 10 FLOP of the student in 1 ms under a ceiling of 40 kFLOP/s: half of what is possible."""
    work = {"student": 10, "backward": 30, "distance": 20, "unknown": 5}
    phases = {"student": 1.0, "backward": 1.0, "distance": 4.0, "ema": 1.0}
    found = share_by_phase(work, phases, images=2, ceiling=40e3)
    assert found == {"student": 0.5, "backward": 1.5, "distance": 0.25}


def test_the_program_of_a_checkout_imports_nothing_of_ours():
    tree = ast.parse(peers.CHECKOUT_PROGRAM.read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert "torch" in names and not any(name.split(".")[0] == "cm" for name in names)
