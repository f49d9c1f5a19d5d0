"""ZeRO-1, moments and averages divided among ranks: the numbers of an unsharded run to the last bit, and its files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig
from cm.diffusion.precond import ConsistencyPrecond, EDMPrecond
from cm.errors import UserError
from cm.models import files
from cm.runtime import distributed, logger
from cm.storage.checkpoint import complete_checkpoints, step_directory
from cm.storage.saver import Saver
from cm.storage.weights import load_weights
from cm.tools.bench.train import state_memory
from cm.training import sharding, state
from cm.training.ema import EmaBank, HostTransfer
from cm.training.learning_rate import LearningRate
from cm.training.mixed_precision import MasterWeights
from cm.training.optimizers import make_optimizer
from cm.training.options import BatchSize, Execution, Optimization, Reports
from cm.training.sharding import Partition, ShardedOptimizer, assign_parts, move_into_one_buffer
from cm.training.trainer import Trainer
from tests.helpers.models import TINY_FLAGS, roles_of, tiny_unet
from tests.helpers.mp import run_ranks
from tests.training.test_train_ranks import GLOBAL_BATCH, OBJECTIVES, batches

STEPS = 8  # rectified Adam takes its usual form at the sixth
# objective, optimizer, precision, what else is special
RUNS = {
    "edm": ("edm", "radam", "fp32", {}),
    "pd": ("pd", "adam", "fp32", {"learning_rate": LearningRate(1e-3, "linear", 3), "ema_profiles": "0.05"}),
    "cd_bf16": ("cd", "radam", "bf16", {"ema_rate": "0.5,0.9", "ema_profiles": "0.05,0.1"}),
    "ct_fp16": ("ct", "adamw", "fp16", {"weight_decay": 0.1, "grad_clip": 0.5}),
}


def make_trainer(name, run_dir, sharded, student=None):
    objective, optimizer, precision, more = RUNS[name]
    objective = OBJECTIVES[objective]()
    options = {"learning_rate": LearningRate(1e-3), "ema_rate": "0.9", **more}
    layout = torch.channels_last if name == "edm" else torch.preserve_format
    roles = roles_of(objective, tiny_unet, ConsistencyPrecond() if objective.needs_target else EDMPrecond())
    student = student or roles.student.net
    return Trainer(
        roles=replace(roles, student=replace(roles.student, net=student.to(memory_format=layout))),
        objective=objective,
        data=batches(),
        batch=BatchSize(GLOBAL_BATCH),
        optimization=Optimization(
            optimizer=optimizer, precision=precision, shard="optimizer" if sharded else "none", **options
        ),
        saver=Saver(run_dir, background=sharded),
        reports=Reports(log_interval=100, save_interval=-1),
        total_steps=STEPS,
        execution=Execution(channels_last=name == "edm"),
    )


def train(name, run_dir, sharded, stop=STEPS, resume=None, piece=None):
    """Train on these ranks; returns how many values of each kind this rank holds."""
    logger.configure(str(run_dir), ["json"])
    if piece:
        sharding.PIECE_BYTES = piece
    trainer = make_trainer(name, run_dir, sharded)
    if resume:
        trainer.load(complete_checkpoints(resume)[-1])
        trainer.data = batches(trainer.state.step)
    trainer.total_steps = stop
    trainer.run_loop()
    return {kind: sum(t.numel() for t in tensors) for kind, tensors in trainer.state.held().items()}


def both(name, folder):
    return [train(name, f"{folder}/{sharded}", sharded) for sharded in (False, True)]


def contents(run_dir):
    """File name -> what the newest checkpoint holds: paths in the file, with types, shapes and bytes in order."""
    files = sorted(complete_checkpoints(run_dir)[-1].glob("*.pt"))
    return {path.name: flattened(load_weights(path)[0]) for path in files}


def flattened(value):
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
    return [(key, flattened(v)) for key, v in value.items()] if isinstance(value, dict) else value


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_leaves_the_files_of_an_unsharded_one(name, world, tmp_path):
    """Student, averages, target, moments: bit for bit, under the same keys in the same order."""
    held = run_ranks("tests.training.test_sharding:both", world, name, str(tmp_path), timeout=120)
    plain, sharded = contents(tmp_path / "False"), contents(tmp_path / "True")
    assert plain == sharded and len(plain) >= 3
    for kind in ("optimizer", "averages"):
        everything = held[0][0][kind]
        parts = [mine[kind] for _, mine in held]
        assert sum(parts) == everything and max(parts) < 1.2 * everything / world
    assert all(mine["parameters"] == whole["parameters"] for whole, mine in held)


def resaved(folder, target, sharded, piece):
    """Load the newest checkpoint and save it again, without a step in between."""
    logger.configure(target, ["json"])
    sharding.PIECE_BYTES = piece
    trainer = make_trainer("cd_bf16", target, sharded)
    reads = read_calls(state)
    trainer.load(complete_checkpoints(folder)[-1])
    trainer.save()
    trainer.saver.finish()
    return len(reads)


def read_calls(module):
    """Names of the files that this rank reads from now on through a module's load_part."""
    calls, original = [], module.load_part

    def counted(path, *args, **kwargs):
        calls.append(str(path))
        return original(path, *args, **kwargs)

    module.load_part = counted
    return calls


