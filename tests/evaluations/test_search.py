"""The FID search: intervals, coarse and greedy searches, the memo, and the whole on a tiny model."""

import json
import sys

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.config.derived import stored_config
from cm.config.scripts import CmTrainConfig, SampleConfig, SearchConfig, configure
from cm.errors import UserError
from cm.models.factory import create_network
from cm.runtime import logger
from cm.storage.weights import save_weights
from evaluations import search
from evaluations.evaluator import Options, evaluate
from evaluations.features import load_features
from evaluations.npz_io import open_images, open_reference
from evaluations.protocols import PROTOCOLS
from evaluations.search import Memo, Score, SearchRange, parse_range, plot_search, run_search, search_points
from tests.helpers import golden_data
from tests.helpers.eval_files import write_classifier, write_npz
from tests.helpers.mp import run_ranks

STEPS = 8


def test_ranges():
    assert parse_range("0", "39", 40) == SearchRange((0,), (39,), 0, 39)
    assert parse_range("5", "30", 40) == SearchRange((0,), (39,), 5, 30)
    assert parse_range("0,10", "49,79", 80) == SearchRange((0, 10), (49, 79), 10, 49)


@pytest.mark.parametrize(
    "begin, end, message",
    [
        ("9", "9", "must be smaller"),
        ("0", "40", "grid 0..39"),
        ("0,5,3", "39", "decrease"),
        ("0,20", "10,39", "smaller"),
        ("1,5", "39", "start with 0"),
        ("0", "20,30", "end with 39"),
        ("0,x", "39", "--begin"),
    ],
)
def test_bad_intervals(begin, end, message):
    with pytest.raises(UserError, match=message):
        parse_range(begin, end, 40)


class Fake:
    """A scorer with known FIDs of the searched points, and noise that only many samples remove."""

    def __init__(self, fid):
        self.fid, self.calls = fid, []

    def __call__(self, ts, num_samples):
        self.calls.append((ts, num_samples))
        noise = 0.4 * ((ts[1] * 7) % 3 - 1) if num_samples < 100 else 0
        return Score(self.fid(ts) + noise, 0.1)


def test_golden_intervals_with_their_neighbours():
    for case in golden_data.json("ternary")["cases"]:
        fake = Fake(lambda ts, c=case: c["fid"][ts[len(c["begin"])] - c["first_index"]])
        interval = SearchRange(tuple(case["begin"]), tuple(case["end"]), case["begin"][-1], case["end"][0])
        ts, trace = search_points(fake, interval, num_samples=100)
        assert ts == (*case["begin"], case["best_among_evaluated"], *case["end"])
        assert [t.ts for t in trace] == [ts for ts, _ in fake.calls]


def test_coarse_search_measures_few_candidates_in_full():
    fake = Fake(lambda ts: abs(ts[1] - 11))
    ts, trace = search_points(fake, SearchRange((0,), (17,), 0, 17), num_samples=100, coarse=10)
    assert ts == (0, 11, 17)
    assert [t.num_samples for t in trace].count(100) == search.FINALISTS
    assert trace[-1].num_samples == 100


def test_points_are_searched_one_after_the_other():
    fake = Fake(lambda ts: sum(abs(p - t) for p, t in zip(ts[1:-1], (6, 12))))
    ts, trace = search_points(fake, SearchRange((0,), (17,), 0, 17), num_samples=100, points=2)
    assert ts == (0, 6, 12, 17)
    assert {t.order for t in trace} == {1, 2}
    assert all(t.ts[1] == 6 for t in trace if t.order == 2)


def test_memo_survives_and_knows_its_conditions(tmp_path):
    path = tmp_path / "memo.json"
    memo = Memo(path, {"seed": 1})
    memo.put((0, 3, 7), 10, Score(1.5, 0.1))
    assert Memo(path, {"seed": 1}).get((0, 3, 7), 10) == Score(1.5, 0.1)
    assert Memo(path, {"seed": 1}).get((0, 3, 7), 11) is None
    other = Memo(path, {"seed": 2})
    assert other.get((0, 3, 7), 10) is None
    other.put((0, 3, 7), 10, Score(2.5, 0.2))
    assert Memo(path, {"seed": 1}).get((0, 3, 7), 10) == Score(1.5, 0.1)
    path.write_text("{")
    with pytest.raises(UserError, match=r"memo\.json"):
        Memo(path, {})


def test_plot_of_one_and_of_several_searches(tmp_path):
    fake = Fake(lambda ts: abs(ts[1] - 11))
    interval = SearchRange((0,), (17,), 0, 17)
    for points, coarse, groups in ((1, 0, [(1, 100)]), (2, 10, [(1, 10), (1, 100), (2, 10), (2, 100)])):
        _, trace = search_points(fake, interval, num_samples=100, points=points, coarse=coarse)
        (axes,) = plot_search(tmp_path / "p.png", trace).axes
        for line, (order, count) in zip(axes.containers, groups, strict=True):
            assert line.get_label() == f"point {order}, " * (points > 1) + f"{count} samples"
            shown = [(t.p, t.score.fid) for t in trace if (t.order, t.num_samples) == (order, count)]
            assert sorted(shown) == list(map(tuple, line.lines[0].get_xydata()))
            assert len(line.lines[2][0].get_segments()) == len(shown)  # error bars


