"""Processors that a process may use: its affinity, and the quota of its container."""

import os

import pytest

from cm.runtime.cpu import usable_cores


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
