import json
import os
from importlib import metadata

import pytest
import torch

from cm.runtime import distributed
from cm.tools import doctor
from tests.helpers import mp


def statuses(checks) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def run(*argv: str) -> None:
    doctor.main(["--run_dir", ".", *argv])


def test_a_sound_machine_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--json")
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["checks"]["torch"] == {"status": "ok", "detail": metadata.version("torch")}
    assert report["checks"]["launcher"]["detail"] == "none: one process"
    assert report["checks"]["run folder"] == {"status": "ok", "detail": str(tmp_path)}
    run()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report["checks"]) and all(line.startswith(("ok ", "note ")) for line in lines)


def test_a_missing_core_package_fails_and_an_optional_one_is_a_note(monkeypatch):
    def version(name):
        if name in ("numpy", "piq"):
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = statuses(doctor.check_versions())
    assert found["numpy"] == "failed" and found["piq"] == "note" and found["torch"] == "ok"


def test_an_unwritable_run_folder_fails_with_exit_code_1(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--run_dir", str(tmp_path / "file" / "runs")])
    assert stop.value.code == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed run folder")]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_torchvision_that_does_not_import_is_a_note_with_its_cause(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.check_import(doctor.Check("torchvision", "ok", "0.1"))
    assert found.status == "note" and found.detail.endswith(
        "RuntimeError: operator torchvision::nms does not exist"
    )
    (tmp_path / "torchvision.py").write_text("")
    assert doctor.check_import(doctor.Check("torchvision", "ok", "0.1")).status == "ok"
    missing = doctor.Check("torchvision", "note", "not installed")
    assert doctor.check_import(missing) is missing


@pytest.mark.parametrize(
    ("addresses", "status", "words"),
    [
        (["10.0.0.7"], "ok", "10.0.0.7"),
        (["127.0.1.1", "fe80::1%eth0"], "ok", "127.0.1.1"),
        (["127.0.1.1", "::1"], "note", "this host only"),
        (None, "note", "no address"),
    ],
)
def test_the_name_of_this_host(addresses, status, words, monkeypatch):
    def lookup(*_, **__):
        if addresses is None:
            raise OSError("Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(doctor.socket, "getaddrinfo", lookup)
    (check,) = doctor.check_host_name()
    assert check.status == status and words in check.detail
    assert ("MASTER_ADDR" in check.detail) == (status == "note")


def test_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 * 2**20}))
    (check,) = doctor.check_shared_memory(str(tmp_path))
    assert check.status == "note" and "--shm-size" in check.detail
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**33}))
    assert doctor.check_shared_memory(str(tmp_path))[0].status == "ok"
    assert doctor.check_shared_memory(str(tmp_path / "none")) == []


def test_a_full_disk_fails(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 0.5 * doctor.GIB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert statuses(doctor.check_run_dir(str(tmp_path / "new" / "runs"))) == {
        "run folder": "ok",
        "free disk": "failed",
    }


@pytest.mark.parametrize("cache", ["~", "~/.cache/consistency-models", ""])
def test_weights_are_found_in_their_folders(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CM_CACHE_DIR", cache)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert set(statuses(doctor.check_weights()).values()) == {"note"}
    assert not list(tmp_path.iterdir())  # to look makes no folder
    inception = f"{cache[2:]}/inception/i.pt" if cache else ".cache/consistency-models/inception/i.pt"
    for name in (
        "hub/checkpoints/vgg16-397923af.pth",
        "hub/checkpoints/lpips_weights.pt",
        inception.lstrip("/"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert set(statuses(doctor.check_weights()).values()) == {"ok"}


def test_no_mpi_library_is_a_note(monkeypatch):
    answer = type("Answer", (), {"returncode": 1, "stdout": ""})
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: answer)
    (check,) = doctor.check_mpi()
    assert check.status == "note" and "[mpi]" in check.detail


def reduce_over_ranks() -> list:
    return [(check.name, check.status, check.detail) for check in doctor.check_ranks(timeout=20)]


def test_ranks_are_tried_together():
    for results in mp.run_ranks("tests.tools.test_doctor:reduce_over_ranks", 2):
        name, status, detail = results[0]
        assert (name, status) == ("all-reduce", "ok")
        assert "gloo, 2 ranks on 1 node(s), 16 MiB in " in detail


def fail_on_rank_0() -> None:
    os.environ["OPENAI_LOGDIR"] = "/proc/none" if distributed.is_main() else "."
    doctor.main(["--dist"])


def test_all_ranks_leave_with_the_code_of_a_failure():
    _listening, environments = mp.torchrun_like(2)
    codes, output = mp.run_programs("tests.tools.test_doctor:fail_on_rank_0", environments)
    assert codes == [1, 1] and output.count("run folder") == 1 and "torchrun, 2 ranks" in output
