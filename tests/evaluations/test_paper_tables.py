"""The paper's tables and figures: published numbers, what belongs to which preset, commands that parse, plots."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from cm.commands.cli import parse_config
from cm.config.presets import PRESETS
from cm.config.scripts import SCRIPTS
from cm.errors import UserError
from evaluations.evaluator import add_flags
from evaluations.reports import figures, paper_tables
from evaluations.reports.paper_tables import (
    DATASETS,
    OURS,
    published,
    rows_of,
    table3_differences,
    table_markdown,
)
from evaluations.reports.results import best_of, load_results
from evaluations.study.methods import STUDIES

ROOT = Path(__file__).parents[2]
TABLES = {data: 1 if data == "cifar10" else 2 for data in DATASETS}
OUR_ROWS = [row for data, table in TABLES.items() for row in rows_of(table, data) if row["method"] in OURS]


def test_published_numbers():
    assert len(published()["rows"]) == 75 and len(published()["table3"]) == 6
    found = {(r["dataset"], r["method"], r["nfe"]): r for r in published()["rows"]}
    assert found["cifar10", "CD", 2]["fid"] == 2.93 and found["cifar10", "CD", 2]["inception_score"] == 9.75
    row = found["imagenet64", "CT", 1]
    assert (row["fid"], row["precision"], row["recall"]) == (13.0, 0.71, 0.47)
    assert len(OUR_ROWS) == 7 * 4


def test_every_row_of_ours_has_one_preset():
    names = [paper_tables.preset_of(row) for row in OUR_ROWS]
    assert set(names) <= set(PRESETS) and len(set(names)) == 4 * 4
    assert paper_tables.preset_of(rows_of(1, "cifar10")[0]) is None


def test_paper_variants_of_presets_are_table_3():
    assert table3_differences() == []
    text = paper_tables.table3_markdown()
    assert "| s1 | - | 150 | - | 200 | - | 150 |" in text


# --- results -------------------------------------------------------------------------------------


def write_result(folder: Path, name: str, preset: str, nfe: int, fid: float, **changes) -> Path:
    """A result file as the evaluator writes it, as far as it is read back."""
    step = changes.get("step", 1000)
    meta = {
        "config": {"preset": preset},
        "nfe": nfe,
        "model_path": f"runs/x/checkpoints/step_{step:06d}/ema_0.9999_{step:06d}.pt",
    }
    content = {
        "metrics": {"fid": fid, "precision": 0.5, "recall": 0.5, "inception_score": 9.0},
        "protocol": {"name": "adm"},
        "features": {"name": "inception"},
        "comparable": changes.get("comparable", True),
        "samples": {
            "path": changes.get("samples", "s.npz"),
            "count": changes.get("count", 50_000),
            "meta": meta,
        },
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def test_measured_numbers_and_gaps(tmp_path):
    write_result(tmp_path, "a", "imagenet64_cd_lpips", 2, 4.9)
    write_result(tmp_path, "b", "imagenet64_ct", 1, 13.5, comparable=False, count=10_000)
    (tmp_path / "other.json").write_text('{"metrics": 1}')
    (tmp_path / "broken.json").write_text("{")
    text = table_markdown(2, "imagenet64", load_results(tmp_path))
    lines = {tuple(line.split(" | ")[:2]): line for line in text.splitlines()}
    assert lines["| **CD**", "2"].startswith("| **CD** | 2 | 4.7 | 4.9 | +0.2 | 0.69 | 0.5 | -0.19 |")
    assert "not measured" in lines["| **CD**", "1"] and "`imagenet64_cd_lpips`" in lines["| **CD**", "1"]
    assert "imagenet64_ct, NFE 1: not comparable, 10,000 samples" in text
    assert "not measured" not in lines["| DFNO", "1"]
    with pytest.raises(UserError, match="--results"):
        load_results(tmp_path / "nowhere")


def test_the_best_of_several_measurements(tmp_path):
    write_result(tmp_path, "a", "cifar10_ct", 1, 9.0, step=100)
    write_result(tmp_path, "b", "cifar10_ct", 1, 8.0, step=200)
    write_result(tmp_path, "c", "cifar10_ct", 1, 7.0, step=300, count=10_000)
    found = load_results(tmp_path)
    assert [m.step for m in found] == [100, 200, 300]
    assert best_of(found).metrics["fid"] == 8.0 and best_of([]) is None


def test_results_without_provenance_are_passed_over(tmp_path):
    path = write_result(tmp_path, "a", "cifar10_ct", 1, 9.0)
    content = json.loads(path.read_text())
    content["samples"]["meta"] = None
    path.write_text(json.dumps(content))
    assert load_results(tmp_path) == []


# --- commands --------------------------------------------------------------------------------------


def check_command(line: str) -> None:
    """The line starts something that exists, with flags that it knows."""
    words = shlex.split(line.split("  #")[0].replace('"$c"', "runs/x/checkpoints/step_000001"))
    words = words[words.index("python") + 1 :]
    if words[0] == "-m":
        assert (ROOT / f"{words[1].replace('.', '/')}.py").exists()
        if words[1] == "evaluations.evaluator":
            import argparse

            parser = argparse.ArgumentParser()
            parser.add_argument("files", nargs="+")
            add_flags(parser)
            parser.parse_args(words[2:])
        return
    assert (ROOT / words[0]).exists()
    if Path(words[0]).stem in SCRIPTS:
        parse_config(SCRIPTS[Path(words[0]).stem], [w.replace("TS", "0,9,17") for w in words[1:]])


@pytest.mark.parametrize("row", OUR_ROWS, ids=[f"{r['dataset']}-{r['method']}-{r['nfe']}" for r in OUR_ROWS])
def test_commands_of_a_row(row):
    name = paper_tables.preset_of(row)
    lines = paper_tables.commands(name, row["nfe"])
    for line in lines:
        check_command(line)
    text = "\n".join(lines)
    assert ("--teacher_model_path" in text) == (row["method"] in ("CD", "PD"))
    assert ("ternary_search" in text) == (row["method"] in ("CD", "CT") and row["nfe"] == 2)


def test_progressive_distillation_samples_the_stage_of_its_steps():
    lines = {nfe: "\n".join(paper_tables.commands("cifar10_pd_l2", nfe)) for nfe in (1, 2)}
    # 4096 -> 4 intervals in 11 stages of 50,000 steps, then twice as long for 2 and for 1
    assert "step_650000" in lines[2] and "--steps 2" in lines[2]
    assert "step_750000" in lines[1] and "--steps 1" in lines[1]
    with pytest.raises(UserError, match="no table"):
        paper_tables.commands("digits_cd", 1)


ALL_FIGURES = [(name, size) for name, fig in figures.FIGURES.items() for size in fig.curves]


@pytest.mark.parametrize("name, size", ALL_FIGURES)
def test_commands_of_a_figure(name, size):
    _, curves = figures.figure(name, size)
    lines = figures.commands(name, size)
    text = "\n".join(lines)
    for curve in curves:
        for preset in curve.presets:
            assert preset in PRESETS
            if size == "fashion":  # runs of the study, which knows them by name
                assert preset.removeprefix("fashion_") in STUDIES["fashion"].methods
                assert preset.removeprefix("fashion_") in lines[0].split()[-1].split(",")
            else:
                assert f"runs/{preset}" in text
    for line in lines[1:]:
        if line.startswith("for "):
            for part in line.removesuffix("; done").split("do ", 1)[1].split("; "):
                check_command(part.replace('"$(basename "$c")"', "step_000001"))
        else:
            check_command(line)


def test_unknown_figure_and_size():
    with pytest.raises(UserError, match="--figure 7"):
        figures.figure("7", "digits")
    with pytest.raises(UserError, match="--size lsun"):
        figures.figure("4", "lsun")


# --- pictures ----------------------------------------------------------------------------------------


def test_what_lies_on_the_axis(tmp_path):
    write_result(tmp_path, "a", "digits_fig3c_n9", 1, 2.0)
    write_result(tmp_path, "b", "digits_fig3c_n36", 1, 1.0)
    write_result(tmp_path, "c", "digits_fig3a_l1", 1, 3.0, step=100)
    write_result(tmp_path, "d", "digits_fig3a_l1", 1, 2.0, step=200)
    write_result(tmp_path, "e", "digits_cd", 2, 0.5)
    found = load_results(tmp_path)

    def line(name: str, curve: int) -> list:
        fig, curves = figures.figure(name, "digits")
        return [(x, m.metrics["fid"]) for x, m in figures.points(fig.x, curves[curve], found)]

    assert line("3c", 0) == [(9, 2.0), (36, 1.0)]
    assert line("3a", 0) == [(100, 3.0), (200, 2.0)] and line("3a", 1) == []
    assert line("4", 1) == [(2, 0.5)]
    missing = figures.draw_figure(tmp_path / "f.png", "3c", "digits", found)
    assert missing == ["not measured: digits_fig3c_n5, NFE 1", "not measured: digits_fig3c_n18, NFE 1"]
    assert (tmp_path / "f.png").exists()
    assert len(figures.draw_figure(tmp_path / "g.png", "3d", "digits", found)) == 3
    assert not (tmp_path / "g.png").exists()


def test_figure_5_shows_the_same_noise_in_three_rows(tmp_path):
    for i, (name, preset, nfe) in enumerate(
        [("edm", "digits_edm", 35), ("one", "digits_ct", 1), ("two", "digits_ct", 2)]
    ):
        samples = tmp_path / f"{name}.npz"
        np.savez(samples, arr_0=np.full((15, 8, 8, 1), 80 * i, np.uint8))
        write_result(tmp_path, name, preset, nfe, 1.0, samples=str(samples))
    found = load_results(tmp_path)
    blocks = [figures.first_samples(m.preset, m.samples) for m in found]
    assert {(b.groups[0].shape, b.groups[0].max()) for b in blocks} == {
        ((1, 12, 8, 8, 1), value) for value in (0, 80, 160)
    }
    assert figures.draw_figure(tmp_path / "f5.png", "5", "digits", found) == []
    assert (tmp_path / "f5.png").exists()


def test_a_table_is_plotted_beside_the_paper(tmp_path):
    write_result(tmp_path, "a", "cifar10_cd_lpips", 1, 3.6)
    figure = paper_tables.plot_table(tmp_path / "t.png", 1, "cifar10", load_results(tmp_path))
    lines = {line.get_label(): line.lines[0] for line in figure.axes[0].containers}
    assert list(map(tuple, lines["CD paper"].get_xydata())) == [(1, 3.55), (2, 2.93)]
    assert list(map(tuple, lines["CD here"].get_xydata())) == [(1, 3.6)]
    assert lines["CD paper"].get_linestyle() == "--" and "CT here" not in lines


def test_script(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    write_result(results, "a", "cifar10_cd_lpips", 1, 3.6)
    write_result(results, "b", "digits_fig3c_n9", 1, 2.0)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["paper_tables.py", *argv])
        runpy.run_path(str(ROOT / "scripts" / "paper_tables.py"), run_name="__main__")
        return capsys.readouterr().out

    out = tmp_path / "out"
    assert "+0.05" in run("--results", str(results), "--out", str(out), "--size", "digits")
    names = {p.name for p in out.iterdir()}
    assert {"tables.md", "table1_cifar10.png", "table2_lsun_cat256.png", "figure3c_digits.png"} <= names
    assert "digits_fig3c_n5" in run("--figure", "3c", "--size", "digits", "--commands", "True")
    assert "# cifar10_ct, NFE 2" in run("--preset", "cifar10_ct", "--commands", "True")
