"""The command `cm`: its sub-commands, what words without a flag mean, and a wheel that has all of it."""

import argparse
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from cm.commands import completion, words
from cm.commands.cli import parse_config
from cm.commands.main import COMMANDS, overview
from cm.config.derived import stored_config
from cm.config.registry import resolve
from cm.config.scripts import SCRIPTS, EdmTrainConfig, configure, script_of
from cm.errors import UserError, extra
from cm.models.files import searched_points

ROOT = Path(__file__).parents[2]


def cm(*argv, cwd=ROOT, **environment):
    command = [sys.executable, "-m", "cm", *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=100, env={**os.environ, **environment}
    )


def parsed(command, line):
    script, argv = resolve(COMMANDS[command].words)(line.split())
    return parse_config(SCRIPTS[script], argv)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_listed(name):
    command = COMMANDS[name]
    assert callable(resolve(command.run)) and (not command.words or callable(resolve(command.words)))
    assert f"  {name} " in overview() and command.help in overview()


@pytest.mark.parametrize(
    "command, line, script, flags",
    [
        ("train", "d --lr 0.5", "edm_train", "--data_dir d --lr 0.5"),
        ("train", "d --objective edm", "edm_train", "--data_dir d"),
        ("train", "d --objective classifier", "classifier_train", "--data_dir d"),
        ("train", "d --objective consistency_training", "cm_train",
         "--data_dir d --training_mode consistency_training"),
        ("train", "d --training_mode=continuous_training --loss_norm l2", "cm_train",
         "--data_dir d --training_mode continuous_training --loss_norm l2"),
        ("train", "d --preset digits_ct", "cm_train",
         "--data_dir d --preset digits_ct --training_mode consistency_training"),
        ("train", "d --preset digits_edm", "edm_train", "--data_dir d --preset digits_edm"),
        ("distill", "t d --loss_norm l2", "cm_train",
         "--teacher_model_path t --data_dir d --loss_norm l2 --training_mode consistency_distillation"),
        ("distill", "t d --preset digits_pd", "cm_train",
         "--teacher_model_path t --data_dir d --preset digits_pd --training_mode progdist"),
        ("sample", "r --num_samples 4", "image_sample", "--model_path r --num_samples 4"),
        ("sample", "r", "image_sample", "--model_path r --num_samples 64"),
        ("sample", "r --preset digits_cd", "image_sample", "--model_path r --preset digits_cd"),
        ("edit", "superres r p --factor 4", "image_edit", "--task superres --model_path r --input p --factor 4"),
        ("search", "r ref.npz", "ternary_search", "--model_path r --ref_batch ref.npz"),
        ("likelihood", "r d", "likelihood", "--model_path r --data_dir d"),
    ],
)  # fmt: skip
def test_both_ways_parse_to_the_same_configuration(command, line, script, flags):
    config = parsed(command, line)
    assert script_of(config) == script
    if command in ("train", "distill") and "--preset" not in flags:
        flags += " --preset auto"
    assert config == parse_config(SCRIPTS[script], flags.split())


def test_a_search_is_kept_in_its_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert words.search([str(tmp_path), "r.npz"])[1][-2:] == ["--out_dir", str(tmp_path / "search")]
    assert words.search([str(tmp_path), "r.npz", "--out_dir", "o"])[1].count("--out_dir") == 1
    assert searched_points(str(tmp_path)) == ""
    (tmp_path / "search").mkdir()
    for ts, expected in (([0, 5, 17], "0,5,17"), ([0, "x"], ""), (None, "")):
        (tmp_path / "search" / "search_result.json").write_text(json.dumps({"ts": ts}))
        assert searched_points(str(tmp_path)) == expected


