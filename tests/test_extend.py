"""Plug-ins: the examples of docs/extend.md, from --help to evaluation, with no file of the repository touched."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.commands.cli import help_page, parse, parse_config
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config import plugins
from cm.config.fields import flags_of
from cm.config.rows import DISTANCES, METRICS, OBJECTIVES, SAMPLERS
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig, configuration_class
from cm.data import open_dataset
from cm.errors import UserError
from cm.models.pretrained import load_pretrained
from cm.runtime import logger
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights
from tests.helpers.analytic import order_of_convergence
from tests.helpers.eval_files import write_classifier

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "extend.md"
EXAMPLES = dict(re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL))
TRAIN = [
    "--data_dir", "squares:24", "--image_size", "8", "--class_cond", "True", "--num_channels", "32", "--channel_mult",
    "1", "--num_res_blocks", "1", "--attention_resolutions", "8", "--global_batch_size", "8", "--num_workers", "0",
    "--log_interval", "1", "--preview_count", "4", "--ema_rate", "0.9",
]  # fmt: skip


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The examples as files; what they register is taken out again."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    forget_all()  # what tests of other files have left
    yield tmp_path
    logger.reset()
    forget_all()


def forget_all():
    for plugin in list(plugins._loaded):
        plugins.forget(plugin)


def test_the_document_has_an_example_of_each_kind():
    assert set(EXAMPLES) == {
        *("my_loss.py", "my_distance.py", "my_sampler.py", "my_network.py", "my_data.py", "my_metric.py"),
    }
    assert len(EXAMPLES["my_loss.py"].splitlines()) < 60


def train(*flags, config=CmTrainConfig, steps=2):
    argv = [*TRAIN, "--total_training_steps", str(steps), "--save_interval", "2", *flags]
    run_train(parse(config, argv))
    logger.reset()


def run_script(script, *argv, cwd):
    command = [sys.executable, str(ROOT / "scripts" / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


LOSS = ("--plugin", "my_loss.py,my_data.py", "--training_mode", "huber_ct", "--start_scales", "6")


def test_a_loss_from_help_to_samples(examples):
    config = parse_config(CmTrainConfig, [*LOSS, "--huber_c", "0.01"])
    assert (config.huber_c, config.pair_mean, config.training_mode) == (0.01, -1.1, "huber_ct")
    assert "--huber_c" in help_page(type(config), "main")
    with pytest.raises(UserError, match="--huber_c must be positive, got 0"):
        parse_config(CmTrainConfig, [*LOSS, "--huber_c", "0"])
    with pytest.raises(UserError, match="--huber_c is for --training_mode huber_ct, not for progdist"):
        parse_config(CmTrainConfig, [*LOSS[:2], "--training_mode", "progdist", "--huber_c", "1"])
    train(*LOSS, "--out_dir", "run")
    names = {path.name for path in complete_checkpoints("run")[0].glob("*.pt")}
    assert not any(name.startswith("target") for name in names), "mu = 0 keeps no copy of the student"
    _, meta = load_weights(complete_checkpoints("run")[0] / "model000002.pt")
    assert meta["config"]["plugins"][0]["rows"] == ["training_mode huber_ct"]
    forget_all()
    again = parse_config(
        CmTrainConfig, ["--config", "run", *LOSS[:2]]
    )  # the plug-in brings rows that the file names
    assert (again.training_mode, again.start_scales, again.huber_c) == ("huber_ct", 6, 0.03)
    train(*LOSS, "--out_dir", "run", "--resume_with_changes", "True", steps=4)  # goes on
    assert [path.name for path in complete_checkpoints("run")] == ["step_000002", "step_000004"]
    assert (examples / "run" / "previews").is_dir()
    sample = parse(SampleConfig, ["--model_path", "run", "--num_samples", "4", "--out_dir", "s"])
    run_image_sample(sample)
    metadata = json.loads(next((examples / "s").glob("*.json")).read_text())
    assert metadata["config"]["sampler"] == "onestep" and metadata["nfe"] == 1


def test_a_model_says_which_plug_in_is_missing_or_has_changed(examples, capsys):
    train(*LOSS, "--out_dir", "run")
    (examples / "my_loss.py").write_text(EXAMPLES["my_loss.py"] + "\n# another version\n")
    argv = ["--model_path", "run", "--num_samples", "2", "--out_dir", "s"]
    run_image_sample(parse(SampleConfig, ["--plugin", "my_loss.py", *argv]))
    assert "run was made with another version of the plug-in my_loss.py" in capsys.readouterr().out
    for plugin in list(plugins._loaded):
        plugins.forget(plugin)
    with pytest.raises(
        UserError, match=r"run was made with training_mode huber_ct of the plug-in my_loss\.py"
    ):
        load_pretrained(parse_config(SampleConfig, argv))


def test_scripts_take_plug_ins(examples):
    """The same as a user would, with a process of its own."""
    argv = [*LOSS, *TRAIN, "--total_training_steps", "1", "--out_dir", "run", "--num_workers", "1"]
    dry = run_script("cm_train.py", *argv, "--dry_run", "True", cwd=examples)
    assert json.loads(dry.stdout)["huber_c"] == 0.03
    assert run_script("cm_train.py", *argv, cwd=examples).returncode == 0
    without = run_script("image_sample.py", "--model_path", "run", "--num_samples", "2", cwd=examples)
    assert without.returncode == 2 and without.stderr.count("\n") == 1
    assert "give --plugin" in without.stderr


def test_a_distance(examples):
    flags = ["--plugin", "my_distance.py,my_data.py", "--loss_norm", "charbonnier", "--width", "0.5"]
    train(*flags, "--training_mode", "consistency_training", "--start_scales", "4", "--out_dir", "run")
    a, b = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    made = DISTANCES.load("charbonnier")(width=0.5)
    torch.testing.assert_close(made(a, b), torch.full((2,), 1.25**0.5 - 0.5))
    # It serves continuous time too: its curvature is taken by differentiation.
    train(*flags, "--training_mode", "continuous_training", "--start_scales", "4", "--out_dir", "continuous")


def test_a_sampler_has_the_order_that_its_row_says(examples):
    plugins.load("my_sampler.py")
    row = SAMPLERS["dpmpp_2m"]
    assert order_of_convergence(row.load())[0] == pytest.approx(row.order, abs=0.15)
    config = parse_config(
        SampleConfig, ["--plugin", "my_sampler.py", "--sampler", "dpmpp_2m", "--steps", "7"]
    )
    assert config.sampler == "dpmpp_2m"
    with pytest.raises(UserError, match="did you mean dpmpp_2m"):
        parse_config(SampleConfig, ["--plugin", "my_sampler.py", "--sampler", "dpmpp2m"])


def test_a_network(examples):
    flags = [
        "--plugin",
        "my_network.py,my_data.py,my_sampler.py",
        "--network",
        "dit",
        "--depth",
        "2",
        "--num_heads",
        "2",
    ]
    train(*flags, "--out_dir", "edm", config=EdmTrainConfig)
    argv = [
        "--plugin",
        "my_network.py,my_sampler.py",
        "--model_path",
        "edm",
        "--num_samples",
        "4",
        "--steps",
        "5",
    ]
    run_image_sample(parse(SampleConfig, [*argv, "--sampler", "dpmpp_2m", "--out_dir", "s"]))
    config = json.loads(next((examples / "s").glob("*.json")).read_text())["config"]
    assert (config["network"], config["depth"], config["patch"]) == ("dit", 2, 2), (
        "its options come with the file"
    )
    with pytest.raises(UserError, match="--network dit computes in fp32 only"):
        parse_config(EdmTrainConfig, [*flags, "--precision", "bf16"])


def test_a_source_may_leave_out_shape_and_gather(examples):
    """Its images then go through the decoder one by one; what is missing of the rest is said in a line."""
    text = EXAMPLES["my_data.py"]
    without = text.replace("    shape = (8, 8, 1)\n", "").replace("np.zeros(self.shape", "np.zeros((8, 8, 1)")
    assert without != text
    (examples / "my_plain_data.py").write_text(without)
    plugins.load("my_plain_data.py")
    dataset = open_dataset("squares:6", image_size=8, labels="auto", class_cond=True)
    assert dataset.batch([1, 5], [0, 0]).images.shape == (2, 1, 8, 8) and dataset.num_classes == 4
    (examples / "my_plain_data.py").write_text(without.replace("def labels", "def classes"))
    plugins.load("my_plain_data.py")
    with pytest.raises(UserError, match="squares:6: its data source, Squares, has no labels"):
        open_dataset("squares:6", image_size=8, labels="auto", class_cond=True)


def test_a_metric(examples):
    from evaluations.evaluator import Options, evaluate, parse_metrics
    from evaluations.features import load_features
    from evaluations.npz_io import open_images, open_reference
    from evaluations.protocols import PROTOCOLS

    plugins.load("my_metric.py")
    random = np.random.RandomState(0)
    for name in ("real", "fake"):
        np.savez(examples / f"{name}.npz", arr_0=random.randint(0, 256, (20, 8, 8, 1), dtype=np.uint8))
    options = Options(PROTOCOLS["classifier"], parse_metrics("fid,coverage", PROTOCOLS["classifier"]))
    reference, samples = open_reference("real.npz"), [open_images("fake.npz")]
    network = load_features(f"classifier={write_classifier(examples / 'c.pt')}", "", torch.device("cpu"))
    found = evaluate(reference, samples, network, options, strict=False, force=True)
    assert 0 < found["metrics"]["coverage"] < 1 and METRICS["coverage"].needs == "images"


def test_what_a_plug_in_may_not_do(examples):
    for text, message in {
        "import nothing_of_this_name": r"--plugin bad\.py line 1: ModuleNotFoundError",
        "from cm import register\n@register.distance('l2')\ndef f(a, b): ...": "loss_norm l2 is there already",
        "from cm import register\nregister.sampler('two words')": "a name must be one word",
        "from cm import register\nregister.objective('x', options=3)(print)": "the options of x must be a dataclass",
    }.items():  # fmt: skip
        (examples / "bad.py").write_text(text)
        with pytest.raises(UserError, match=message):
            plugins.load("bad.py")
        assert "x" not in OBJECTIVES and DISTANCES["l2"].origin == ""
    with pytest.raises(UserError, match=r"--plugin none\.py: no such file"):
        plugins.load("none.py")
    with pytest.raises(UserError, match=r"--plugin not\.there: no such file or module"):
        plugins.load("not.there")


def test_a_plug_in_may_be_a_module_and_its_options_plain(examples, monkeypatch):
    (examples / "of_mine.py").write_text(
        "from dataclasses import dataclass\nfrom cm import register\n"
        "@dataclass\nclass Options:\n    wide: float = 2.0\n"
        "@register.distance('mine', options=Options)\n"
        "def mine(a, b, wide):\n    return wide * (a - b).flatten(1).sum(1)\n"
    )
    monkeypatch.syspath_prepend(str(examples))
    plugins.load("of_mine")
    cls = configuration_class(CmTrainConfig, {"loss_norm": "mine"})
    assert flags_of(cls)["wide"].default == 2.0
    assert parse_config(CmTrainConfig, ["--loss_norm", "mine", "--wide", "3"]).wide == 3.0
