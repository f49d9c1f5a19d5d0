"""`~` means the home folder in every program, also where no shell has expanded it."""

import shutil

from cm.commands.main import main
from cm.runtime import logger
from tests.helpers.models import save_consistency_model
from tests.helpers.run_files import make_run


def test_every_program_reads_and_writes_below_the_home_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    make_run(home / "run", previews=["onestep"])
    save_consistency_model(home / "model.pt", in_channels=1)
    previews = home / "run" / "previews"
    shutil.copytree(previews, home / "images")
    for line in (
        "convert ~/model.pt ~/legacy.pt --to legacy",
        "sample ~/model.pt --num_samples 1 --device cpu --out_dir=~/samples",
        "prepare ~/images ~/store --image_size 8",
        "inspect ~/store",
        "classifier ~/store ~/none.pt",
        "report ~/run --results=~/samples --out=~/report.html",
        "runs ~",
    ):
        try:
            main(line.split())
        except SystemExit as stop:
            assert not stop.code or "classifier" in line, line  # without labels it is refused
        finally:
            logger.reset()
    assert {path.name for path in home.iterdir()} >= {"legacy.pt", "samples", "store", "report.html"}
    assert list((tmp_path / "work").iterdir()) == []