def test_any_number_of_ranks_sharded_or_not_goes_on_and_rank_0_reads(tmp_path):
    run_ranks("tests.training.test_sharding:train", 2, "cd_bf16", str(tmp_path / "2"), True, timeout=90)
    expected = contents(tmp_path / "2")
    for world, sharded, piece in ((3, True, 1000), (3, False, 10**9), (1, True, 1000)):
        target = tmp_path / f"{world}{sharded}"
        reads = run_ranks(
            "tests.training.test_sharding:resaved",
            world,
            str(tmp_path / "2"),
            str(target),
            sharded,
            piece,
            timeout=90,
        )
        assert contents(target) == expected
        assert reads[0] == len(expected) and not any(reads[1:])


@pytest.mark.parametrize("name", ["pd", "ct_fp16"])
def test_a_sharded_run_that_stopped_ends_as_if_it_had_not(name, tmp_path):
    arguments = [(tmp_path / "whole", True), (tmp_path / "run", True, 3)]
    for each in arguments:
        run_ranks("tests.training.test_sharding:train", 2, name, str(each[0]), *each[1:], timeout=90)
    again = (str(tmp_path / "run"), True, STEPS, str(tmp_path / "run"), 5000)
    run_ranks("tests.training.test_sharding:train", 2, name, *again, timeout=90)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def failing_load(folder):
    """The error of a load that skips the hashes, so that the file itself must be found damaged."""
    trainer = make_trainer("edm", f"{folder}/other", True)
    try:
        trainer.load(step_directory(folder, STEPS), verified=True)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("damaged", "words"),
    [("ema_0.9_000008.pt", "is not a readable"), ("opt000008.pt", "does not fit the optimizer")],
)
def test_a_damaged_file_is_one_error_on_all_ranks(tmp_path, damaged, words):
    run_ranks("tests.training.test_sharding:train", 2, "edm", str(tmp_path), True, timeout=90)
    path = complete_checkpoints(tmp_path)[-1] / damaged
    if damaged.startswith("opt"):
        torch.save({"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}, path)
    else:
        path.write_bytes(path.read_bytes()[:2000])
    errors = run_ranks("tests.training.test_sharding:failing_load", 2, str(tmp_path), timeout=60)
    assert errors[0] == errors[1] and damaged in errors[0] and words in errors[0]


FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 4 --num_workers 0 --log_interval 2 --save_interval 2 "
    "--preview_count 2 --ema_rate 0.9,0.5 --lr 1e-3 --total_training_steps 3 --network ddpmpp"
)


def script(script, folder, out, *extra):
    places = ["--data_dir", f"{folder}/images.npz", "--out_dir", out]
    config = {"edm": EdmTrainConfig, "cd": CmTrainConfig}[script]
    run_train(parse(config, [*FLAGS.split(), *places, *extra]))
    logger.reset()


def scripts(folder):
    """A teacher, then a student; both with and without sharding. Returns the names of read files."""
    images = np.random.RandomState(0).randint(0, 256, (8, 8, 8, 1), dtype=np.uint8)
    if distributed.is_main():
        np.savez(f"{folder}/images.npz", arr_0=images)
    distributed.barrier()
    reads = [read_calls(module) for module in (files, state)]
    for sharded in ("False", "True"):
        flags = ("--shard", {"False": "none", "True": "optimizer"}[sharded], "--ema_device", "cpu")
        script("edm", folder, f"{folder}/edm{sharded}", *flags)
        cd = ("--teacher_model_path", f"{folder}/edmFalse", "--loss_norm", "l2", "--start_ema", "0.5")
        script("cd", folder, f"{folder}/cd{sharded}", *cd, *flags)
    return [path for calls in reads for path in calls]


def test_scripts_take_the_flags_and_previews_are_the_same(tmp_path):
    first, second = run_ranks("tests.training.test_sharding:scripts", 2, str(tmp_path), timeout=120)
    assert len(first) == 2 and second == []
    for name in ("edm", "cd"):
        plain, sharded = tmp_path / f"{name}False", tmp_path / f"{name}True"
        assert contents(plain) == contents(sharded)
        previews = sorted(path.name for path in (plain / "previews").iterdir())
        assert previews == sorted(path.name for path in (sharded / "previews").iterdir()) != []
        for preview in previews:
            assert (plain / "previews" / preview).read_bytes() == (
                sharded / "previews" / preview
            ).read_bytes()


def test_one_process_has_nothing_to_divide(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((8, 8, 8, 1), np.uint8))
    script("edm", tmp_path, str(tmp_path / "run"), "--shard", "optimizer")
    assert "note: --shard optimizer" in capsys.readouterr().out


# -- the parts -----------------------------------------------------------------------------------------------------


def test_parts_are_even_and_hold_everything_once():
    sizes = [100, 1, 60, 41, 3, 97, 2, 1]
    owners = assign_parts(sizes, 3)
    loads = [sum(s for s, o in zip(sizes, owners) if o == part) for part in range(3)]
    assert loads == [102, 102, 101] and owners == assign_parts(sizes, 3)
    assert assign_parts([5, 7], 4) == [1, 0]


def test_parameters_that_move_into_one_buffer_keep_values_and_layouts():
    given = [*parameters(), torch.randn(3, 2).t(), torch.tensor(2.0), torch.randn(5, 4, 1, 1).bfloat16()]
    params = [p.clone() for p in given]
    memory = move_into_one_buffer(params, torch.device("cpu"))
    assert all(torch.equal(p, q) and p.stride() == q.stride() for p, q in zip(params, given))
    places = [p.data_ptr() - memory.data_ptr() for p in params]
    assert places[0] == 0 and all(place % 512 == 0 for place in places) and sorted(set(places)) == places
    memory.zero_()
    assert not any(p.any() for p in params)


def few_parameters():
    """More ranks than parameters: plain and sharded weights after two steps, the number of own parameters."""
    weights = []
    for sharded in (False, True):
        torch.manual_seed(0)
        params = list(nn.Linear(3, 2).parameters())
        partition = Partition(params, sharded=sharded)
        make = lambda p: make_optimizer("radam", p, lr=0.1)  # noqa: E731
        optimizer = ShardedOptimizer(make, params, partition)
        for step in range(8):
            for p in params:
                p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
        state = sharding.optimizer_state(optimizer)
        weights.append([p.detach().tolist() for p in params])
    return weights, len(partition.indices), sorted(state.get("state", {}))


def test_a_rank_may_have_no_parameters():
    results = run_ranks("tests.training.test_sharding:few_parameters", 3)
    assert [own for _, own, _ in results] == [1, 1, 0]
    assert all(plain == sharded == results[0][0][0] for (plain, sharded), _, _ in results)
    assert [state for _, _, state in results] == [[0, 1], [], []]


def hand_on(piece):
    """What rank 1 of two gets of rank 0's values of many types, and what comes back."""
    sharding.PIECE_BYTES = piece
    device = torch.device("cpu")
    given = {
        "plain": {"a": 1},
        0: torch.arange(6.0).view(2, 3).t(),
        1: torch.tensor(7.0),
        2: torch.zeros(0, 4),
        3: torch.tensor([True, False]),
        4: torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        5: torch.tensor([-1, 2**40]),
    }
    got = dict(sharding.broadcast_items(lambda: dict(given), device))
    same = all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in given.items() if k != "plain")
    rank = float(distributed.get_rank())
    back = sharding.gather_to_main({rank: torch.full((2,), rank), (rank, "b"): got[5]}, device)
    return same and got["plain"] == {"a": 1}, back and {k: v.tolist() for k, v in back.items()}


