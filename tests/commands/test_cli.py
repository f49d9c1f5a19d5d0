"""Command line: published commands, precedence, help, dry runs, errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cm.commands.cli import help_page, parse, parse_config
from cm.config import presets
from cm.config.fields import flags_of, meta_of
from cm.config.parsing import str2bool
from cm.config.scripts import (
    SCRIPTS,
    CmTrainConfig,
    EdmTrainConfig,
    SampleConfig,
    configuration_class,
    resolved,
)
from cm.errors import UserError
from tests.helpers import golden_data

ROOT = Path(__file__).parents[2]


def run_script(script: str, *argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def dry_run(config_class, argv, capsys) -> dict:
    with pytest.raises(SystemExit) as end:
        parse(config_class, [*argv, "--dry_run", "True"])
    assert end.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("number", range(23))
def test_published_commands_are_accepted_unchanged(number):
    command = golden_data.json("launch_commands")[number]
    config_class = SCRIPTS[command["script"]]
    config = parse(config_class, command["argv"])
    flags = flags_of(config_class)
    for flag, text in zip(command["argv"][::2], command["argv"][1::2]):
        name = flag.removeprefix("--")
        kind = type(flags[name].default)
        assert getattr(config, name) == (str2bool(text) if kind is bool else kind(text)), name
    given = {flag.removeprefix("--") for flag in command["argv"][::2]}
    assert config.explicit == given
    assert all(getattr(config, name) == field.default for name, field in flags.items() if name not in given)


def test_there_are_no_further_published_commands():
    assert len(golden_data.json("launch_commands")) == 23


@pytest.mark.parametrize(
    "number, parameters", [(0, 295_899_267), (6, 526_304_771), (11, 526_304_771), (12, 295_899_267)]
)
def test_dry_run_of_published_commands_counts_the_released_parameters(number, parameters, capsys):
    command = golden_data.json("launch_commands")[number]
    printed = dry_run(SCRIPTS[command["script"]], command["argv"], capsys)
    assert printed.pop("num_parameters") == parameters
    assert set(printed) >= set(flags_of(SCRIPTS[command["script"]]))


def test_precedence_is_flag_config_preset_default(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"lr": 0.5, "seed": 7, "preset": "digits_edm"}))
    config = parse_config(EdmTrainConfig, ["--config", str(path), "--seed", "9"])
    assert config.seed == 9  # flag
    assert config.lr == 0.5  # file before preset
    assert config.global_batch_size == 64  # preset of the file before default
    assert config.weight_decay == 0.0  # default
    assert {"seed", "lr", "global_batch_size"} <= config.explicit and "weight_decay" not in config.explicit
    assert parse_config(EdmTrainConfig, ["--config", str(path), "--preset", "tiny"]).global_batch_size == 8
    paper = parse_config(CmTrainConfig, ["--preset", "imagenet64_ct", "--variant", "paper", "--seed", "3"])
    assert (paper.lr, paper.seed, paper.end_scales) == (8e-6, 3, 200)


@pytest.mark.parametrize("script", presets.get("tiny").scripts)
def test_what_dry_run_prints_is_a_config_file(script, tmp_path, capsys):
    argv = ["--preset", "tiny", "--sigma_max", "70", "--class_cond", "True", "--num_classes", "5"]
    printed = dry_run(SCRIPTS[script], argv, capsys)
    assert isinstance(printed["num_parameters"], int) and printed["dry_run"] is True
    path = tmp_path / "config.json"
    path.write_text(json.dumps(printed))
    assert dry_run(SCRIPTS[script], ["--config", str(path)], capsys) == {**printed, "config": str(path)}
    assert resolved(parse_config(SCRIPTS[script], ["--config", str(path)]))["sigma_max"] == 70.0


def test_infinity_survives_the_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(resolved(SampleConfig())))
    assert parse_config(SampleConfig, ["--config", str(path)]).s_tmax == float("inf")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lerning_rate", "1"], "unknown argument --lerning_rate"),
        (["--num_chanels", "32"], "did you mean --num_channels?"),
        (["--use_fp16=maybe"], "use_fp16"),
        (["--lr", "fast"], "--lr"),
        (["--lr"], "--lr"),
        (["data"], "unknown argument data"),
        (["--image"], "unknown argument --image"),  # no abbreviations
        (["--image_size", "-1"], "--image_size"),
        (["--preset", "imagenet46_edm"], "imagenet64_edm"),
        (["--preset", "imagenet64_ct"], "cm_train"),
        (["--preset", "digits_edm", "--variant", "draft"], "--variant"),
        (["--config", "/does/not/exist.json"], "/does/not/exist.json"),
        ([], "--data_dir"),
    ],
)
def test_bad_command_lines_give_one_line(argv, message):
    with pytest.raises(UserError) as error:
        parse(EdmTrainConfig, argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", "JSON object"),
        ("{", "config.json"),
        ('{"learning_rate": 1}', "unknown flag learning_rate"),
        ('{"image_size": "big"}', "image_size must be INT"),
        ('{"image_size": 64.5}', "image_size must be INT"),
        ('{"use_fp16": 1}', "use_fp16 must be BOOL"),
        ('{"data_dir": null}', "data_dir must be TEXT"),
        ('{"image_size": true}', "image_size must be INT"),
    ],
)
def test_bad_config_files_give_one_line(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        parse(EdmTrainConfig, ["--config", str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_all_explains_every_flag_and_help_the_main_ones(script):
    cls = configuration_class(SCRIPTS[script], {})
    # Lines are wrapped, also after hyphens.
    everything, main = ("".join(help_page(cls, which).split()) for which in ("all", "main"))
    for name, field in flags_of(cls).items():
        meta = meta_of(field)
        default = '""' if field.default == "" else field.default
        parts = [f"--{name}", meta.help, f"[{meta.unit}]" * bool(meta.unit), f"(default: {default})"]
        for part in (*parts, ", ".join(c for c in meta.names if c)):
            assert "".join(part.split()) in everything, name
        assert (f"--{name}{'BOOL' if type(field.default) is bool else ''}" in main) >= meta.main


def test_options_are_flags_where_their_row_is_chosen():
    config = parse_config(SampleConfig, ["--sampler", "pc", "--snr", "0.3"])
    assert config.snr == 0.3 and config.corrector_steps == 1
    with pytest.raises(UserError, match="--snr is for --sampler pc, not for heun"):
        parse_config(SampleConfig, ["--snr", "0.3"])
    with pytest.raises(
        UserError, match="--clock is for --training_mode continuous_distillation or continuous_tr"
    ):
        parse_config(CmTrainConfig, ["--clock", "grid"])
    assert "sampler pc: sde, predictor" in " ".join(help_page(SampleConfig, "all").split())


def test_options_of_a_presets_row_go_with_it():
    own = parse_config(CmTrainConfig, ["--preset", "digits_ict"])
    other = parse_config(CmTrainConfig, ["--preset", "digits_ict", "--pairs", "grid"])
    assert own.p_mean != 0 and not hasattr(other, "p_mean")
    assert other.pairs == "grid" and other.loss_norm == own.loss_norm


def test_a_configuration_file_of_an_earlier_version_is_read(tmp_path):
    """It names every flag that there was; those of rows that are not chosen were at their defaults."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"sampler": "euler", "snr": 0.16, "classifier_width": 128, "steps": 7}))
    assert parse_config(SampleConfig, ["--config", str(path)]).steps == 7
    path.write_text(json.dumps({"sampler": "euler", "snr": 0.5}))
    with pytest.raises(UserError, match="unknown flag snr: it is for --sampler pc, not for euler"):
        parse_config(SampleConfig, ["--config", str(path)])


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("[a-z]*.py")))
def test_help_loads_nothing_heavy_and_scripts_run_from_anywhere(script, tmp_path):
    """What makes `--help` answer in a tenth of a second."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 0 and f"usage: {script.removesuffix('.py')}" in result.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in loaded and not loaded & {"torch", "numpy", "PIL", "mpi4py", "blobfile"}


def test_dry_run_of_a_script_prints_one_object_and_touches_nothing(tmp_path):
    out = tmp_path / "never"
    argv = ["--preset", "digits_cd", "--dry_run", "True", "--out_dir", str(out)]
    result = run_script("cm_train", *argv, cwd=ROOT / "scripts")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["start_scales"] == 18
    assert not out.exists()


def test_only_the_first_rank_prints(monkeypatch, capsys):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        parse(EdmTrainConfig, ["--preset", "tiny", "--dry_run", "True"])
    assert (end.value.code, capsys.readouterr().out) == (0, "")


def test_a_script_ends_with_code_2_and_one_line():
    result = run_script("image_sample", "--sampler", "ddim")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "--sampler" in result.stderr
    assert result.stdout == ""
