"""Weights of the FID Inception network: where they come from, and readers for the layouts in circulation.

Two published files hold the same numbers: OpenAI's plain dictionary (`layers.mixed.conv.weight`) and the one of
pytorch-fid and torch-fidelity (`Mixed_5b.branch1x1.conv.weight`). Only tensors are read, never code.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cm.errors import UserError
from cm.storage.downloads import check_sha256, local_copy
from cm.storage.filesystem import cache_folder
from cm.storage.shapes import shapes_only
from cm.storage.torch_format import check_size, read_torch
from evaluations.inception_v3 import InceptionV3

# What messages call them: programs name the file by --inception_path or by --features inception=FILE.
WHAT = "Inception weights"


@dataclass(frozen=True)
class WeightsFile:
    """One published file: its name, address and the known beginning of its SHA-256 ("" = not published)."""

    name: str
    url: str
    sha256: str = ""

    @property
    def cached(self) -> Path:
        """Where the file lies once fetched, or must be put by hand."""
        return Path(cache_folder(), "inception", self.name)


# The first is downloaded when none is in the cache: its hash is part of its name.
PUBLISHED = {
    "pytorch-fid": WeightsFile(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "openai": WeightsFile(
        "inception-2015-12-05.pt",
        "https://openaipublic.blob.core.windows.net/consistency/inception/inception-2015-12-05.pt",
    ),
}

# Block and branch names: pytorch-fid (after torchvision) -> ours (after the TensorFlow graph).
_STEM = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_2a_3x3": "conv_1",
    "Conv2d_2b_3x3": "conv_2",
    "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
}
_BLOCKS = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]
_BRANCHES_35 = {
    "branch1x1": "conv",
    "branch5x5_1": "tower.conv",
    "branch5x5_2": "tower.conv_1",
    "branch3x3dbl_1": "tower_1.conv",
    "branch3x3dbl_2": "tower_1.conv_1",
    "branch3x3dbl_3": "tower_1.conv_2",
    "branch_pool": "tower_2.conv",
}
_BRANCHES_REDUCE_35 = {
    "branch3x3": "conv",
    "branch3x3dbl_1": "tower.conv",
    "branch3x3dbl_2": "tower.conv_1",
    "branch3x3dbl_3": "tower.conv_2",
}
_BRANCHES_17 = {
    "branch1x1": "conv",
    "branch7x7_1": "tower.conv",
    "branch7x7_2": "tower.conv_1",
    "branch7x7_3": "tower.conv_2",
    "branch7x7dbl_1": "tower_1.conv",
    "branch7x7dbl_2": "tower_1.conv_1",
    "branch7x7dbl_3": "tower_1.conv_2",
    "branch7x7dbl_4": "tower_1.conv_3",
    "branch7x7dbl_5": "tower_1.conv_4",
    "branch_pool": "tower_2.conv",
}
_BRANCHES_REDUCE_17 = {
    "branch3x3_1": "tower.conv",
    "branch3x3_2": "tower.conv_1",
    "branch7x7x3_1": "tower_1.conv",
    "branch7x7x3_2": "tower_1.conv_1",
    "branch7x7x3_3": "tower_1.conv_2",
    "branch7x7x3_4": "tower_1.conv_3",
}
_BRANCHES_8 = {
    "branch1x1": "conv",
    "branch3x3_1": "tower_conv",
    "branch3x3_2a": "tower_mixed_conv",
    "branch3x3_2b": "tower_mixed_conv_1",
    "branch3x3dbl_1": "tower_1_conv",
    "branch3x3dbl_2": "tower_1_conv_1",
    "branch3x3dbl_3a": "tower_1_mixed_conv",
    "branch3x3dbl_3b": "tower_1_mixed_conv_1",
    "branch_pool": "tower_2_conv",
}
_BRANCHES = [_BRANCHES_35] * 3 + [_BRANCHES_REDUCE_35] + [_BRANCHES_17] * 4
_BRANCHES += [_BRANCHES_REDUCE_17] + [_BRANCHES_8] * 2
_TENSORS = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}


def pytorch_fid_names() -> dict[str, str]:
    """Map of every tensor name in pytorch-fid's file to ours (batch-norm scales and counters left out)."""
    convs = {theirs: f"layers.{ours}" for theirs, ours in _STEM.items()}
    for i, (block, branches) in enumerate(zip(_BLOCKS, _BRANCHES)):
        ours_block = f"layers.mixed_{i}" if i else "layers.mixed"
        convs |= {f"Mixed_{block}.{theirs}": f"{ours_block}.{ours}" for theirs, ours in branches.items()}
    names = {f"{a}.{theirs}": f"{b}.{ours}" for a, b in convs.items() for theirs, ours in _TENSORS.items()}
    return names | {"fc.weight": "output.weight", "fc.bias": "output.bias"}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The flat dictionary of tensors in a .pt or .pth file; UserError for anything that is or holds code."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise UserError(
                f"{WHAT}: {path} is a TorchScript program (NVIDIA's file of this name), which is code; "
                f"use the plain weights from {PUBLISHED['pytorch-fid'].url}"
            )
    try:
        state = read_torch(path)
        check_size(state, path.stat().st_size, "it")
    except Exception as error:  # damaged bytes make pickle, zipfile and torch raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{WHAT}: {path} is not a readable file of plain tensors ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{WHAT}: {path} is not a flat dictionary of tensors")
    return state


