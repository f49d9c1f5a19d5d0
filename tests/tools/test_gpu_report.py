"""The GPU report: parts that hang, fail or die cost themselves only, and what was measured before is written."""

import json

import pytest
import torch

import cm.nn
from cm.config.derived import precision
from cm.tools.bench.gpu import command, norms, parts
from cm.tools.bench.gpu.page import AIMS, page
from cm.tools.bench.gpu.parts import PARTS, Setup
from cm.tools.bench.runs import sample_config, train_cases, train_config
from cm.tools.bench.sample import TINY_CASES
from cm.tools.profiling.report import load_report
from tests.helpers import report_parts

ONE_SECOND = 1.0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = command.Report(str(folder), report_parts.PARTS, tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "LEAST", ONE_SECOND)
        names = list(report_parts.PARTS)
        command.run_parts(Setup("cpu", tiny=True), report, names, 0.5, "tests.helpers.report_parts:PARTS")
    return folder, report


def test_what_became_of_every_part(written):
    folder, report = written
    states = {name: state["state"] for name, state in report.states.items()}
    expected = {"quick": "done", "hangs": "out of time", "fails": "failed", "dies": "failed"}
    assert states == {**expected, "lacks": "skipped", "again": "done"}
    assert "no such kernel" in report.states["fails"]["why"] and "exit code 3" in report.states["dies"]["why"]
    assert "no_such_package" in report.states["lacks"]["why"]
    assert report.states["hangs"]["seconds"] < 30  # it would sleep for a minute
    assert json.loads((folder / "gpu_report.json").read_text())["parts"] == report.states


def test_rows_are_written_as_they_come(written):
    folder, report = written
    assert [row.name for row in load_report(str(folder / "gpu_quick.json")).rows] == ["quick/a", "quick/b"]
    for part in ("hangs", "fails"):  # what they had measured before they stopped
        assert [row.name for row in load_report(str(folder / f"gpu_{part}.json")).rows] == [f"{part}/first"]
    assert "torch" in load_report(str(folder / "gpu_quick.json")).environment["versions"]
    # A part that did not end well leaves no process behind for the next one.
    first, last = (report.rows[part][1]["figures"] for part in ("quick", "again"))
    assert first["pid"] != last["pid"] and first["seconds"] == ONE_SECOND


def test_the_page(written):
    folder, report = written
    text = (folder / "gpu_report.md").read_text()
    assert text == page(report, tiny=True)
    assert "| Hangs | out of time |" in text and "| Fails | failed |" in text and "no such kernel" in text
    assert "| quick/a |  | 2 |" in text and "say nothing of speed" in text


def test_aims_and_details_on_the_page(tmp_path):
    report = command.Report(str(tmp_path), PARTS)
    step = {"median_ms": 5.0, "share_of_ceiling": 0.41, "phases_ms": {"student": 2.0, "ema": 0.5}}
    step |= {"ceiling_by_phase": {"student": 0.5}, "left_out": {"diffusers": "ModuleNotFoundError"}}
    report.add_row("cd", {"name": "cd/bf16", "config": {}, "figures": step})
    slow = {"median_ms": 1.0, "share_of_ceiling": 0.5}
    report.add_row("sample", {"name": "one step/batch 256", "config": {}, "figures": slow})
    kernels = [{"name": "gemm", "calls": 3.0, "ms": 1.5, "share": 0.75}]
    report.add_row("profile", {"name": "kernels", "config": {}, "figures": {"kernels": kernels}})
    text = page(report)
    assert (
        "| cd/bf16 | 40% | 41.0% | met |" in text and "| one step/batch 256 | 55% | 50.0% | missed |" in text
    )
    assert "| student | 2 | 50% |" in text and "| ema | 0.5 |  |" in text
    assert "Left out: diffusers (ModuleNotFoundError)" in text and "| gemm | 3 | 1.5 | 75.0% |" in text


@pytest.mark.parametrize("tiny", [True, False])
def test_every_part_measures_something_that_is_known(tiny):
    """The presets, cases and flags that parts name make configurations, on a GPU and in a trial."""
    setup = Setup("cpu", tiny)
    measured = [options(setup) for steps in parts.STEPS.values() for options in steps.values()]
    assert len(measured) >= 8 and parts.STEPS.keys() <= PARTS.keys()
    for options in [*measured, parts.original_options(setup)]:
        (case,) = train_cases(options)
        config = train_config(options, case)
        assert config.batch_size > 0 and config.image_size == (8 if tiny else config.image_size)
    for batch in (64, 256):
        options = parts.sampling_options(setup, batch)
        config = sample_config(options, TINY_CASES["onestep"] if tiny else ())
        assert (config.batch_size, precision(config)) == (2 if tiny else batch, "bf16")
    aimed = {(part, row.partition("/")[2]) for part, row, _ in AIMS if part in parts.STEPS}
    assert aimed == {("cd", "bf16"), ("cd_compiled", "bf16, compiled")}


def test_tests_are_told_one_by_one(monkeypatch, tmp_path):
    """Those for a GPU stand in one file, and each leaves its row before the next one begins."""
    assert parts.gpu_tests() == ["tests/test_cuda.py"]
    path = tmp_path / "test_two.py"
    path.write_text("def test_a():\n    pass\n\n\ndef test_b():\n    assert False\n")
    monkeypatch.setattr(parts, "gpu_tests", lambda: [str(path)])
    rows = []
    with pytest.raises(RuntimeError, match="pytest ended with 1"):
        for row in parts._tests("not slow")(Setup("cpu")):
            rows.append(row)
    assert [(row.name, row.figures.get("outcome")) for row in rows[:2]] == [
        ("test_a", "PASSED"),
        ("test_b", "FAILED"),
    ]
    assert rows[2].figures["failed"] and rows[2].figures["exit_code"] == 1


@pytest.mark.parametrize("form", norms.FORMS)
def test_forms_of_a_norm_are_one_function(form):
    """In fp32 each is the definition, gradients included; in bf16 its error is that of the last digits."""
    random = torch.Generator().manual_seed(0)
    norm = cm.nn.normalization(64)
    for p in norm.parameters():
        torch.nn.init.normal_(p, generator=random)
    x = torch.randn(2, 64, 4, 4, generator=random).add_(0.3).requires_grad_()
    scale, shift = torch.randn(2, 2, 64, generator=random).requires_grad_()
    told = (x, scale, shift, norm.weight, norm.bias)
    groups = x.double().view(2, 32, -1)
    normal = (groups - groups.mean(2, keepdim=True)) / (
        groups.var(2, keepdim=True, correction=0) + norm.eps
    ).sqrt()
    weight, bias = (part[:, None, None] for part in (norm.weight, norm.bias))
    moved = (normal.view(x.shape) * weight + bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = moved * moved.sigmoid()
    found = norms.FORMS[form](norm, x, scale, shift)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    mine, theirs = (torch.autograd.grad(y.square().sum(), told, retain_graph=True) for y in (found, expected))
    for gradient, exact in zip(mine, theirs):
        torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-3)
    for layout in norms.FORMATS.values():
        assert 0 < norms.error(norms.FORMS[form], torch.device("cpu"), layout) < 0.05


def test_rows_of_norms():
    rows = list(norms.bench_norms(torch.device("cpu"), batch=2, tiny=True))
    assert [row.name for row in rows] == [f"norms/{f}/{k}" for f in norms.FORMS for k in norms.FORMATS]
    assert all(row.figures["median_ms"] > 0 for row in rows)
