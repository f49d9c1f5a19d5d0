"""Processors that a process may use: its affinity, and the quota of its container."""

import os

import pytest

from cm.errors import UserError
from cm.runtime import cpu
from cm.runtime.cpu import check_workers, usable_cores


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3, 11)), raising=False)


def test_affinity_counts_not_the_machine(eight, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores(str(tmp_path)) == 8


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("350000 100000", 4), ("50000 100000", 1), ("9000000 100000", 8), ("", 8)],
)
def test_quota_of_control_groups_2(eight, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert usable_cores(str(tmp_path)) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (200000, 2)])
def test_quota_of_control_groups_1(eight, tmp_path, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(str(tmp_path)) == cores


def test_far_more_workers_than_processors_are_refused(eight, monkeypatch):
    monkeypatch.setattr(cpu, "usable_cores", lambda: 8)
    check_workers(32 * 8)
    with pytest.raises(UserError, match="--num_workers 257: at most 256 on this machine's 8 processors"):
        check_workers(257)
