"""Permissions that count, also for root, who tests run as in containers."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

import pytest

# linux/capability.h: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root passes over permissions
VERSION, OVERRIDES = 0x20080522, 1 << 1 | 1 << 2


@contextlib.contextmanager
def as_a_user() -> Iterator[None]:
    """In the body, this thread and what it starts may read and write only what permissions say."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and those beyond 32 bits
    if not hasattr(libc, "capset") or libc.capget(header, held):
        pytest.skip("root cannot give up its rights here")
    fewer = (ctypes.c_uint32 * 6)(held[0] & ~OVERRIDES, *held[1:])
    if libc.capset(header, fewer):
        pytest.skip("root cannot give up its rights here")
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


@contextlib.contextmanager
def mode(path, permissions: int) -> Iterator[None]:
    """In the body, the path has these permissions, which also count for root."""
    before = os.stat(path).st_mode & 0o7777
    os.chmod(path, permissions)
    try:
        with as_a_user():
            yield
    finally:
        os.chmod(path, before)