@pytest.mark.parametrize("piece", [1, 20, 10**6])
def test_tensors_of_all_types_travel_in_pieces(piece):
    (first, back), (second, nothing) = run_ranks("tests.training.test_sharding:hand_on", 2, piece)
    assert first and second and nothing is None
    assert back == {0.0: [0, 0], (0.0, "b"): [-1, 2**40], 1.0: [1, 1], (1.0, "b"): [-1, 2**40]}


def test_pieces_are_bounded_and_in_order(monkeypatch):
    monkeypatch.setattr(sharding, "PIECE_BYTES", 100)
    layout = [(i, torch.Size([n]), torch.float32) for i, n in enumerate([10, 15, 1, 100, 25, 5])]
    pieces = [[key for key, _, _ in piece] for piece in sharding._in_pieces(layout)]
    assert pieces == [[0, 1], [2], [3], [4], [5]]


def other_buffers():
    """Buffers after the start of training, where ranks began with different ones."""
    student = tiny_unet()
    student.register_buffer("freqs", torch.full((3,), float(distributed.get_rank() + 1)))
    return make_trainer("edm", ".", False, student).model.freqs.tolist()


def test_buffers_are_those_of_rank_0():
    assert run_ranks("tests.training.test_sharding:other_buffers", 2) == [[1, 1, 1]] * 2