def test_a_student_takes_the_data_of_its_teacher(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data_dir": "my/data"}))
    assert parsed("distill", str(tmp_path)).data_dir == "my/data"
    assert parsed("distill", f"{tmp_path} other").data_dir == "other"


def test_data_of_a_plug_in_need_it_again(tmp_path):
    """Code that a run names is not loaded unasked."""
    (tmp_path / "config.json").write_text(json.dumps({"data_dir": "mine:", "plugin": "mine.py"}))
    with pytest.raises(UserError, match=r"trained on mine: with --plugin mine\.py: give --plugin mine\.py"):
        words.distill([str(tmp_path)])
    assert words.data_of(str(tmp_path), "mine.py") == "mine:"


def test_a_file_of_three_keys_leaves_the_rest_to_auto_and_one_of_a_run_names_its_objective(tmp_path):
    three, run = tmp_path / "three.json", tmp_path / "config.json"
    three.write_text(json.dumps({"image_size": 16, "num_channels": 64, "data_dir": "d"}))
    config = parsed("train", f"--config {three}")
    assert (config.preset, config.data_dir, config.num_channels) == ("auto", "d", 64)
    assert parsed("distill", f"t --config {three}").data_dir == "d"
    three.write_text(json.dumps({"training_mode": "consistency_training", "loss_norm": "l2"}))
    assert parsed("train", f"d --config {three}").training_mode == "consistency_training"
    run.write_text(json.dumps(stored_config(configure(EdmTrainConfig, lr=0.25, preset=""))))
    again = parsed("train", f"d --config {run}")
    assert (again.preset, again.lr, script_of(again)) == ("", 0.25, "edm_train")
    three.write_text(json.dumps({"preset": "digits_ct"}))
    assert (
        parsed("train", f"d --config {three}").end_scales
        == parsed("train", "d --preset digits_ct").end_scales
    )


@pytest.mark.parametrize(
    "command, line, message",
    [
        ("train", "d --objective consistency_distillation", "cm distill"),
        ("distill", "t d --objective consistency_training", "cm train"),
        ("train", "d --objective consistency_trainin", "did you mean consistency_training"),
        ("train", "d e", "unknown argument e"),
        ("distill", "t", "which data"),
    ],
)
def test_mistakes_are_one_line(command, line, message):
    with pytest.raises(UserError, match=message):
        parsed(command, line)


def test_the_program(tmp_path):
    assert cm().stdout == cm("--help").stdout == overview() + "\n"
    wrong = cm("trian")
    assert (wrong.returncode, wrong.stderr) == (
        2, "error: cm trian: no such command; did you mean train? (cm --help lists all)\n"
    )  # fmt: skip
    assert cm("train").stderr == "error: --data_dir is missing\n"
    assert (
        "usage: cm distill RUN [DATA] [--objective NAME] [--FLAG VALUE ...]" in cm("distill", "--help").stdout
    )
    made = cm(
        "prepare", "digits", "d", "--image_size", 8, "--num_workers", 0, cwd=tmp_path, PYTHONPATH=str(ROOT)
    )
    assert made.returncode == 0 and "num_classes" in made.stdout, made.stderr


def test_a_module_started_by_mistake_says_what_to_start():
    for name, code, said in (
        ("cm.api", 2, "error: cm.api is no program: cm --help, or"),
        ("cm.presets", 0, ""),
        ("cm --help -m cm.api", 0, ""),
    ):
        done = subprocess.run([sys.executable, "-m", *name.split()], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith(said), done.stderr


def test_help_needs_no_torch():
    for name, command in COMMANDS.items():
        if command.words or (command.ends_job and name != "completion"):
            code = "import sys\nfrom cm.commands.main import main\n"
            code += f"try: main(['{name}', '--help'])\n"
            code += "finally: assert 'torch' not in sys.modules"
            shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
            assert shown.returncode == 0, (name, shown.stderr)


def test_completion_offers_objectives_presets_and_the_options_of_all_rows(monkeypatch):
    stub = ModuleType("shtab")
    stub.FILE, stub.SUPPORTED_SHELLS = {}, ["bash"]
    monkeypatch.setitem(sys.modules, "shtab", stub)
    subs = completion.parser()._subparsers._group_actions[0].choices
    assert subs.keys() == COMMANDS.keys()
    offered = {n: {o: a.choices for a in sub._actions for o in a.option_strings} for n, sub in subs.items()}
    assert (
        "edm" in offered["train"]["--objective"]
        and "consistency_distillation" not in offered["train"]["--objective"]
    )
    assert (
        "consistency_distillation" in offered["distill"]["--objective"]
        and "auto" in offered["train"]["--preset"]
    )
    assert offered["train"]["--class_cond"] == ["True", "False"] and "--s_churn" in offered["sample"]
    # Programs that bring a parser of their own: all of them, with their choices and files
    for name, option in (("evaluate", "--features"), ("prepare", "--image_size"), ("plan", "--gpus")):
        assert option in offered[name]
    assert "small" in offered["evaluate"]["--protocol"]
    assert all(
        "-h" in offered[name] and len(offered[name]) > 2 for name in COMMANDS if name not in completion.BARE
    )
    files = [a.dest for a in subs["evaluate"]._actions if getattr(a, "complete", None) is stub.FILE]
    assert files == ["reference", "samples"]
    assert subs["completion"]._actions[1].choices == ["bash"]
    assert type(subs["benchmark"]._actions[1].choices) is list


def test_a_program_whose_package_is_missing_is_completed_by_its_paths(monkeypatch):
    def gone():
        raise ImportError("gone")

    monkeypatch.setattr(completion, "resolve", lambda run: gone)
    assert completion._parser_of("any:thing") is None
    monkeypatch.undo()
    before = argparse.ArgumentParser.parse_known_args
    assert completion._parser_of("evaluations.evaluator:main").description.startswith("FID, sFID")
    assert argparse.ArgumentParser.parse_known_args is before


@pytest.mark.parametrize("found", [True, False])
def test_an_extra_is_installed_where_the_package_is(found, monkeypatch):
    def distribution(name):
        if not found:
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert extra("yaml") == (
        "pip install 'consistency-models[yaml]'" if found else "pip install '.[yaml]' in the checkout"
    )


def test_extras_that_messages_name_are_those_of_the_package():
    sources = [*ROOT.glob("cm/**/*.py"), *ROOT.glob("evaluations/**/*.py")]
    named = {name for path in sources for name in re.findall(r"extra\('(\w+)'\)", path.read_text())}
    known = set(re.findall(r'^    +"(\w+)": \[', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))
    assert {"yaml", "mpi", "datasets"} <= named <= known


@pytest.mark.slow
def test_a_wheel_has_everything(tmp_path):
    """Installed somewhere else, without the checkout: the command, the types, the tables."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(build, check=True, cwd=tmp_path, capture_output=True)
    site = tmp_path / "site"
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, cwd=tmp_path
    )
    for file in (
        "cm/py.typed",
        "evaluations/py.typed",
        "evaluations/reports/paper_tables.json",
        "evaluations/reports/run_report/page.html",
        "cm/tools/convert/edm_pipeline.txt",
        "bin/cm",
    ):
        assert (site / file).is_file(), file
    for name in COMMANDS:
        if name != "completion":
            shown = cm(name, "--help", cwd=tmp_path, PYTHONPATH=str(site))
            assert shown.returncode == 0 and shown.stdout, (name, shown.stderr)


def test_a_list_without_room_on_the_screen_ends_well():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cm", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")
