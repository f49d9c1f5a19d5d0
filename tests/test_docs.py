"""The documents: every command in them parses, and the tests, files and links that they name exist."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from cm.commands.cli import parse_config
from cm.config.scripts import SCRIPTS, CmTrainConfig, SampleConfig
from cm.config.validation import require_inputs
from cm.runtime import job

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs without argparse: nothing, or a list of plain names.
WITHOUT_PARSER = {"cm.presets"}


# ---- commands ----------------------------------------------------------------------------------------


def commands(path: Path) -> list[tuple[str, ...]]:
    """(program, arguments ...) of every command, its abbreviations written out: a script's name or a module's."""
    text = path.read_text().replace("\\\n", " ").replace("$RUN", "run").replace("$DATA", "data")
    found = []
    for kind, name, rest in re.findall(r"python (scripts/|-m )([\w.]+)([^`\n]*)", text):
        rest = re.split(r"\s#|\)(?:\s|$)", rest)[0]
        training = name.endswith("_train.py")
        if "..." in rest:
            rest = rest.replace("...", "--data_dir d --out_dir o" if training else "--out_dir o")
        found.append((name.removesuffix(".py") if kind == "scripts/" else name, *shlex.split(rest)))
    return found


COMMANDS = [(path.name, command) for path in DOCUMENTS for command in commands(path)]


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
    known = {name for c in (CmTrainConfig, SampleConfig) for name in c.__dataclass_fields__}
    assert {flag.removeprefix("--") for flag in flags if flag.startswith("--")} <= known


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests have imported the program
@pytest.mark.parametrize(
    ("document", "command"), COMMANDS, ids=[f"{name}-{c[0]}-{i}" for i, (name, c) in enumerate(COMMANDS)]
)
def test_commands_parse(document, command, monkeypatch):
    program, *argv = command
    if program in WITHOUT_PARSER:
        assert importlib.util.find_spec(program) and not argv
    elif program not in SCRIPTS:
        parse_only(program, ["1" if a == "N" else a for a in argv], monkeypatch)
    elif argv != ["--help"]:
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
        "cm.tools.doctor",
    } <= programs
    assert len(COMMANDS) > 60
    with pytest.raises(SystemExit):
        parse_only("prepare_data", ["source", "out", "--image_sise", "8"], monkeypatch)


def test_flags_in_the_running_text_exist():
    """Flags that documents name in `code` are flags of a script, or of a program that they show."""
    known = {name for config in SCRIPTS.values() for name in config.__dataclass_fields__}
    sources = [*ROOT.glob("scripts/*"), *ROOT.glob("evaluations/*.py"), *ROOT.glob("cm/**/*.py")]
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
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
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
    assert [re.match(r"\| (A\d+)", row)[1] for row in rows] == [f"A{i}" for i in range(1, 31)]
    for row in rows:
        for part in re.split("; ", row.split("|")[-2].strip()):
            files, _, names = part.partition(":")
            for file in files.split(","):
                path = TESTS / f"{file.strip()}.py"
                assert path.exists(), path
            for name in filter(None, (n.strip() for n in names.split(","))):
                # What follows a named test may be further files.
                found = (TESTS / f"{name}.py").exists() or f"def test_{name}" in path.read_text()
                assert found, (path, name)
