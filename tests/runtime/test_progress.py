import sys

import pytest

from cm.runtime import progress


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)


def test_without_a_terminal_each_report_is_a_line(capsys):
    for _ in progress.progress(range(3), desc="count", unit="step"):
        pass
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert "\r" not in err and lines[0].startswith("count: 0/3 [") and lines[-1].startswith("count: 3/3 [")
    assert lines[-1].endswith("step/s]")


def test_reports_are_rare(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 30.0)
    for _ in progress.progress(range(1000)):
        pass
    assert len(capsys.readouterr().err.splitlines()) <= 2


def test_steps_are_shown_as_images_and_a_resumed_run_goes_on(capsys):
    with progress.progress(total=10, unit="image", unit_scale=64, initial=5) as bar:
        bar.update(2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("progress: 448/640 [") and last.endswith("image/s]")


def test_a_bar_on_a_terminal_and_silence_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert sum(progress.progress([1, 2, 3])) == 6
    assert "\r" in capsys.readouterr().err
    assert sum(progress.progress([1, 2, 3], enabled=False)) == 6
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert sum(progress.progress([1, 2, 3])) == 6
    assert capsys.readouterr().err == ""
