import json
import os
import socket
import subprocess
import sys
import time

import pytest

from cm.errors import UserError
from cm.runtime import liveness
from cm.tools import runs
from tests.helpers.run_files import make_run


def listed(folder) -> dict[str, dict]:
    return {
        s["run"].rpartition("/")[2]: s for s in map(runs.summary, map(runs.read_run, runs.find_runs(folder)))
    }


def beat(run, **changes):
    own = {"host": socket.gethostname(), "pid": os.getpid(), "born": liveness.process_birth(os.getpid())}
    facts = {"rank": 0, "world_size": 1, "time": time.time(), **own, **changes}
    (run / "heartbeats").mkdir(exist_ok=True)
    (run / "heartbeats" / "rank_0.json").write_text(json.dumps(facts))


def test_runs_are_listed_with_their_numbers(tmp_path, capsys):
    make_run(tmp_path / "group" / "teacher", preset="digits_edm", steps=(10, 20), total=40)
    make_run(tmp_path / "student", steps=(5,), ended=False, training_mode="consistency_training")
    os.utime(tmp_path / "student" / "progress.jsonl", (1, 1))
    (tmp_path / "data").mkdir()
    runs.main([str(tmp_path)])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == list(runs.COLUMNS)
    assert " ".join(first.split()) == "20 / 40 0.05 128 - - finished 0 s digits_edm group/teacher"
    assert second.split()[:7] == ["5", "/", "40", "0.2", "128", "-", "-"]
    assert second.split()[7] == "new" and second.split()[-3:] == ["d", "consistency_training", "student"]
    assert head.index("loss") + len("loss") == first.index("0.05") + len("0.05"), "numbers are flush right"
    runs.main([str(tmp_path), "--json"])
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [20, 5]


def test_the_lowest_fid_of_a_run_stands_in_the_list(tmp_path, capsys):
    run = make_run(tmp_path / "student", training_mode="consistency_training")
    make_run(tmp_path / "teacher")
    for name, nfe, fid in (("a", 1, 7.5), ("b", 2, 3.25), ("c", 4, float("nan"))):
        meta = {"model_path": str(run / "checkpoints" / "step_000020" / "m.pt"), "nfe": nfe, "config": {}}
        result = {"metrics": {"fid": fid}, "protocol": {"name": "adm"}, "features": {}, "comparable": True}
        result["samples"] = {"path": str(tmp_path / name), "count": 1000, "meta": meta}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    runs.main([str(tmp_path), "--json"])
    found = {entry["run"]: (entry["fid"], entry["nfe"]) for entry in json.loads(capsys.readouterr().out)}
    assert found == {str(run): (3.25, 2), str(tmp_path / "teacher"): (None, None)}


def test_a_run_that_is_asked_for_itself_keeps_its_path(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    runs.main([str(run)])
    assert capsys.readouterr().out.splitlines()[1].endswith(f"  {run}")


def test_the_status_tells_running_lost_and_ended_runs_apart(tmp_path):
    for name in ("running", "elsewhere", "lost", "silent"):
        make_run(tmp_path / name, ended=False)
    beat(tmp_path / "running")
    beat(tmp_path / "elsewhere", host="another-host")
    beat(tmp_path / "lost", born=1)
    beat(tmp_path / "silent", host="another-host", time=time.time() - 3600)
    make_run(tmp_path / "stopped", ended="preempted")
    found = {name: summary["status"] for name, summary in listed(tmp_path).items()}
    assert found == {
        "running": "running",
        "elsewhere": "running",
        "lost": "lost rank",
        "silent": "lost rank",
        "stopped": "preempted",
    }


def test_a_line_that_is_still_being_written_is_passed_over(tmp_path):
    run = make_run(tmp_path / "run", steps=(10,))
    with open(run / "progress.jsonl", "a") as file:
        file.write('[1]\n{"loss": 3}\n{"step": 20, "lo')
    assert runs.read_run(run).step == 10
    (run / "progress.jsonl").unlink()
    assert runs.read_run(run).rows == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run directory: it has no config.json"),
        ("{", "not valid JSON"),
        ("[1]", "is not of a training run of this version"),
        ('{"script": "train_v9"}', "is not of a training run of this version"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        runs.read_run(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match=r"weights\.pt is a file, no run directory"):
        runs.read_run(tmp_path / "weights.pt")


def test_a_folder_of_runs_is_named_as_such(tmp_path):
    make_run(tmp_path / "a")
    with pytest.raises(UserError, match=r"the runs in it: .*/a$"):
        runs.read_run(tmp_path)


def test_a_run_of_another_version_does_not_hide_the_others(tmp_path, capsys):
    make_run(tmp_path / "good")
    (make_run(tmp_path / "other") / "config.json").write_text('{"script": "unknown"}')
    runs.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("note: ") and "other" in lines[-1]


def test_the_command_needs_no_torch_and_reports_mistakes_in_one_line(tmp_path):
    code = (
        "import sys; from cm.tools.runs import program; program(sys.argv[1:]); print('torch' in sys.modules)"
    )
    for folder, (status, out, err) in {
        str(tmp_path): (0, f"no run in {tmp_path}\nFalse\n", ""),
        str(tmp_path / "x"): (
            2,
            "",
            f"error: {tmp_path / 'x'}: no such folder (cm runs DIR lists the runs in DIR)\n",
        ),
    }.items():
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (status, out, err)
