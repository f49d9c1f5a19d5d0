"""Damaged, malicious and absurd inputs: each ends in one clear line and exit code 2, and nothing is overwritten.

All cases run in this process through `run_main`, as a script would.
"""

import io
import json
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig
from cm.runtime import job, logger
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights, save_weights
from tests.helpers.bad_data import DATA, Malicious
from tests.helpers.models import TINY_FLAGS

FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 4 --num_workers 0 --save_interval 1 --preview_count 0 "
    "--ema_rate 0.9 --total_training_steps 2"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with images, a finished run and a copy of its weights."""
    folder = tmp_path_factory.mktemp("world")
    images = np.random.RandomState(0).randint(0, 256, (8, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    train(folder, folder / "run")
    shutil.copy(complete_checkpoints(folder / "run")[-1] / "ema_0.9_000002.pt", folder / "weights.pt")
    logger.reset()
    return folder


def train(folder, run, *flags, script=EdmTrainConfig):
    places = ["--data_dir", str(folder / "images.npz"), "--out_dir", str(run)]
    run_train(parse(script, [*FLAGS.split(), *places, *map(str, flags)]))


def sample(model, out):
    argv = ["--model_path", str(model), "--num_samples", "1", "--steps", "2", "--sampler", "euler"]
    run_image_sample(parse(SampleConfig, [*argv, "--training_mode", "edm", "--out_dir", str(out)]))


def refused(capsys, action, *words):
    """The action ends the program with exit code 2 and one line that has the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        job.run_main(action)
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    assert text.startswith("error: ") and text.count("\n") == 1 and len(text) < 700, text
    for word in words:
        assert word in text, text


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# -- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(24))
def test_truncated_weights(world, tmp_path, capsys, number):
    content = (world / "weights.pt").read_bytes()
    cut = random.Random(number).randrange(len(content))
    (tmp_path / "w.pt").write_bytes(content[:cut])
    refused(capsys, lambda: sample(tmp_path / "w.pt", tmp_path / "out"), "w.pt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", range(30))
def test_a_flipped_bit_is_found_or_changes_nothing(world, tmp_path, capsys, number):
    content = bytearray((world / "weights.pt").read_bytes())
    place = random.Random(100 + number).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    (tmp_path / "w.pt").write_bytes(content)
    original = load_weights(world / "weights.pt")[0]
    loaded = []
    try:
        job.run_main(lambda: loaded.append(load_weights(tmp_path / "w.pt")[0]))
    except SystemExit as stop:
        assert stop.code == 2 and capsys.readouterr().err.count("\n") == 1
    else:  # padding, a time stamp
        assert all(torch.equal(loaded[0][name], value) for name, value in original.items())


def test_a_flipped_bit_in_a_tensor_is_found(world, tmp_path, capsys):
    content = bytearray((world / "weights.pt").read_bytes())
    name = "input_blocks.0.0.weight"
    weight = load_weights(world / "weights.pt")[0][name].numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    refused(capsys, lambda: sample(tmp_path / "w.pt", tmp_path / "out"), "w.pt", "checksum")


def renamed(state):
    state["extra.weight"] = state.pop("out.2.weight")


def missing(state):
    del state["out.2.weight"]


def integers(state):
    state["out.2.weight"] = state["out.2.weight"].long()


def swapped(state):
    state["out.2.weight"], state["out.2.bias"] = state["out.2.bias"], state["out.2.weight"]


def reshaped(state):
    state["out.2.weight"] = state["out.2.weight"].flatten()


def no_tensor(state):
    state["out.2.weight"] = "a text"


def expanded(state):
    """A small storage that claims to be large."""
    state["out.2.weight"] = torch.zeros(1).expand(10**6, 10**6)


def nested(state):
    state["out.2.weight"] = {"a": state["out.2.weight"]}


def numbered(state):
    state[7] = state.pop("out.2.weight")


CHANGES = [renamed, missing, integers, swapped, reshaped, no_tensor, expanded, nested, numbered]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_do_not_fit(world, tmp_path, capsys, change):
    state, meta = load_weights(world / "weights.pt")
    change(state)
    if change is expanded:
        torch.save(state, tmp_path / "w.pt")  # as it is: `save_weights` would write it out
        with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
            archive.writestr("w/extra/cm.json", json.dumps(meta))
    else:
        save_weights(tmp_path / "w.pt", state, meta)
    refused(capsys, lambda: sample(tmp_path / "w.pt", tmp_path / "out"), "w.pt", "out.2.weight")


def with_member(source, name, content, **options):
    """A copy of a weights file with one more zip member."""

    def write(path):
        shutil.copy(source / "weights.pt", path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, content, **options)

    return write


