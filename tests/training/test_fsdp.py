"""--shard fsdp: the numbers of an undivided run but for rounding, in a part of its memory; shards and their files."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from cm.commands.cli import parse_config
from cm.config.scripts import SCRIPTS, EdmTrainConfig, configure
from cm.diffusion.precond import ConsistencyPrecond, EDMPrecond
from cm.errors import UserError
from cm.models.factory import create_network
from cm.models.files import load_model_file
from cm.objectives.forward_mode import ROUNDED, in_fp32
from cm.runtime import distributed, logger
from cm.storage.checkpoint import begin_checkpoint, complete_checkpoints, step_directory, verify_checkpoint
from cm.storage.saver import Saver
from cm.storage.shards import INDEX, load_part, names_of, read_index
from cm.storage.weights import Damaged
from cm.training.factory import create_objective
from cm.training.learning_rate import LearningRate
from cm.training.options import BatchSize, Execution, Optimization, Reports
from cm.training.trainer import Trainer
from tests.helpers.models import roles_of, tiny_unet
from tests.helpers.mp import run_ranks
from tests.helpers.small_runs import refuses, sample
from tests.training.test_sharding import script
from tests.training.test_train_ranks import GLOBAL_BATCH, OBJECTIVES, batches

STEPS, SAVED = 3, 2  # shards at step 2, files at the end


def tiny_edm2():
    torch.manual_seed(0)
    flags = dict(network="edm2", image_size=8, in_channels=1, num_channels=16, num_res_blocks=1)
    return create_network(
        configure(
            EdmTrainConfig, **flags, channel_mult="1,2", attention_resolutions="8", num_head_channels=16
        )
    )


# objective, network, options of the optimisation, images of a pass. Some gradients are nothing but rounding, which Adam
# would make large without its eps.
RUNS = {
    "edm": ("edm", tiny_unet, {"ema_rate": "0.5,0.9", "ema_profiles": "0.05", "grad_clip": 0.5}, 2),
    "cd": ("cd", tiny_edm2, {"optimizer": "adamw", "weight_decay": 0.1, "eps": 0.1}, -1),
    "pd": ("pd", tiny_unet, {"optimizer": "adam", "eps": 0.1, "ema_device": "cpu"}, -1),
    "cd_bf16": ("cd", tiny_edm2, {"precision": "bf16"}, -1),
    "ct_fp16": ("ct", tiny_unet, {"precision": "fp16"}, 2),
}
RESUMED = ("edm", "pd", "cd_bf16")


def make_trainer(name, run_dir, shard, **saver):
    objective, network, options, micro = RUNS[name]
    objective = OBJECTIVES[objective]()
    options = {"learning_rate": LearningRate(1e-3), "ema_rate": "0.9", "optimizer": "radam", **options}
    roles = roles_of(objective, network, ConsistencyPrecond() if objective.needs_target else EDMPrecond())
    layout = torch.channels_last if name == "edm" else torch.preserve_format
    return Trainer(
        roles=replace(roles, student=replace(roles.student, net=roles.student.net.to(memory_format=layout))),
        objective=objective,
        data=batches(),
        batch=BatchSize(GLOBAL_BATCH, micro),
        optimization=Optimization(shard=shard, **options),
        saver=Saver(run_dir, meta={"config": {"num_channels": 32}}, **saver),
        reports=Reports(log_interval=1, save_interval=SAVED),
        total_steps=STEPS,
        execution=Execution(channels_last=name == "edm"),
    )


def train(name, run_dir, shard="fsdp", resume=""):
    """Train on these ranks; the bytes of each kind that this rank holds."""
    logger.configure(str(run_dir), ["json"])
    trainer = make_trainer(name, run_dir, shard)
    if resume:
        trainer.load(resume)
        trainer.data = batches(trainer.state.step)
    trainer.run_loop()
    return {kind: sum(t.nbytes for t in tensors) for kind, tensors in trainer.state.held().items()}


def everything(folder):
    """All runs divided and not, and some divided ones resumed from shards: one start of the ranks for all."""
    held = {}
    for name in RUNS:
        held[name] = [train(name, f"{folder}/{name}_{shard}", shard) for shard in ("none", "fsdp")]
        if name in RESUMED:
            train(name, f"{folder}/{name}_again", resume=step_directory(f"{folder}/{name}_fsdp", SAVED))
    if distributed.is_main():
        images = np.random.RandomState(0).randint(0, 256, (8, 8, 8, 1), dtype=np.uint8)
        np.savez(f"{folder}/images.npz", arr_0=images)
    distributed.barrier()
    for shard in ("none", "fsdp"):
        script("edm", folder, f"{folder}/script_{shard}", "--shard", shard)
    return held


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, run_ranks("tests.training.test_fsdp:everything", 2, str(folder), timeout=300)


def content(checkpoint):
    """FILE/NAME -> tensor of what a checkpoint holds."""
    names = {*names_of(read_index(checkpoint)), *(path.name for path in checkpoint.glob("*.pt"))}
    found = {}
    for name in sorted(names):
        state, _ = load_part(checkpoint / name)
        if name.startswith("opt"):
            state = {f"{i}/{k}": v for i, own in state["state"].items() for k, v in own.items()}
        found |= {f"{name}/{key}": value for key, value in state.items()}
    return found


def assert_close(found, wanted, rounding):
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=rounding, atol=rounding, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_those_of_an_undivided_run_in_a_part_of_its_memory(name, runs):
    """Student, averages, target, teacher, moments, and what is logged; at the last step as the usual files."""
    folder, held = runs
    whole, part = (folder / f"{name}_{which}" for which in ("none", "fsdp"))
    rounding = 2e-2 if "16" in name else 2e-5
    assert_close(content(step_directory(part, STEPS)), content(step_directory(whole, STEPS)), rounding)
    assert_close(content(step_directory(part, SAVED)), content(step_directory(whole, SAVED)), rounding)
    assert not (step_directory(part, STEPS) / INDEX).exists()
    for everything, mine in (rank[name] for rank in held):
        assert everything.keys() >= mine.keys() and sum(mine.values()) < 0.55 * sum(everything.values())
    rows = [(run / "progress.jsonl").read_text().splitlines() for run in (whole, part)]
    assert len(rows[0]) == STEPS
    for mine, theirs in zip(*(map(json.loads, each) for each in rows), strict=True):
        for key in ("loss", "grad_norm", "param_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=20 * rounding)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_goes_on_from_its_shards_ends_as_if_it_had_not_stopped(name, runs):
    ends = [content(step_directory(runs[0] / f"{name}_{which}", STEPS)) for which in ("again", "fsdp")]
    assert_close(*ends, 0)


def resaved(folder, name, shard):
    """Load the shards of two ranks and save them again, without a step in between."""
    logger.configure(f"{folder}/resaved", ["json"])
    trainer = make_trainer(name, f"{folder}/{name}_{shard}_resaved", shard)
    trainer.load(step_directory(f"{folder}/{name}_fsdp", SAVED))
    trainer.save()
    trainer.saver.finish()


@pytest.mark.parametrize(("world", "shard"), [(3, "fsdp"), (1, "none")])
def test_any_number_of_ranks_goes_on_from_shards(world, shard, runs):
    folder, _ = runs
    run_ranks("tests.training.test_fsdp:resaved", world, str(folder), "pd", shard, timeout=120)
    again = step_directory(folder / f"pd_{shard}_resaved", SAVED)
    assert (again / INDEX).exists() == (shard == "fsdp")
    assert_close(content(again), content(step_directory(folder / "pd_fsdp", SAVED)), 0)


def test_a_reader_of_the_run_gets_the_weights_from_its_shards(runs, tmp_path):
    """As `cm sample` reads them; nothing of the file can lead out of the checkpoint or ask for memory it has not."""
    shutil.copytree(step_directory(runs[0] / "edm_fsdp", SAVED), tmp_path / "step_000002")
    found = load_model_file(str(tmp_path / "step_000002"))
    assert found.kind == "ema:0.9" and found.config == {"num_channels": 32} and len(found.sha256) == 64
    expected, _ = load_part(step_directory(runs[0] / "edm_none", SAVED) / "ema_0.9_000002.pt")
    assert_close(found.state, expected, 2e-5)
    path = tmp_path / "step_000002" / INDEX
    index = json.loads(path.read_text())
    name, entry = next((n, e) for n, e in index.items() if len(e["pieces"]) == 2)
    for piece in (
        [*entry["pieces"][0][:2], "../other", 0, 10**6],
        [*entry["pieces"][0][:4], 10**12],
        [[0, 0, 0, 0], [10**6, 10**6], *entry["pieces"][0][2:]],
    ):
        path.write_text(json.dumps(index | {name: entry | {"pieces": [piece, entry["pieces"][1]]}}))
        with pytest.raises(Damaged, match="no index of shards"):
            load_model_file(str(tmp_path / "step_000002"))
    path.write_text(json.dumps(index | {name: entry | {"size": [10**6, 10**6], "pieces": []}}))
    with pytest.raises(Damaged, match="no index of shards"):
        load_model_file(str(tmp_path / "step_000002"))
    path.write_text(json.dumps(index))
    damaged = tmp_path / "step_000002" / entry["pieces"][0][2]
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    with pytest.raises(UserError, match="cannot be read") as error:
        load_part(tmp_path / "step_000002" / name.partition("/")[0])
    assert "\n" not in str(error.value)


def test_previews_and_samples_of_a_run_are_those_of_an_undivided_one(runs, tmp_path):
    """Previews of all ranks together; `cm sample` reads a checkpoint of shards as any other."""
    plain, divided = (runs[0] / f"script_{shard}" for shard in ("none", "fsdp"))
    names = sorted(path.name for path in (plain / "previews").iterdir())
    assert names == sorted(path.name for path in (divided / "previews").iterdir()) != []
    for name in names:
        a, b = (np.asarray(Image.open(run / "previews" / name)).astype(int) for run in (plain, divided))
        assert np.abs(a - b).max() <= 1
    drawn = [
        sample(str(step_directory(run, 2)), tmp_path / run.name)[0].astype(int) for run in (plain, divided)
    ]
    assert (step_directory(divided, 2) / INDEX).exists() and np.abs(drawn[0] - drawn[1]).max() <= 1


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("edm_train", "--shard_optimizer True", "--shard_optimizer is called --shard now"),
        ("edm_train", "--shard zero", "--shard must be one of"),
        ("edm_train", "--shard fsdp --compile True", "--shard fsdp .* --compile True"),
        (
            "cm_train",
            "--shard fsdp --training_mode ctm --start_ema 0.9",
            "--shard fsdp .* --dsm_adaptive True",
        ),
    ],
)
def test_what_does_not_go_together_is_said(script, flags, words):
    def run():
        create_objective(parse_config(SCRIPTS[script], flags.split()))

    refuses(words, run)


def test_derivatives_of_a_network_that_is_rounded_when_gathered_are_refused():
    network = tiny_unet()
    assert in_fp32(network) is network
    setattr(network, ROUNDED, True)
    refuses("--shard fsdp .* --precision fp32", lambda: in_fp32(network))


@pytest.mark.parametrize(("said", "meant"), [(True, "optimizer"), (False, "none")])
def test_a_configuration_of_an_earlier_version_says_it_by_the_former_name(said, meant, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"shard_optimizer": said}))
    config = parse_config(EdmTrainConfig, ["--config", str(tmp_path / "config.json")])
    assert config.shard == meant and "shard" in config.explicit


def cut_off(folder, how):
    """Two saves, of which rank 1 does not get through the second; the error, where it lives to tell one."""
    logger.configure(folder, ["json"])
    trainer = make_trainer("cd_bf16", folder, "fsdp")
    trainer.save()
    write = dcp.FileSystemWriter.write_data

    def write_data(self, plan, planner):
        if distributed.get_rank() == 1 and how == "full":
            raise OSError(28, "No space left on device")
        done = write(self, plan, planner)
        if distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    dcp.FileSystemWriter.write_data = write_data
    trainer.state.step = 1
    try:
        trainer.save()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("how", ["full", "killed"])
def test_a_save_that_is_cut_off_leaves_the_one_before_it(how, tmp_path):
    try:
        errors = run_ranks("tests.training.test_fsdp:cut_off", 2, str(tmp_path), how, timeout=60)
        assert errors[0] == errors[1] and "rank 1: [Errno 28] No space left" in errors[0]
        assert "the newest complete checkpoint is" in errors[0]
    except RuntimeError as error:
        # Either the death of rank 1 is seen first, or what rank 0 says of it
        assert how == "killed" and re.search("exit code -9|(closed|reset) by peer|remote worker", str(error))
    assert complete_checkpoints(tmp_path) == [step_directory(tmp_path, 0)]
    verify_checkpoint(step_directory(tmp_path, 0))
    assert begin_checkpoint(tmp_path, 1).name == ".tmp_step_000001"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        ".tmp_step_000001",
        "step_000000",
    ]
