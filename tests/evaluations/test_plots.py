"""What plots and pages show: lines, scales, images; and what is said where matplotlib is missing."""

import sys

import numpy as np
import pytest

from cm.errors import UserError
from evaluations.reports import digits_report
from evaluations.reports.plots import Block, Series, image_page, line_plot

LABELS = {"title": "t", "x_label": "x", "y_label": "y"}


def test_a_plot_shows_every_series_that_has_points(tmp_path):
    series = [
        Series("measured", [4, 1, 2], [3.0, 9.0, 5.0], error=[0.3, 0.9, 0.5]),
        Series("published", [1], [8.0], dashed=True),
        Series("empty", [], []),
    ]
    figure = line_plot(tmp_path / "p.png", series, **LABELS)
    (axes,) = figure.axes
    measured, published = axes.containers
    assert measured.lines[0].get_xydata().tolist() == [[1, 9], [2, 5], [4, 3]]
    bars = [segment[:, 1].tolist() for segment in measured.lines[2][0].get_segments()]
    assert np.allclose(bars, [[8.1, 9.9], [4.5, 5.5], [2.7, 3.3]])
    assert published.lines[0].get_linestyle() == "--" and published.lines[0].get_marker() == "o"
    assert [text.get_text() for text in figure.legends[0].texts] == ["measured", "published"]
    assert (figure.get_suptitle(), axes.get_xlabel(), axes.get_ylabel()) == ("t", "x", "y")
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to plot"):
        line_plot(tmp_path / "q.png", [Series("a", [], [])], **LABELS)


def test_a_long_legend_fits(tmp_path):
    figure = line_plot(tmp_path / "p.png", [Series(f"method {i}", [1], [1.0]) for i in range(40)], **LABELS)
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0 and box.y1 <= figure.bbox.height


def test_logarithmic_axes(tmp_path):
    series = [Series("a", [9, 36], [100.0, 2.0]), Series("b", [18], [7.0])]
    (axes,) = line_plot(tmp_path / "p.png", series, log_x=True, **LABELS).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["9", "18", "36"]
    (axes,) = line_plot(tmp_path / "p.png", [Series("a", [1, 2], [0.0, 50.0])], **LABELS).axes
    assert axes.get_yscale() == "linear"


def test_a_page_shows_every_image_in_its_place(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (2, 3, 8, 8, 1), dtype=np.uint8)
    colour = np.random.RandomState(1).randint(0, 256, (1, 2, 8, 8, 3), dtype=np.uint8)
    page = image_page(tmp_path / "p.png", [Block("grey", [images]), Block("colour", [colour, colour])])
    grey, two = page.subfigs
    assert [strip.get_suptitle() for strip in page.subfigs] == ["grey", "colour"]
    shown = grey.axes[0].images[0].get_array()
    assert shown.shape == (16, 24, 3)
    assert (shown[8:, 8:16] == images[1, 1]).all() and (shown[:8, 16:] == images[0, 2]).all()
    assert len(two.axes) == 2 and (two.axes[1].images[0].get_array()[:, 8:] == colour[0, 1]).all()


def test_rows_of_a_digits_run(tmp_path):
    for name, count in (("cd_onestep", 45), ("ct_onestep", 13)):
        (tmp_path / "samples" / name).mkdir(parents=True)
        images = np.arange(count, dtype=np.uint8).repeat(64).reshape(count, 8, 8, 1)
        np.savez(tmp_path / "samples" / name / "samples_x.npz", arr_0=images)
    blocks = {block.title: block.groups for block in digits_report.picture(tmp_path)}
    assert list(blocks) == ["CD, one step", "CT, one step"]
    assert [group.shape[:2] for groups in blocks.values() for group in groups] == [(2, 20), (1, 13)]
    assert (blocks["CD, one step"][0][:, :, 0, 0, 0] == np.arange(40).reshape(2, 20)).all()


def test_without_matplotlib_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib.*\[plots\]"):
        line_plot(tmp_path / "p.png", [Series("a", [1], [1.0])], **LABELS)
    assert not list(tmp_path.iterdir())
