"""Going on with a run: which checkpoint is taken, what must not have changed, and that nothing of it shows."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig
from cm.errors import UserError
from cm.networks.architecture import Architecture, build_network
from cm.runtime import liveness, logger
from cm.runtime.claims import Claim
from cm.storage import checkpoint
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import file_sha256, load_weights, save_weights
from cm.tools.torture import compare
from cm.training.optimizers import make_optimizer, state_per_parameter
from tests.helpers import golden_data
from tests.helpers.models import TINY_FLAGS, tiny_unet

FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 4 --num_workers 0 --log_interval 3 --save_interval 2 "
    "--preview_count 0 --ema_rate 0.9 --lr 1e-3 --total_training_steps 5"
)
CT = "--training_mode consistency_training --loss_norm l2 --weight_schedule uniform --start_ema 0.5 --start_scales 4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed in (0, 1):
        images = np.random.RandomState(seed).randint(0, 256, (12, 8, 8, 1), dtype=np.uint8)
        np.savez(folder / f"{seed}.npz", arr_0=images)
    return folder


def train(data, run, *extra, script=CmTrainConfig, flags=f"{FLAGS} {CT}"):
    places = ["--data_dir", str(data / "0.npz"), "--out_dir", str(run)]
    run_train(parse(script, [*flags.split(), *places, *extra]))
    logger.reset()
    return Path(run)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An undisturbed run with checkpoints after 2, 4 and 5 steps."""
    return train(data, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def stopped(finished, tmp_path):
    """The same run as it was after 4 steps."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step_000005")
    return run


def test_the_same_command_goes_on_and_ends_as_if_nothing_had_happened(data, finished, stopped, capsys):
    train(data, stopped, "--num_workers", "1")
    compare(stopped, finished)
    out = capsys.readouterr().out
    assert "the latest start of this run: finished" in out and "from step 4" in out
    train(data, stopped)  # nothing left to do
    compare(stopped, finished)
    assert liveness.read_status(stopped)["ended"] == "finished"


def test_a_stop_in_the_middle_of_a_row_of_the_log_leaves_no_trace(data, finished, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            train(data, run, "--max_hours", "1e-9")
        assert stop.value.code == liveness.EXIT_UNFINISHED
        found = liveness.read_status(run)
        assert found["ended"] == "time" and found["exit_code"] == liveness.EXIT_UNFINISHED
    assert found["step"] == 2 and [p.name for p in complete_checkpoints(run)] == [
        "step_000001",
        "step_000002",
    ]
    train(data, run)
    compare(run, finished)


def test_a_stop_after_the_last_step_is_the_end(data, tmp_path):
    run = train(data, tmp_path / "run", "--max_hours", "1e-9", "--total_training_steps", "1")
    assert liveness.read_status(run)["ended"] == "finished"


def test_a_start_that_died_before_its_first_checkpoint_leaves_no_rows(data, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    train(data, run)
    compare(run, finished)


def test_changed_flags_are_named_and_need_consent(data, stopped):
    before = snapshot(stopped)
    with pytest.raises(UserError, match=r"--lr 0.001 -> 0.002.*--resume_with_changes") as error:
        train(data, stopped, "--lr", "2e-3", "--log_interval", "1")
    assert "log_interval" not in str(error.value)
    assert snapshot(stopped) == before
    train(data, stopped, "--lr", "2e-3", "--resume_with_changes", "True")
    optimizer = load_weights(complete_checkpoints(stopped)[-1] / "opt000005.pt")[0]
    assert optimizer["param_groups"][0]["lr"] == 2e-3
    assert "--resume_with_changes): --lr 0.001 -> 0.002" in (stopped / "log.txt").read_text()


def test_a_longer_run_is_told_how_its_decay_moves_and_a_shorter_one_is_refused(data, tmp_path):
    decay = ("--lr_schedule", "late_decay", "--total_training_steps")
    run = train(data, tmp_path / "run", *decay, "4")
    with pytest.raises(UserError, match="--total_training_steps 4 -> 3"):
        train(data, run, *decay, "3")
    train(data, run, *decay, "8")
    said = "4 -> 8; --lr_schedule late_decay follows the new end: at step 4 the rate is 0.000625 instead of 0.0001"
    assert said in (run / "log.txt").read_text()
    optimizer = load_weights(complete_checkpoints(run)[-2] / "opt000006.pt")[0]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(1e-3 * 1.25 * (1 - 6 / 8))


def test_changed_images_are_noticed(data, stopped):
    with pytest.raises(UserError, match=r"the images or labels of --data_dir \(fingerprint \w{8} -> \w{8}\)"):
        train(data, stopped, "--data_dir", str(data / "1.npz"))


def test_a_changed_global_batch_is_noticed_where_flags_are_per_rank(data, tmp_path):
    run = train(data, tmp_path / "run", "--batch_size", "4")
    path = complete_checkpoints(run)[-1]
    edit_state(path, global_batch_size=8)
    with pytest.raises(UserError, match="images per step 8 -> 4"):
        train(data, run, "--batch_size", "4")


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_state(path, **changes):
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps(state))
    approve(path, "state.json")


def approve(path, name):
    """Make the manifest agree with a file that was changed."""
    manifest = json.loads((path / "manifest.json").read_text())
    size = (path / name).stat().st_size
    manifest["files"][name] = {"bytes": size, "sha256": file_sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes", [{"step": "4"}, {"step": -1}, {"bad_steps": 1.5}, {"skipped": None}, {"config": []}]
)
def test_a_state_that_makes_no_sense(data, stopped, changes):
    edit_state(complete_checkpoints(stopped)[-1], **changes)
    with pytest.raises(UserError, match=next(iter(changes)) if "config" not in changes else "which flags"):
        train(data, stopped)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, 100)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "ema_0.9_000004.pt is damaged"), (truncate, "is incomplete"), (os.unlink, "is incomplete")],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    data, finished, stopped, capsys, damage, words
):
    damage(stopped / "checkpoints" / "step_000004" / "ema_0.9_000004.pt")
    train(data, stopped)
    out = capsys.readouterr().out
    assert words in out and "damaged_step_000004" in out and "from step 2" in out
    compare(stopped, finished)
    assert len(list((stopped / "checkpoints").glob("damaged_step_000004_*"))) == 1


def test_no_undamaged_checkpoint_is_an_error(data, stopped):
    for name in ("step_000002", "step_000004"):
        flip(stopped / "checkpoints" / name / "state.json")
    with pytest.raises(
        UserError, match=r"no checkpoint of .* is undamaged; .*step_000004/state\.json is damaged"
    ):
        train(data, stopped)
    assert len(complete_checkpoints(stopped)) == 2


def test_a_refused_start_leaves_a_damaged_checkpoint_where_it_is(data, stopped):
    flip(stopped / "checkpoints" / "step_000004" / "state.json")
    before = snapshot(stopped)
    with pytest.raises(UserError, match="--lr"):
        train(data, stopped, "--lr", "2e-3")
    assert snapshot(stopped) == before


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_damaged(data, stopped, monkeypatch):
    def stale(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoint, "file_sha256", stale)
    before = snapshot(stopped)
    with pytest.raises(UserError, match=r"step_000004 .*Stale file handle"):
        train(data, stopped)
    assert snapshot(stopped) == before


def test_resume_never_and_must(data, stopped, tmp_path):
    with pytest.raises(UserError, match=r"step_000004.*--resume never"):
        train(data, stopped, "--resume", "never")
    with pytest.raises(UserError, match="--resume must"):
        train(data, tmp_path / "other", "--resume", "must")


def test_a_run_that_is_still_going_on_is_left_alone(data, stopped):
    before = snapshot(stopped)
    message = rf"is being written by process {os.getpid()} of this host"
    with Claim(stopped, folder=stopped), pytest.raises(UserError, match=message):
        train(data, stopped)
    assert snapshot(stopped) == before


def test_a_target_without_a_decay_is_no_file_and_an_old_one_of_it_is_left_alone(data, tmp_path):
    """With mu = 0 the target is the student: checkpoints hold one set of weights, older ones may hold both."""
    mu = ("--start_ema", "0")
    whole = train(data, tmp_path / "whole", *mu)
    assert not list(whole.rglob("target_model*"))
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    shutil.rmtree(old / "checkpoints" / "step_000005")
    step = old / "checkpoints" / "step_000004"
    shutil.copy(step / "model000004.pt", step / "target_model000004.pt")
    approve(step, "target_model000004.pt")
    train(data, old, *mu)
    compare(old, whole)


def test_other_averages_than_those_of_the_checkpoint(data, stopped):
    """The refused start leaves the run as it was."""
    before = liveness.read_status(stopped)
    with pytest.raises(UserError, match=r"no ema_0\.5_000004\.pt.*--ema_rate"):
        train(data, stopped, "--ema_rate", "0.5", "--resume_with_changes", "True")
    assert liveness.read_status(stopped) == before


def test_a_run_goes_on_in_another_directory(data, finished, stopped, tmp_path):
    other = train(data, tmp_path / "other", "--resume_checkpoint", str(stopped))
    names = [p.name for p in complete_checkpoints(other)]
    assert names == ["step_000005"]
    for name in ("model000005.pt", "target_model000005.pt", "ema_0.9_000005.pt"):
        a, b = (load_weights(run / "checkpoints" / "step_000005" / name)[0] for run in (other, finished))
        assert all(torch.equal(a[key], b[key]) for key in b)
    with pytest.raises(UserError, match=r"no such file .*--resume_checkpoint"):
        train(data, tmp_path / "third", "--resume_checkpoint", str(tmp_path / "nothing"))


def test_a_run_whose_numbers_go_bad_says_so(data, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="2 steps in a row had no finite gradients"):
        train(data, run, "--lr", "1e30", "--max_bad_steps", "2", "--total_training_steps", "50")
    found = liveness.read_status(run)
    assert (found["ended"], found["exit_code"]) == ("bad numbers", 2) and "lower --lr" in found["message"]
    assert liveness.read_beats(run)[0].ended.startswith("BadNumbers: 2 steps in a row")


def test_the_loss_scale_is_kept_and_starts_afresh_with_fp16(data, tmp_path):
    run = train(data, tmp_path / "run", "--total_training_steps", "2", "--precision", "fp16")
    scale = json.loads((complete_checkpoints(run)[-1] / "state.json").read_text())["lg_loss_scale"]
    assert scale == pytest.approx(20 + 2e-3)
    more = ("--total_training_steps", "3", "--resume_with_changes", "True")
    train(data, run, *more, "--precision", "fp16")
    state = json.loads((complete_checkpoints(run)[-1] / "state.json").read_text())
    assert state["lg_loss_scale"] == pytest.approx(20 + 3e-3)
    single = train(data, tmp_path / "single", "--total_training_steps", "2", "--precision", "fp32")
    state = json.loads((complete_checkpoints(single)[-1] / "state.json").read_text())
    assert state["lg_loss_scale"] is None
    train(data, single, *more, "--precision", "fp16")
    state = json.loads((complete_checkpoints(single)[-1] / "state.json").read_text())
    assert state["lg_loss_scale"] == pytest.approx(20 + 1e-3)


# -- runs of the original -----------------------------------------------------------------------------------------


def test_flat_moments_of_an_fp16_run_go_to_the_parameters_by_the_golden_order():
    layout = golden_data.load("misc").config["fp16_master_layout"]
    options = {"in_channels": 3, **layout["create_model"]}
    model = build_network(Architecture(**options))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    value = {name: float(i) for i, name in enumerate(sorted(shapes))}  # tells the parameters apart
    state = {}
    for number, (names, shape) in enumerate(zip(layout["group_names"], layout["shapes"])):
        flat = torch.cat([torch.full((shapes[name].numel(),), value[name]) for name in names]).view(shape)
        state[number] = {"step": 7, "exp_avg": flat, "exp_avg_sq": flat * flat}
    cut = state_per_parameter(state, list(shapes.values()))
    for number, (name, shape) in enumerate(shapes.items()):
        assert cut[number]["step"] == 7
        assert cut[number]["exp_avg"].shape == shape and (cut[number]["exp_avg"] == value[name]).all(), name
        assert (cut[number]["exp_avg_sq"] == value[name] ** 2).all()


@pytest.mark.parametrize("steps", [2, 9], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize("name", ["radam", "adamw"])
def test_a_flat_state_of_tensors_goes_on_as_the_original_would(name, steps):
    """Two flat masters with step counters that are tensors, as torch 2 writes them, against one per parameter."""
    shapes = [(3,), (4, 3), (5,), (2, 4, 1), (6,)]
    groups = [[i for i, s in enumerate(shapes) if (len(s) <= 1) == vectors] for vectors in (True, False)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in shapes]
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(steps + 5)]

    def flat(tensors):
        return [torch.cat([tensors[i].flatten() for i in group]) for group in groups]

    masters = [torch.nn.Parameter(t) for t in flat(start)]
    original = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW}[name](masters, lr=0.01)

    def original_step(k):
        for master, gradient in zip(masters, flat(gradients[k])):
            master.grad = gradient
        original.step()

    for k in range(steps):
        original_step(k)
    content = copy.deepcopy(original.state_dict())
    masters_then = [m.detach().clone() for m in masters]
    params = [torch.nn.Parameter(torch.empty(s)) for s in shapes]
    with torch.no_grad():
        for group, master in zip(groups, masters_then):
            for i, piece in zip(group, master.split([params[i].numel() for i in group])):
                params[i].copy_(piece.view(shapes[i]))
    ours = make_optimizer(name, params, lr=0.01, weight_decay=original.defaults["weight_decay"])
    cut = state_per_parameter(content["state"], [p.shape for p in params])
    ours.load_state_dict({"state": cut, "param_groups": ours.state_dict()["param_groups"]})
    for k in range(steps, steps + 5):
        original_step(k)
        for p, gradient in zip(params, gradients[k]):
            p.grad = gradient
        ours.step()
    counters = [ours.state[p]["step"] for p in params]
    assert [int(c) for c in counters] == [steps + 5] * len(params)
    assert len({c.data_ptr() for c in counters}) == len(params)
    for master, before, result in zip(masters, masters_then, flat([p.detach() for p in params])):
        torch.testing.assert_close(result, master, rtol=0, atol=1e-3 * (master - before).abs().max().item())


@pytest.mark.parametrize("number", [0, 1])
def test_moments_of_another_network_are_refused(number):
    model = tiny_unet()
    shapes = [p.shape for p in model.parameters()]
    vectors = sum(s.numel() for s in shapes if len(s) <= 1)
    matrices = sum(s.numel() for s in shapes if len(s) > 1)
    sizes = [vectors, matrices]
    state_per_parameter({i: {"exp_avg": torch.zeros(n)} for i, n in enumerate(sizes)}, shapes)
    sizes[number] += 1
    with pytest.raises(ValueError, match=f"has {sizes[number]} values for {sizes[number] - 1} weights"):
        state_per_parameter({i: {"exp_avg": torch.zeros(n)} for i, n in enumerate(sizes)}, shapes)
    with pytest.raises(ValueError, match="3 states"):
        state_per_parameter({i: {} for i in range(3)}, shapes)


def test_an_fp16_run_of_the_original_goes_on_with_its_moments(data, tmp_path):
    """model, averages and optimizer files side by side, the optimizer over two flat tensors."""
    run = train(data, tmp_path / "run", script=EdmTrainConfig, flags=FLAGS)
    folder = complete_checkpoints(run)[0]  # within RAdam's warm-up
    original = tmp_path / "original"
    original.mkdir()
    for name in ("model", "ema_0.9_"):
        save_weights(original / f"{name}000002.pt", load_weights(folder / f"{name}000002.pt")[0])
    optimizer = load_weights(folder / "opt000002.pt")[0]
    shapes = [p.shape for p in load_weights(folder / "model000002.pt")[0].values()]
    moments = [optimizer["state"][i] for i in range(len(shapes))]
    groups = [[m for m in moments if m["exp_avg"].ndim <= 1], [m for m in moments if m["exp_avg"].ndim > 1]]
    flat = {
        i: {
            "step": torch.tensor(2.0),
            "exp_avg": torch.cat([m["exp_avg"].flatten() for m in group]),
            "exp_avg_sq": torch.cat([m["exp_avg_sq"].flatten() for m in group]),
        }
        for i, group in enumerate(groups)
    }
    param_groups = [{"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.5, "params": [0, 1]}]
    save_weights(original / "opt000002.pt", {"state": flat, "param_groups": param_groups})
    more = ("--total_training_steps", "6")
    flags = ("--resume_checkpoint", str(original / "model000002.pt"))
    again = train(data, tmp_path / "again", *more, *flags, script=EdmTrainConfig, flags=FLAGS)
    straight = train(data, tmp_path / "straight", *more, script=EdmTrainConfig, flags=FLAGS)
    for name in ("model000006.pt", "ema_0.9_000006.pt"):
        a, b = (load_weights(complete_checkpoints(r)[-1] / name)[0] for r in (again, straight))
        assert all(torch.equal(a[key], b[key]) for key in b), name
    group = load_weights(complete_checkpoints(again)[-1] / "opt000006.pt")[0]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)  # the flags', not the file's


def test_an_optimizer_that_does_not_fit_is_named(data, stopped):
    path = complete_checkpoints(stopped)[-1]
    content, meta = load_weights(path / "opt000004.pt")
    del content["state"][0]
    save_weights(path / "opt000004.pt", content, meta)
    approve(path, "opt000004.pt")
    with pytest.raises(UserError, match=r"opt000004\.pt does not fit the optimizer: it holds \d+ states for"):
        train(data, stopped)
