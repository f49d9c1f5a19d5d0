import csv
import json
import math
import sys

import pytest
import torch

from cm import logger
from cm.errors import UserError
from cm.runtime.log_writers import duration
from tests.helpers import mp

FILES = ["csv", "json", "log"]


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.delenv("OPENAI_LOG_FORMAT", raising=False)
    logger.reset()
    yield
    logger.reset()


def csv_rows(folder) -> list[dict]:
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def json_rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def dump(**values) -> dict:
    logger.logkvs(values)
    return logger.dumpkvs()


def test_a_mean_counts_its_calls_and_starts_anew_after_a_dump(tmp_path):
    logger.configure(tmp_path, FILES)
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", value)
    logger.logkv("lr", 0.5)
    logger.logkv("lr", 0.25)
    assert logger.getkvs() == {"loss": 3.0, "lr": 0.25}
    assert logger.dumpkvs() == {"loss": 3.0, "lr": 0.25}
    logger.logkv_mean("loss", 10.0)
    assert logger.dumpkvs() == {"loss": 10.0}


def test_tensors_are_read_only_at_the_dump(tmp_path):
    logger.configure(tmp_path, FILES)
    loss = torch.tensor(1.0, requires_grad=True)
    logger.logkv_mean("loss", loss)
    logger.logkv_mean("loss", torch.tensor(4.0, dtype=torch.float16))
    logger.logkv("count", torch.tensor(7))
    assert isinstance(logger.getkvs()["loss"], torch.Tensor)
    row = logger.dumpkvs()
    assert row == {"loss": 2.5, "count": 7} and isinstance(row["count"], int)