def overlapping(source):
    """A zip whose directory lists one large member many times over (as zip bombs do)."""

    def write(path):
        blob = io.BytesIO()
        with zipfile.ZipFile(blob, "w") as archive:
            archive.writestr("w/data.pkl", pickle.dumps({}))
            archive.writestr("w/data/0", bytes(10_000))
            infos = archive.filelist
            for number in range(1, 50):
                again = zipfile.ZipInfo(f"w/data/{number}")
                for field in ("header_offset", "CRC", "file_size", "compress_size"):
                    setattr(again, field, getattr(infos[1], field))
                infos.append(again)
        path.write_bytes(blob.getvalue())

    return write


def pickled(value, protocol=2):
    return lambda source: lambda path: path.write_bytes(pickle.dumps(value, protocol))


def saved(value, **options):
    return lambda source: lambda path: torch.save(value, path, **options)


def raw(content):
    return lambda source: lambda path: path.write_bytes(content)


# A pickle that calls a function by name, written by hand: no class is needed to attack.
CALLS = {
    "builtins": b"cbuiltins\neval\n(V__import__('os').mkdir('pwned')\ntR.",
    "posix": b"cposix\nmkdir\n(Vpwned\ntR.",
    "subprocess": b"csubprocess\ncheck_output\n((lVmkdir\naVpwned\natR.",
    "torch": b"ctorch.hub\nload\n(Vx\nVy\ntR.",
    "numpy": b"cnumpy.testing\nrunstring\n(Vimport os\n(dtR.",
}
FILES = {
    "empty": raw(b""),
    "text": raw(b"these are no weights\n"),
    "zeros": raw(bytes(5000)),
    "a list": saved([torch.zeros(2)]),
    "a tensor": saved(torch.zeros(2)),
    "a number": saved(7),
    "malicious zip": saved({"w": Malicious()}),
    "malicious old format": saved({"w": Malicious()}, _use_new_zipfile_serialization=False),
    "malicious pickle": pickled(Malicious()),
    "malicious pickle 5": pickled(Malicious(), 5),
    **{f"call of {name}": raw(content) for name, content in CALLS.items()},
    "a module": saved(torch.nn.Linear(2, 2)),
    "a deep nest": raw(b"(" * 20_000 + b"."),
    "numpy pickle": pickled(np.zeros(3)),
    "compressed member": lambda source: with_member(
        source, "w/data/bomb", bytes(10**7), compress_type=zipfile.ZIP_DEFLATED
    ),
    "overlapping members": overlapping,
    "leading out": lambda source: with_member(source, "../../outside", b"x"),
    "absolute": lambda source: with_member(source, "/etc/outside", b"x"),
    "no JSON": lambda source: with_member(source, "w/extra/cm.json", b"{"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_weights_are_refused_and_not_run(world, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    FILES[name](world)(tmp_path / "w.pt")
    if name == "no JSON":  # two members of one name: the first one counts
        shutil.copy(world / "weights.pt", "plain.pt")
        torch.save(load_weights("plain.pt")[0], "w.pt")
        with zipfile.ZipFile("w.pt", "a") as archive:
            archive.writestr("w/extra/cm.json", b"{")
    refused(capsys, lambda: sample(tmp_path / "w.pt", tmp_path / "out"), "w.pt")
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


# -- checkpoint directories ---------------------------------------------------------------------------------------


def manifest_with(**changes):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest.update(changes)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def entry(name, **values):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = values
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def write(name, content):
    return lambda path: (path / name).write_bytes(content)


ZERO = {"bytes": 0, "sha256": "0" * 64}
DIRECTORIES = {
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "empty manifest": write("manifest.json", b""),
    "manifest of zeros": write("manifest.json", bytes(100)),
    "a list for a manifest": write("manifest.json", b"[]"),
    "a list of files": manifest_with(files=["model000002.pt"]),
    "no files": manifest_with(files={}),
    "a path that leads out": entry("../step_000001/model000001.pt", **ZERO),
    "an absolute path": entry("/etc/passwd", **ZERO),
    "a parent": entry("..", **ZERO),
    "a size that is text": entry("state.json", bytes="1", sha256="0"),
    "no hash": entry("state.json", bytes=10),
    "a missing file": lambda path: (path / "opt000002.pt").unlink(),
    "a short file": write("opt000002.pt", b"short"),
    "a changed file": lambda path: flip(path / "model000002.pt"),
    "a changed state": lambda path: flip(path / "state.json"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_damaged_checkpoints_are_not_gone_on_from(world, tmp_path, capsys, name):
    """With no other checkpoint an error, or a start from nothing: never a wrong resume."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    shutil.rmtree(run / "checkpoints" / "step_000001")
    DIRECTORIES[name](run / "checkpoints" / "step_000002")
    before = snapshot(world)
    refused(capsys, lambda: train(world, run, "--resume", "must"), str(run))
    assert snapshot(world) == before


# -- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_damaged_data(world, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    DATA[name](tmp_path / "data")
    found = [path for path in tmp_path.iterdir() if path.stem == "data"] or [tmp_path / "data"]
    labels = ["--class_cond", "True"] if "label" in name else []
    argv = [*FLAGS.split(), "--data_dir", str(found[0]), "--out_dir", str(tmp_path / "run"), *labels]
    refused(capsys, lambda: run_train(parse(EdmTrainConfig, argv)), str(found[0]))
    assert complete_checkpoints(tmp_path / "run") == [] and not (tmp_path / "pwned").exists()


# -- configurations and flags -------------------------------------------------------------------------------------

CONFIGS = [
    "", "{", "[]", "null", "7", '"text"', '{"lr": "fast"}', '{"lr": null}', '{"lr": [1]}', '{"lr": {}}', '{"lr": true}',
    '{"lr": NaN}', '{"lr": Infinity}', '{"lr": -1}', '{"rate": 1}', '{"image_size": 8.5}', '{"image_size": 1e99}',
    '{"class_cond": "perhaps"}', '{"class_cond": 2}', '{"training_mode": "magic"}', '{"preset": "unheard_of"}',
    '{"seed": "0x10"}', "\x00\x01", '{"lr": 1}' * 2, "[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_damaged_configurations(world, tmp_path, capsys, number):
    (tmp_path / "c.json").write_text(CONFIGS[number])
    flags = ["--config", tmp_path / "c.json", "--training_mode", "consistency_training"]
    if "training_mode" in CONFIGS[number]:
        flags = flags[:2]
    refused(capsys, lambda: train(world, tmp_path / "run", *flags, script=CmTrainConfig))
    assert not (tmp_path / "run").exists()


ABSURD = [
    "--lr nan", "--lr -1", "--lr inf", "--lr fast", "--image_size -8", "--image_size 8.5",
    "--image_size 7 --channel_mult 1,1", "--num_channels 0", "--num_channels 33", "--num_channels 1e3",
    "--channel_mult 0", "--channel_mult a,b", "--channel_mult ,", "--channel_mult 1,1,1,1,1,1,1",
    "--attention_resolutions 3", "--attention_resolutions x", "--num_head_channels 7", "--num_head_channels 0",
    "--num_res_blocks 0", "--dropout 1", "--dropout -0.1", "--sigma_min 0", "--sigma_min 90", "--sigma_max -1",
    "--sigma_max 1e39", "--rho 0", "--sigma_data 0", "--ema_rate 2", "--ema_rate x", "--ema_rate 0.9,0.9",
    "--global_batch_size 0",
    "--global_batch_size 100", "--batch_size -2", "--microbatch 0", "--save_interval 0", "--log_interval -1",
    "--precision fp8", "--precision bf16 --use_fp16 True", "--resume perhaps", "--keep_every 5", "--keep_last -1",
    "--max_hours -1", "--max_bad_steps 0", "--step_timeout 0", "--startup_timeout -5", "--on_save_error ignore",
    "--optimizer lion", "--adam_eps 0", "--beta1 1", "--weight_decay -1", "--seed -1", "--seed x",
    "--class_cond maybe", "--class_cond True", "--in_channels 2", "--device quantum", "--network resnet",
    "--schedule_sampler magic", "--p_std -1", "--unknown 1", "--lr", "--resume must", "--num_workers -1",
    "--num_workers 100000", "--resume_checkpoint nowhere", "--preset unheard_of",
    "--lr_schedule linear --total_training_steps 0",
]  # fmt: skip


@pytest.mark.parametrize("flags", ABSURD)
def test_absurd_flags(world, tmp_path, capsys, flags):
    before = snapshot(world)
    refused(capsys, lambda: train(world, tmp_path / "run", *flags.split()))
    assert complete_checkpoints(tmp_path / "run") == [] and snapshot(world) == before


def test_an_output_folder_that_cannot_be_written(world, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    refused(capsys, lambda: train(world, tmp_path / "file"), "--out_dir", str(tmp_path / "file"))
    refused(capsys, lambda: train(world, tmp_path / "file" / "below"), "--out_dir")
    assert (tmp_path / "file").read_text() == "in the way"


def test_there_are_a_hundred_and_fifty_cases():
    cases = [range(24), range(30), CHANGES, FILES, DIRECTORIES, DATA, CONFIGS, ABSURD]
    assert sum(map(len, cases)) >= 150