# -- averages in host memory ---------------------------------------------------------------------------------------


def moved(params, steps, bank):
    for step in range(steps):
        for p in params:
            p += 1 + step
        bank.update(params, step)
    return [[p.cpu() for p in copy] for copy in bank.copies]


def parameters(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    conv = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return [torch.randn(50, 40, generator=generator).to(device), conv.to(device)]


def test_averages_that_lag_behind_in_a_thread_are_the_same():
    banks = [EmaBank(parameters(), "0.9,0.5", warmup=True) for _ in range(2)]
    banks[1]._transfer = HostTransfer(parameters())
    a, b = (moved(parameters(), 5, bank) for bank in banks)
    assert all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))
    banks[1].update(parameters(), 0)
    banks[1].reset([torch.full_like(p, 3.0) for p in parameters()])
    assert all((p == 3).all() for p in banks[1].copies[0])


def test_an_error_in_the_thread_is_raised_by_the_next_reader():
    bank = EmaBank(parameters(), 0.9)
    bank._transfer = HostTransfer(parameters())
    bank._copies = [[torch.zeros(1)] * 2]
    bank.update(parameters(), 0)
    with pytest.raises(ValueError, match="cannot follow"):
        bank.copies  # noqa: B018
    bank._transfer.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_averages_of_a_gpu_in_host_memory():
    beside, host = (EmaBank(parameters("cuda"), "0.9,0.5", device=d) for d in ("auto", "cpu"))
    assert beside.copies[0][0].is_cuda and not host.copies[0][0].is_cuda
    a, b = (moved(parameters("cuda"), 20, bank) for bank in (beside, host))
    for one, other in zip(a, b):
        for x, y in zip(one, other):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)  # a GPU rounds a x + b once


def test_state_memory_is_counted_by_kind(tmp_path):
    trainer = make_trainer("edm", tmp_path, False)
    trainer.run_step(*next(trainer.data))
    figures = state_memory(trainer)
    params = list(trainer.model.parameters())
    weights, counters = 4 * sum(p.numel() for p in params), 4 * len(params)
    expected = {
        "parameters": weights,
        "gradients": weights,
        "optimizer": 2 * weights + counters,
        "averages": weights,
    }
    assert figures["state_memory_by_kind_mib"] == {k: size / 2**20 for k, size in expected.items()}
    assert figures["state_memory_mib"] == pytest.approx((5 * weights + counters) / 2**20)


# -- the teacher ---------------------------------------------------------------------------------------------------


def test_a_teacher_that_never_changes_has_no_fp32_copy(tmp_path):
    teachers = [make_trainer(name, tmp_path, False).state.teacher for name in ("cd_bf16", "pd")]
    assert teachers[0].shared and teachers[0].master_params is teachers[0].model_params
    lean, full = (MasterWeights(tiny_unet(), "bf16", keep_fp32=keep) for keep in (False, True))
    assert not full.shared and full.master_params[0].dtype == torch.float32
    assert any(p.dtype == torch.bfloat16 for p in lean.master_params)
    assert all(torch.equal(a, b) for a, b in zip(lean.model_params, full.model_params))


def test_stages_keep_the_fp32_teacher(tmp_path, monkeypatch):
    monkeypatch.setitem(RUNS, "pd_bf16", ("pd", "adam", "bf16", {}))
    trainer = make_trainer("pd_bf16", tmp_path, False)
    assert not trainer.state.teacher.shared
    held = trainer.state.held()
    size = {kind: sum(t.nbytes for t in tensors) for kind, tensors in held.items()}
    assert size["teacher"] == size["parameters"] + size["fp32 parameters"] == size["gradients"]
