"""Importing torchvision, also where its compiled operators do not load into the installed torch."""

import contextlib
import functools
import importlib.machinery
import importlib.util

import torch


@functools.cache  # the declarations end with the library object
def declare_missing_operators() -> torch.library.Library | None:
    """Where torchvision's operators do not load, declare those that its import asks for, without their code.

    Its Python code (which piq needs, and its data sets) does without them, but its import does not: "operator
    torchvision::nms does not exist". Loading is tried as torchvision itself does it, before its first import.
    """
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations if package else []
    compiled = importlib.machinery.PathFinder.find_spec("_C", folders)
    with contextlib.suppress(OSError):
        if compiled:
            torch.ops.load_library(compiled.origin)
            return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
