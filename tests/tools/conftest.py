"""Fixtures of the converters' tests."""

import sys
import types

import pytest


@pytest.fixture
def hf_diffusers(monkeypatch):
    """The library diffusers. It imports torchvision wherever that is installed, even one that does not fit torch."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        monkeypatch.setitem(sys.modules, "torchvision", None)
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[diffusers]'")


@pytest.fixture
def edm_modules(monkeypatch):
    """The modules that a pickle of EDM's names, for the time of writing one."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("code of the pickle was run")

    class EasyDict(dict):
        pass

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    for name, module in {"torch_utils.persistence": persistence, "dnnlib.util": util}.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
