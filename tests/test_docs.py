"""The documents: every command in them parses, and the tests, files and links that they name exist."""

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cm.commands.cli import parse_config
from cm.commands.main import COMMANDS as COMMAND_ROWS
from cm.config import plugins
from cm.config.fields import flags_of, meta_of
from cm.config.registry import resolve
from cm.config.scripts import SCRIPTS, CmTrainConfig, SampleConfig, configure
from cm.config.validation import require_inputs
from cm.runtime import job
from cm.training.factory import create_objective
from tests.helpers.models import save_consistency_model

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SITE = ROOT / "docs" / "site" / "mkdocs.yml"
# What runs without argparse: nothing, or a list of plain names.
WITHOUT_PARSER = {"cm.presets", "cm.config.presets.__main__"}
NOT_OURS = {"pytest", "mkdocs"}
# Sub-commands of `cm` whose module is started by a script
SCRIPT_OF = {
    "prepare": "prepare_data",
    "convert": "convert_checkpoint",
    "plan": "plan",
    "benchmark": "benchmark",
}


def document(name: str) -> Path:
    """A document by the name of its file."""
    return next(path for path in DOCUMENTS if path.name == name)


# ---- commands ----------------------------------------------------------------------------------------


def commands(path: Path) -> list[tuple[str, ...]]:
    """(program, arguments ...) of every command, its abbreviations written out: a script's name or a module's."""
    text = path.read_text().replace("\\\n", " ").replace("$RUN", "run").replace("$DATA", "data")
    found = []
    for kind, name, rest in re.findall(r"python (scripts/|-m )([\w.]+)([^`\n]*)", text):
        if name in NOT_OURS:
            continue
        rest = re.split(r"\s#|\)(?:\s|$)", rest)[0]
        training = name.endswith("_train.py")
        if "..." in rest:
            rest = rest.replace("...", "--data_dir d --out_dir o" if training else "--out_dir o")
        found.append((name.removesuffix(".py") if kind == "scripts/" else name, *shlex.split(rest)))
    for name, rest in re.findall(r"(?m)^(?:mpiexec -n \d+ )?cm (\w+)([^`\n]*)", text):
        found.append((f"cm {name}", *shlex.split(re.split(r"\s#", rest)[0])))
    return found


COMMANDS = [(path.name, command) for path in DOCUMENTS for command in commands(path)]


def as_program(name: str, argv: list[str]) -> tuple[str, list[str]]:
    """A sub-command of `cm` as the script or module that it stands for."""
    if COMMAND_ROWS[name].words:
        return resolve(COMMAND_ROWS[name].words)(argv)
    module = COMMAND_ROWS[name].run.partition(":")[0]
    return SCRIPT_OF.get(name, module), argv


class Parsed(Exception):
    """The command line was accepted; nothing else of the program shall run."""


