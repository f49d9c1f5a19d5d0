"""The folder of results: made, refused where results would be lost, on every rank alike."""

import pytest

from cm.commands.common import claimed_output
from cm.errors import UserError
from cm.runtime import distributed
from tests.helpers.mp import run_ranks


def test_the_folder_is_made_and_goes_again_where_nothing_came_of_it(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "mine"):
        with pytest.raises(UserError), claimed_output(folder, ["x.npz"], overwrite=False):
            assert folder.is_dir()
            raise UserError("an input that cannot be read")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and not list((tmp_path / "mine").iterdir())
    with claimed_output(tmp_path / "a" / "b", ["x.npz"], overwrite=False):
        (tmp_path / "a" / "b" / "other.npz").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["other.npz"]
    with claimed_output(tmp_path / "a" / "b", ["x.npz"], overwrite=False):
        pass


def test_results_are_not_replaced_unless_asked(tmp_path):
    (tmp_path / "x.npz").touch()
    with (
        pytest.raises(
            UserError, match=r"x\.npz is already there: give --overwrite True or another --out_dir"
        ),
        claimed_output(tmp_path, ["new.png", "x.npz"], overwrite=False),
    ):
        pass
    with claimed_output(tmp_path, ["new.png", "x.npz"], overwrite=True):
        pass


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"--out_dir .*file cannot be written: File exists"),
        claimed_output(tmp_path / "file", ["x.npz"], overwrite=True),
    ):
        pass


def refused_on_ranks(folder):
    try:
        with claimed_output(folder, ["x.npz"], overwrite=False):
            pass
    except UserError as error:
        return distributed.get_rank(), str(error)
    return None


def test_every_rank_hears_of_it(tmp_path):
    (tmp_path / "x.npz").touch()
    first, second = run_ranks("tests.commands.test_common:refused_on_ranks", 2, tmp_path)
    assert (first[0], second[0]) == (0, 1) and first[1] == second[1]


def test_a_second_writer_of_the_same_results_is_refused(tmp_path):
    with claimed_output(tmp_path, ["x.npz"], overwrite=True):
        with (
            pytest.raises(UserError, match=r"x\.npz is being written by process"),
            claimed_output(tmp_path, ["x.npz"], overwrite=True),
        ):
            pass
        with claimed_output(tmp_path, ["y.npz"], overwrite=False):
            pass
