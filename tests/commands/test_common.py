"""The folder of results: made, refused where results would be lost, on every rank alike."""

import pytest

from cm.commands.common import prepare_output
from cm.errors import UserError
from cm.runtime import distributed
from tests.helpers.mp import run_ranks


def test_the_folder_is_made(tmp_path):
    prepare_output(tmp_path / "a" / "b", ["x.npz"], overwrite=False)
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "b" / "other.npz").touch()
    prepare_output(tmp_path / "a" / "b", ["x.npz"], overwrite=False)


def test_results_are_not_replaced_unless_asked(tmp_path):
    (tmp_path / "x.npz").touch()
    with pytest.raises(
        UserError, match=r"x\.npz is already there: give --overwrite True or another --out_dir"
    ):
        prepare_output(tmp_path, ["new.png", "x.npz"], overwrite=False)
    prepare_output(tmp_path, ["new.png", "x.npz"], overwrite=True)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out_dir .*file cannot be written: File exists"):
        prepare_output(tmp_path / "file", [], overwrite=True)


def refused_on_ranks(folder):
    try:
        prepare_output(folder, ["x.npz"], overwrite=False)
    except UserError as error:
        return distributed.get_rank(), str(error)
    return None


def test_every_rank_hears_of_it(tmp_path):
    (tmp_path / "x.npz").touch()
    first, second = run_ranks("tests.commands.test_common:refused_on_ranks", 2, tmp_path)
    assert (first[0], second[0]) == (0, 1) and first[1] == second[1]