def parse_only(program: str, argv: list[str], monkeypatch) -> None:
    """Run a program until it has read its command line; SystemExit or UserError when it refuses it."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        _, unknown = parse(self, args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {unknown}")
        raise Parsed

    def stop_before_passing_on(self, args=None, namespace=None):
        _, passed_on = parse(self, args, namespace)
        check_passed_on(passed_on)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_before_passing_on)
    monkeypatch.setattr(job, "run_main", lambda main: main())  # it would report Parsed as a crash
    monkeypatch.setattr(sys, "argv", [program, *argv])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    with pytest.raises(Parsed):
        if "." in program:
            runpy.run_module(program, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / "scripts" / f"{program}.py"), run_name="__main__")


def check_passed_on(flags: list[str]) -> None:
    """Flags that a benchmark or a plan hands to the configuration belong to one that they know."""
    known = {name for c in (CmTrainConfig, SampleConfig) for name in every_flag(c)}
    assert {flag.removeprefix("--") for flag in flags if flag.startswith("--")} <= known


def every_flag(cls: type) -> set[str]:
    """The flags of a configuration and of every row that it may name."""
    found = flags_of(cls)
    rows = [m.registry[n] for f in found.values() if (m := meta_of(f)).registry is not None for n in m.names]
    return {*found, *(name for row in rows if row.options is not None for name in flags_of(row.options))}


@pytest.fixture
def plugin_files(tmp_path, monkeypatch):
    """A working directory with the examples of docs/extend.md."""
    text = document("extend.md").read_text()
    for name, code in re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", text, flags=re.DOTALL):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    teacher = tmp_path / "runs" / "teacher"  # `cm distill` asks it for its data
    teacher.mkdir(parents=True)
    (teacher / "config.json").write_text('{"data_dir": "data/photos"}')
    yield
    for plugin in list(plugins._loaded):
        plugins.forget(plugin)


@pytest.mark.usefixtures("plugin_files")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests have imported the program
@pytest.mark.parametrize(
    ("document", "command"), COMMANDS, ids=[f"{name}-{c[0]}-{i}" for i, (name, c) in enumerate(COMMANDS)]
)
def test_commands_parse(document, command, monkeypatch):
    program, *argv = command
    if program.startswith("cm "):
        monkeypatch.setattr("cm.commands.words.data_of", lambda *_: "data")  # there is no such run
        program, argv = as_program(program.removeprefix("cm "), argv)
    if program in WITHOUT_PARSER:
        assert importlib.util.find_spec(program) and not argv
    elif program not in SCRIPTS:
        parse_only(program, ["1" if a == "N" else a for a in argv], monkeypatch)
    elif argv[-1:] == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            parse_config(SCRIPTS[program], argv)
    else:
        task = ["--task", argv.pop(0)] if program == "image_edit" else []
        config = parse_config(SCRIPTS[program], [*task, *argv])
        if not config.dry_run:
            require_inputs(config)


def test_the_commands_are_found_and_bad_ones_refused(monkeypatch):
    programs = {command[0] for _, command in COMMANDS}
    assert {
        "edm_train",
        "prepare_data",
        "convert_checkpoint",
        "evaluations.evaluator",
        "cm.doctor",
    } <= programs
    assert len(COMMANDS) > 60
    with pytest.raises(SystemExit):
        parse_only("prepare_data", ["source", "out", "--image_sise", "8"], monkeypatch)


def test_flags_in_the_running_text_exist():
    """Flags that documents name in `code` are flags of a script, or of a program that they show."""
    known = {name for config in SCRIPTS.values() for name in every_flag(config)}
    sources = [*ROOT.glob("scripts/*"), *ROOT.glob("evaluations/**/*.py"), *ROOT.glob("cm/**/*.py")]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    known |= set(re.findall(r"""["'\s]--([a-z]\w*)""", text))
    for path in DOCUMENTS:
        for code in re.findall(r"`(--[^`]*)`", path.read_text()):
            for name in re.findall(r"--([a-z]\w*)", code):
                assert name in known, (path.name, name)


