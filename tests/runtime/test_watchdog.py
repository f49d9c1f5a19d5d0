"""Signs of life: what ranks leave in the run directory, whom they blame, and how a run is remembered."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from cm.runtime import liveness, watchdog
from cm.runtime.liveness import Beat, describe_last_run, furthest_behind, read_beats
from cm.tools.doctor import check_last_runs

LIMITS = {"startup_timeout": 100.0, "step_timeout": 50.0}


def beat(rank, step=5, phase="step", time=1000.0, **more):
    return Beat(rank, 4, "host", 100 + rank, 1, step=step, phase=phase, time=time, **{"since": 990.0, **more})


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 4},  # did not get as far as the others
        {"since": 980.0},  # entered its phase first
        {"time": 1000.0 - 2 * liveness.SILENT_AFTER},  # gives no sign any more
        {"waiting": False},  # does not wait for anybody
    ],
)
def test_the_rank_that_the_others_wait_for(changed):
    ranks = [beat(rank, waiting=True) for rank in range(4)]
    ranks[2] = dataclasses.replace(ranks[2], **changed)
    assert furthest_behind(ranks).rank == 2


def test_silence_tells_more_than_the_step_and_the_step_more_than_the_phase():
    silent = beat(0, step=9, time=900.0)
    behind = beat(1, step=3, waiting=True)
    early = beat(2, step=5, since=900.0)
    assert furthest_behind([beat(3), early, behind, silent]) is silent
    assert furthest_behind([beat(3), early, behind]) is behind
    assert furthest_behind([beat(3), early, dataclasses.replace(behind, ended="finished")]) is early
    assert furthest_behind([]) is None


def test_a_beat_reads_as_a_sentence():
    text = str(beat(1, phase="data", where="stream.py:7 read"))
    assert text == "rank 1 of 4 on host (pid 101), reading data at step 5 (stream.py:7 read)"


def test_the_file_follows_the_phases_and_the_end(tmp_path):
    with watchdog.Heartbeat(tmp_path, LIMITS, interval=0.02) as life:
        life.phase("data", 7)
        eventually(lambda: read_beats(tmp_path)[0].phase == "data")
        [now] = read_beats(tmp_path)
        assert (now.rank, now.world_size, now.step, now.phase, now.ended) == (0, 1, 7, "data", "")
        assert now.host == socket.gethostname() and now.pid == os.getpid() and liveness.is_alive(now)
        assert abs(now.time - time.time()) < 2 and 0 <= now.time - now.since < 2 and now.where == ""
        life.phase("save", 8)
    [last] = read_beats(tmp_path)
    assert (last.step, last.phase, last.ended) == (8, "save", "finished")


def test_the_file_says_how_a_rank_failed(tmp_path):
    with pytest.raises(KeyError), watchdog.Heartbeat(tmp_path, LIMITS):
        raise KeyError("deliberate")
    assert read_beats(tmp_path)[0].ended == "KeyError: 'deliberate'"


def test_a_new_start_forgets_the_ranks_of_the_last(tmp_path):
    liveness.folder(tmp_path).mkdir()
    (liveness.folder(tmp_path) / "rank_0005.json").write_text("{}")
    with watchdog.Heartbeat(tmp_path, LIMITS):
        assert [path.name for path in liveness.folder(tmp_path).iterdir()] == ["rank_0000.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rank": 0}', "null"])
def test_unreadable_beats_are_left_out(tmp_path, content):
    liveness.folder(tmp_path).mkdir()
    (liveness.folder(tmp_path) / "rank_0000.json").write_text(content)
    assert read_beats(tmp_path) == [] and describe_last_run(tmp_path) == ""


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stuck_here(until):
    eventually(lambda: until)


def test_a_phase_that_takes_too_long_ends_the_job_and_says_where(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(watchdog.job, "end_job", lambda code, text: ends.append((code, text)))
    with watchdog.Heartbeat(tmp_path, {**LIMITS, "step_timeout": 0.2}, interval=0.02) as life:
        life.phase("save", 2)  # the limit of start-up
        time.sleep(0.4)
        assert ends == []
        life.phase("step", 3)
        stuck_here(ends)
    code, text = ends[0]
    assert code == 1 and text.startswith(
        "error: no progress for 0.2 s (--step_timeout) at step 3; furthest behind is"
    )
    assert "rank 0 of 1" in text and "(test_watchdog.py:" in text
    found = liveness.read_status(tmp_path)
    assert (found["ended"], found["step"], found["rank"], found["exit_code"]) == ("stuck rank", 3, 0, 1)


def test_a_process_that_was_stopped_is_not_stuck(tmp_path, monkeypatch):
    """Ctrl-Z for an hour, or a laptop that slept: the clock went on, the run did not. Seconds of work still count."""
    ends, clock = [], [1000.0]
    monkeypatch.setattr(watchdog.job, "end_job", lambda code, text: ends.append(text))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    write_beats(tmp_path, beat(0))
    life = watchdog.Heartbeat(tmp_path, LIMITS)
    life.phase("step", 3)

    def after(seconds):
        clock[0] += seconds
        life._check_time()
        return bool(ends)

    assert [after(s) for s in (3600.0, 1.0, 7200.0)] == [False] * 3  # 5 + 1 + 5 of 50 s
    assert [after(4.0) for _ in range(9)] == [False] * 9
    life.phase("step", 4)  # progress: the next step has its own time
    assert [after(4.5) for _ in range(11)] == [False] * 11
    assert after(1.0)


def write_beats(folder, *ranks):
    liveness.folder(folder).mkdir(exist_ok=True)
    for rank in ranks:
        path = liveness.folder(folder) / f"rank_{rank.rank:04d}.json"
        path.write_text(json.dumps(dataclasses.asdict(rank)))


def alive_for(seconds):
    process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    host = socket.gethostname()
    return process, Beat(1, 2, host, process.pid, liveness.process_birth(process.pid), step=4, phase="data")


def test_a_process_is_told_from_a_later_one_with_its_number():
    process, mine = alive_for(30)
    assert liveness.is_alive(mine)
    assert not liveness.is_alive(dataclasses.replace(mine, born=mine.born + 1))
    assert not liveness.is_alive(dataclasses.replace(mine, host="elsewhere"))
    process.kill()
    eventually(lambda: not liveness.is_alive(mine))  # also while it is a zombie
    process.wait()
    assert not liveness.is_alive(mine)


def test_the_watch_of_a_node_names_the_rank_that_died(tmp_path):
    process, lost = alive_for(30)
    other, own = alive_for(30)
    write_beats(tmp_path, lost, dataclasses.replace(own, rank=0))
    watch = subprocess.Popen([sys.executable, "-m", "cm.runtime.liveness", str(tmp_path), "0", "1"])
    time.sleep(0.5)
    watch.terminate()  # a signal to the job is not meant for it
    process.kill()
    assert watch.wait(10) == 0
    found = liveness.read_status(tmp_path)
    assert found["ended"] == "lost rank" and found["rank"] == 1 and found["step"] == 4
    assert found["message"] == f"lost {lost}: killed or crashed"
    for child in (process, other):
        child.kill()
        child.wait()


def test_the_watch_of_a_node_is_silent_when_all_end_in_good_order(tmp_path):
    process, rank = alive_for(1)
    write_beats(tmp_path, rank)
    watch = subprocess.Popen([sys.executable, "-m", "cm.runtime.liveness", str(tmp_path), "0", "1"])
    time.sleep(0.3)
    write_beats(tmp_path, dataclasses.replace(rank, ended="finished"))
    assert watch.wait(10) == 0 and liveness.read_status(tmp_path) is None
    process.wait()


# -- how a run is remembered --------------------------------------------------------------------------------------


def test_the_first_word_about_an_end_counts(tmp_path):
    assert liveness.read_status(tmp_path) is None
    liveness.write_status(tmp_path, liveness.LOST, exit_code=1, message="rank 1", step=4)
    liveness.write_status(tmp_path, liveness.ERROR, exit_code=2, message="what follows from it")
    found = liveness.read_status(tmp_path)
    assert (found["ended"], found["message"], found["step"]) == ("lost rank", "rank 1", 4)
    assert describe_last_run(tmp_path).startswith("lost rank: rank 1 (20")
    liveness.clear_status(tmp_path)
    assert liveness.read_status(tmp_path) is None and describe_last_run(tmp_path) == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_an_unreadable_status_is_none(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert liveness.read_status(tmp_path) is None


def test_a_run_without_a_last_word_is_going_on_or_lost(tmp_path):
    process, rank = alive_for(30)
    write_beats(tmp_path, rank)
    assert describe_last_run(tmp_path).startswith("still going on: rank 1 of 2 on ")
    process.kill()
    process.wait()
    text = describe_last_run(tmp_path)
    assert text.startswith("lost without a word: rank 1 of 2 on ") and "reading data at step 4" in text


def test_the_doctor_tells_of_the_runs_that_did_not_reach_their_end(tmp_path):
    lost, stopped, finished, empty = (tmp_path / name for name in ("lost", "stopped", "finished", "empty"))
    for folder in (lost, stopped, finished, empty):
        folder.mkdir()
    for folder in (lost, stopped, finished):
        write_beats(folder, beat(1, phase="data"))
    liveness.write_status(stopped, liveness.PREEMPTED, exit_code=75, message="SIGTERM")
    liveness.write_status(finished, liveness.FINISHED, exit_code=0)
    found = {check.name: check for check in check_last_runs(str(tmp_path))}
    assert set(found) == {"run lost", "run stopped"}
    assert found["run stopped"].status == "ok" and found["run stopped"].detail.startswith(
        "preempted: SIGTERM"
    )
    assert found["run lost"].status == "note" and "rank 1 of 4 on host" in found["run lost"].detail
    assert [check.name for check in check_last_runs(str(lost))] == ["run lost"]
    assert check_last_runs(str(tmp_path / "nowhere")) == []


def test_a_signal_within_another_error_is_remembered_as_one(tmp_path):
    """A signal that meets a class being made: the record has the exit code of the signal, as the program."""
    with pytest.raises(RuntimeError), watchdog.supervised(str(tmp_path), LIMITS):
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()
    found = liveness.read_status(tmp_path)
    assert found["exit_code"] == 130 and "KeyboardInterrupt" in found["message"]