def test_csv_keeps_every_row_when_keys_appear_and_quotes_texts(tmp_path):
    logger.configure(tmp_path, FILES)
    dump(step=1, loss=0.1)
    dump(step=2, loss=0.2, note='a,"b"')
    dump(step=3, late=1e-20)
    rows = csv_rows(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert rows[0] == {"step": "1", "loss": "0.1", "note": "", "late": ""}
    assert rows[1]["note"] == 'a,"b"' and float(rows[2]["late"]) == 1e-20


def test_a_second_run_appends(tmp_path):
    for step in (1, 2):
        logger.configure(tmp_path, FILES)
        logger.log("run", step)
        dump(step=step)
        logger.reset()
    assert [row["step"] for row in json_rows(tmp_path)] == [1, 2] and len(csv_rows(tmp_path)) == 2
    text = (tmp_path / "log.txt").read_text()
    assert text.index("run 1") < text.index("run 2")


def test_the_log_of_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def steps(first, last):
        for step in range(first, last + 1):
            dump(step=step, loss=1 / step, **({"late": step} if step >= 4 else {}))
            if step % 2 == 0:
                dump(fid=float(step))  # a row without a step belongs to the one before it

    logger.configure(tmp_path / "whole", ["csv", "json"])
    steps(1, 8)
    logger.configure(tmp_path / "resumed", ["csv", "json"])
    steps(1, 6)
    with open(tmp_path / "resumed" / "progress.csv", "a") as file:
        file.write("7,0.1")  # died while writing
    with open(tmp_path / "resumed" / "progress.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    logger.configure(tmp_path / "resumed", ["csv", "json"], resume_step=4)
    steps(5, 8)
    for name in ("progress.csv", "progress.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_long_keys_do_not_collide_and_whole_numbers_stay_whole(tmp_path):
    logger.configure(tmp_path, ["log"])
    long = "k" * 40
    dump(**{long + "a": 1.23456, long + "b": 800000})
    text = (tmp_path / "log.txt").read_text()
    assert f"{long}a | 1.235 " in text and f"{long}b | 800000" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_numbers_that_are_not_finite(tmp_path):
    logger.configure(tmp_path, ["csv", "json"])
    dump(a=math.nan, b=math.inf)
    assert json_rows(tmp_path) == [{"a": None, "b": None}]
    assert csv_rows(tmp_path) == [{"a": "nan", "b": "inf"}]


def test_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger.log("to the screen only")
    assert list(tmp_path.iterdir()) == []
    assert logger.get_dir().startswith("runs/") and (tmp_path / logger.get_dir()).is_dir()
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "named"))
    logger.configure()
    assert logger.get_dir() == str(tmp_path / "named")
    with logger.scoped_configure(tmp_path / "inner", ["csv"]):
        assert logger.get_dir() == str(tmp_path / "inner")
    assert logger.get_dir() == str(tmp_path / "named")


def test_bad_input_is_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'xml' is unknown"):
        logger.configure(tmp_path, ["xml"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write logs to"):
        logger.configure(tmp_path / "file" / "below")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install .*\[tensorboard\]"):
        logger.configure(tmp_path, ["tensorboard"])


def test_levels(capsys):
    logger.debug("hidden")
    logger.warn("seen")
    logger.set_level(logger.ERROR)
    logger.warn("hidden")
    logger.set_level(logger.DISABLED)
    assert dump(a=1) == {"a": 1}
    assert capsys.readouterr().out == "seen\n"


def test_profiling_adds_up_seconds(monkeypatch):
    clock = iter([0.0, 1.5, 10.0, 12.0])
    monkeypatch.setattr(logger.time, "perf_counter", lambda: next(clock))

    @logger.profile("load")
    def work():
        return "done"

    assert (work(), work()) == ("done", "done")
    assert logger.dumpkvs() == {"wait_load": 3.5}


def log_on_a_rank(folder: str) -> dict:
    from cm.runtime import distributed

    rank = distributed.get_rank()
    logger.configure(folder, ["csv", "json", "log"])
    for _ in range(rank + 1):
        logger.logkv_mean("mean", torch.tensor(float(rank)))
    logger.logkvs({"step": 5, "text": f"rank {rank}", f"only{rank}": rank, "plain": float(rank)})
    if rank == 1:
        logger.warn("a message of rank 1")
    return logger.dumpkvs()


def test_a_dump_averages_over_ranks_and_rank_0_writes(tmp_path):
    rows = mp.run_ranks("tests.runtime.test_logger:log_on_a_rank", 3, str(tmp_path))
    # Counts 1, 2, 3 of values 0, 1, 2: (0 + 2 + 6) / 6.
    expected = {"mean": 8 / 6, "step": 5, "text": "rank 0", "plain": 1.0, "only0": 0, "only1": 1, "only2": 2}
    assert rows == [expected] * 3
    assert json_rows(tmp_path) == [expected] and len(csv_rows(tmp_path)) == 1
    assert (tmp_path / "log-rank001.txt").read_text() == "a message of rank 1\n"
    assert not (tmp_path / "log-rank002.txt").exists()


def test_an_mpi_communicator_may_average_instead():
    class Comm:
        def allgather(self, mine):
            return [mine, {"a": (5.0, 3)}]

    logger.set_comm(Comm())
    assert dump(a=1.0) == {"a": 4.0}


def test_one_line_per_row_on_the_screen(tmp_path, capsys):
    logger.configure(tmp_path, ["line:800", "log"])
    row = {
        "step": 500,
        "samples": 32000,
        "loss": 0.35193,
        "loss_q0": 1.0,
        "lr": 1e-3,
        "images_per_sec": 312.4,
    }
    dump(**row, num_scales=18, peak_memory_mib=2150.4, skipped=0)
    logger.log("saved")
    assert capsys.readouterr().out == (
        "step 500/800  loss 0.3519  lr 0.001  N 18  312 img/s  ETA 1:01  mem 2.1 GB\nsaved\n"
    )
    assert "loss_q0" in (tmp_path / "log.txt").read_text()
    logger.configure(tmp_path, ["line"])
    dump(step=3, loss=math.nan, skipped=2)
    assert capsys.readouterr().out == "step 3  loss nan  skipped 2\n"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (250.4, "4:10"), (7210, "2:00:10"), (3 * 86400 + 7200, "3d 2:00")]
)
def test_times_to_come(seconds, text):
    assert duration(seconds) == text


def test_tensorboard_gets_groups_pictures_and_flags(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("L", (4, 4)).save(tmp_path / "p.png")
    logger.configure(tmp_path, ["tensorboard"])
    logger.get_current().log_flags({"lr": 1.0, "class_names": ["a"]})
    dump(step=2, loss=0.5, lr=0.1, images_per_sec=3.0, grad_norm=1.0)
    logger.get_current().log_picture("heun18", tmp_path / "p.png", 2)
    logger.reset()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"loss/loss", "schedule/lr", "speed/images_per_sec", "weights/grad_norm"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["previews/heun18"]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from PIL import Image

    monkeypatch.setenv("WANDB_MODE", "offline")
    Image.new("L", (4, 4)).save(tmp_path / "p.png")
    logger.configure(tmp_path, ["wandb:test"])
    logger.get_current().log_flags({"lr": 1.0})
    dump(step=2, loss=0.5)
    logger.get_current().log_picture("heun18", tmp_path / "p.png", 2)
    logger.reset()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_missing_wandb_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--wandb test .*\[wandb\]"):
        logger.configure(tmp_path, ["wandb:test"])