def test_a_search_ends_without_matplotlib_too(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    searched(files, tmp_path)
    assert json.loads((tmp_path / "search_result.json").read_text())["ts"]
    assert not (tmp_path / "search.png").exists()


# --- the whole, on a tiny model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An untrained class-conditional consistency model of 8x8 images, a classifier and a reference."""
    folder = tmp_path_factory.mktemp("search")
    flags = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "num_heads": 1}
    flags |= {"attention_resolutions": "8", "in_channels": 1, "class_cond": True, "num_classes": 4}
    config = configure(CmTrainConfig, **flags, start_scales=STEPS)
    torch.manual_seed(0)
    network = create_network(config)
    for p in network.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    save_weights(folder / "model.pt", network.state_dict(), {"config": stored_config(config)})
    write_classifier(folder / "classifier.pt")
    write_npz(folder / "ref.npz", 90)
    return folder


def argv(files, out, *more) -> list[str]:
    common = ["--model_path", files / "model.pt", "--out_dir", out, "--batch_size", "16", "--seed", "3"]
    return [*map(str, common), *more]


def search_argv(files, out, *more) -> list[str]:
    features = f"classifier={files / 'classifier.pt'}"
    return argv(
        files,
        out,
        "--num_samples",
        "70",
        "--ref_batch",
        str(files / "ref.npz"),
        "--features",
        features,
        *more,
    )


def searched(files, out, *more) -> dict:
    with logger.scoped_configure(str(out), []):
        return run_search(parse(SearchConfig, search_argv(files, out, *more)))


def test_the_search_finds_what_the_evaluator_measures(files, tmp_path, monkeypatch):
    result = searched(files, tmp_path / "a")
    assert result["ts"][0] == 0 and result["ts"][-1] == STEPS - 1 and len(result["ts"]) == 3
    assert result["nfe"] == 2 and len(result["sigmas"]) == 3 and result["std"] > 0
    measured = {t["p"]: t["score"]["fid"] for t in result["candidates"]}
    assert min(measured, key=measured.get) == result["ts"][1]
    assert len(measured) == len(result["candidates"])
    assert json.loads((tmp_path / "a" / "search_result.json").read_text())["ts"] == result["ts"]
    assert (tmp_path / "a" / "search.png").exists()

    ts = ",".join(map(str, result["ts"]))
    sample = ["--num_samples", "70", "--sampler", "multistep", "--ts", ts]
    with logger.scoped_configure(str(tmp_path / "s"), []):
        run_image_sample(parse(SampleConfig, argv(files, tmp_path / "s", *sample)))
    network = load_features(f"classifier={files / 'classifier.pt'}", "", torch.device("cpu"))
    samples = open_images(str(next((tmp_path / "s").glob("*.npz"))))
    options = Options(PROTOCOLS["classifier"], ("fid", "accuracy"))
    found = evaluate(open_reference(str(files / "ref.npz")), [samples], network, options)
    assert found["metrics"]["fid"] == pytest.approx(result["fid"], rel=1e-5)
    assert found["samples"]["meta"]["nfe"] == 2

    # A second search measures nothing: all is in the memo.
    monkeypatch.setattr(search, "extract", None)
    again = searched(files, tmp_path / "a")
    assert (again["ts"], again["fid"]) == (result["ts"], result["fid"])


def test_a_stopped_search_goes_on(files, tmp_path, monkeypatch):
    whole = searched(files, tmp_path / "whole", "--points", "2", "--coarse", "40")
    measure, calls = search.Scorer._measure, []

    def failing(self, ts, num_samples):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append((ts, num_samples))
        return measure(self, ts, num_samples)

    monkeypatch.setattr(search.Scorer, "_measure", failing)
    with pytest.raises(KeyboardInterrupt):
        searched(files, tmp_path / "b", "--points", "2", "--coarse", "40")
    again = []
    monkeypatch.setattr(search.Scorer, "_measure", lambda *a: (again.append(a[1:]), measure(*a))[1])
    resumed = searched(files, tmp_path / "b", "--points", "2", "--coarse", "40")
    assert again and not set(calls) & set(again)
    assert (resumed["ts"], resumed["fid"]) == (whole["ts"], whole["fid"])


def search_on_rank(files, out) -> dict:
    return searched(files, out)


def test_ranks_find_the_same(files, tmp_path):
    alone = searched(files, tmp_path / "one")
    for result in run_ranks("tests.evaluations.test_search:search_on_rank", 2, files, tmp_path / "two"):
        assert result["ts"] == alone["ts"]
        scores = [[t["score"]["fid"] for t in r["candidates"]] for r in (result, alone)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-6)
        assert result["std"] == pytest.approx(alone["std"], rel=1e-4)


def test_what_a_search_refuses(files, tmp_path):
    with pytest.raises(UserError, match="--ref_batch is missing"):
        run_search(parse(SearchConfig, argv(files, tmp_path)))
    np.savez(tmp_path / "big.npz", arr_0=np.zeros((4, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match="16-px images, the model draws 8-px"):
        searched(files, tmp_path / "o", "--ref_batch", str(tmp_path / "big.npz"))
    with pytest.raises(UserError, match=r"grid 0\.\.7|--end"):
        searched(files, tmp_path / "o", "--begin", "2", "--end", "9")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match="5 dimensions, classifier gives 64"):
        searched(files, tmp_path / "o", "--ref_batch", str(tmp_path / "stats.npz"))