def read_inception_state(path: str | Path) -> dict[str, Tensor]:
    """State dict for `InceptionV3` from OpenAI's or pytorch-fid's layout, told apart by content."""
    path = Path(path)
    state = _read_tensors(path)
    if "Mixed_5b.branch1x1.conv.weight" in state:
        scales = [k for k, v in state.items() if k.endswith("bn.weight") and not bool((v == 1).all())]
        if scales:
            raise UserError(
                f"{WHAT}: {path} is not the FID Inception: its batch norms have scales ({scales[0]})"
            )
        state = {ours: state[theirs] for theirs, ours in pytorch_fid_names().items() if theirs in state}
    with shapes_only():
        expected = {k: tuple(v.shape) for k, v in InceptionV3().state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if found != expected:
        wrong = next(k for k in [*expected, *found] if found.get(k) != expected.get(k))
        raise UserError(
            f"{WHAT}: {path} has another layout: {wrong} is {found.get(wrong, 'absent')}, "
            f"the 2015-12-05 Inception needs {expected.get(wrong, 'no such tensor')}"
        )
    return {k: v.float() for k, v in state.items()}


def find_inception(location: str = "", sha256: str = "") -> tuple[Path, str]:
    """(path, SHA-256) of the weights: a path, a URL, or "" for the published file in the cache (fetched if absent)."""
    if location:
        if location.startswith("http://") and not sha256:
            name = location.partition("?")[0].rpartition("/")[2]
            raise UserError(
                f"{WHAT}: {name} would come over http:// as anybody on the way likes it; "
                "give an https:// address, a file, or its hash (--weights_sha256)"
            )
        path = local_copy(location, sha256=sha256, flag=WHAT)
        return path, check_sha256(path, sha256)
    for known in PUBLISHED.values():
        if known.cached.exists():
            return known.cached, check_sha256(known.cached, sha256 or known.sha256)
    known = PUBLISHED["pytorch-fid"]
    path = local_copy(known.url, target=known.cached, sha256=sha256 or known.sha256, flag=WHAT)
    return path, check_sha256(path, sha256 or known.sha256)


def load_inception(
    location: str = "", *, sha256: str = "", channels_last: bool = False
) -> tuple[InceptionV3, str]:
    """The network with its weights on CPU, and their SHA-256. `location` as in `find_inception`."""
    path, found = find_inception(location, sha256)
    net = InceptionV3(channels_last)
    net.load_state_dict(read_inception_state(path))
    return net, found