# ---- files and links ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path):
    text = path.read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if "://" not in target:
            assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:cm|scripts|evaluations|tests|docs)/[\w./]*)`", text):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"scripts/\w+\.(?:sh|py)", text):
        assert (ROOT / name).exists(), name


# ---- tables that name tests --------------------------------------------------------------------------


def names_of(file: str) -> list[str]:
    """Names of the tests in a file, without `test_`."""
    return re.findall(r"(?:def test_|class Test)(\w+)", (TESTS / f"{file}.py").read_text())


def check_parity_cell(cell: str) -> None:
    """Files of tests, each followed by parts of the names of tests in it: `test_a: part, part, test_b`."""
    file, named = "", False
    for part in cell.split(", "):
        if re.match(r"(\w+/)?test_", part):
            file, _, part = part.partition(": ")
            assert (TESTS / f"{file}.py").exists(), f"{cell}: no file {file}"
            named = bool(part)
        assert not part or (named and any(part.removeprefix("Test") in name for name in names_of(file))), (
            f"{cell}: no test {part} in {file}"
        )


def test_every_row_of_parity_names_tests_that_exist():
    text = (ROOT / "docs" / "parity.md").read_text().replace("\\|", "/")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row != ["what", "why", "test"]]
    assert len(rows) > 100
    for row in rows:
        assert len(row) == 3, row
        if row[2] != "none":
            check_parity_cell(row[2])


@pytest.mark.parametrize(
    "cell", ["test_nothing", "test_docs: no_such_test", "commands_parse", "test_docs, commands_parse"]
)
def test_rows_without_a_test_are_found(cell):
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_parity_cell(cell)


def test_every_row_names_tests_that_exist():
    rows = [
        line
        for line in (ROOT / "docs" / "systems.md").read_text().splitlines()
        if re.match(r"\| A\d+ \|", line)
    ]
    assert [re.match(r"\| (A\d+)", row)[1] for row in rows] == [f"A{i}" for i in range(1, 38)]
    for row in rows:
        for part in re.split("; ", row.split("|")[-2].strip()):
            files, _, names = part.partition(":")
            for file in files.split(","):
                path = TESTS / f"{file.strip()}.py"
                assert path.exists(), path
            for name in filter(None, (n.strip() for n in names.split(","))):
                # What follows a named test may be further files.
                found = (TESTS / f"{name}.py").exists() or any(
                    name in test for test in names_of(file.strip())
                )
                assert found, (path, name)


# ---- claims ------------------------------------------------------------------------------------------


def claims() -> dict[str, list[tuple[str, str]]]:
    """document -> (words of a claim, FILE::NAME of its test), as tests/claims.txt lists them."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = words = ""
    for line in (TESTS / "claims.txt").read_text().splitlines()[1:]:
        if line.startswith("== "):
            name = line[3:]
        elif line.startswith("    "):
            found.setdefault(name, []).append((words, line.strip()))
        elif line:
            words = line
    return found


CLAIMS = claims()


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_stands_in_its_document_and_has_a_test(name):
    text = " ".join(document(name).read_text().split())
    for words, test in CLAIMS[name]:
        assert words in text, words
        file, _, function = test.partition("::")
        assert re.search(rf"def test_{function}\b", (TESTS / f"{file}.py").read_text()), test


def test_ctrl_c_is_code_130():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        job.run_main(interrupted)
    assert stop.value.code == 130


@pytest.mark.parametrize("start_ema", [0.0, 0.9])
def test_only_a_target_of_its_own_is_saved(start_ema):
    config = configure(
        CmTrainConfig, training_mode="consistency_training", start_ema=start_ema, loss_norm="l2"
    )
    assert create_objective(config).needs_target == (start_ema > 0)


@pytest.mark.parametrize("name", ["README.md", "library.md"])
def test_python_of_the_documents_runs(name, tmp_path, monkeypatch):
    """On untrained models of the size that the document assumes."""
    monkeypatch.chdir(tmp_path)  # it may write pictures
    size, channels, classes = (16, 3, 0) if name == "README.md" else (8, 1, 10)
    model = tmp_path / "model.pt"
    labels = {"class_cond": True, "num_classes": classes} if classes else {}
    save_consistency_model(model, image_size=size, in_channels=channels, attention_resolutions="", **labels)
    blocks = re.findall(r"```python\n(.*?)```", document(name).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        small = block.replace('"num_head_channels": 64', '"num_head_channels": 64, "num_channels": 64')
        (tmp_path / "block.py").write_text(re.sub("runs/(student|cd)", str(model), small))
        images = runpy.run_path(str(tmp_path / "block.py"))["images"]
        assert len(images) in (4, 16) and images.abs().max() <= 1


# ---- the site ----------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(SITE),
        "-d",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api" / "diffusion.html").read_text()
    assert "EDMPrecond" in page and "c_skip" in page
    assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=["']https?://""", page), (
        "it asks other hosts"
    )


def test_every_page_and_every_package_is_in_the_site():
    text = SITE.read_text()
    for path in [p for p in DOCUMENTS if p.name != "README.md"]:
        assert re.search(rf"(?:- |: ){re.escape(path.name)}$", text, flags=re.MULTILINE), path.name
    packages = [p.parent.name for p in (ROOT / "cm").glob("*/__init__.py")]
    for name in [*packages, "register", "evaluations"]:
        page = ROOT / "docs" / "api" / f"{name}.md"
        assert f"api/{name}.md" in text and "::: " in page.read_text(), name
