"""The CIFAR-10 checkpoints of the authors' JAX code: msgpack files of flax, read without flax.

Their network is NCSN++ (or DDPM++ with the same blocks), whose layers flax numbers by class in the order of use.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm.errors import UserError, extra
from cm.networks.architecture import build_network
from cm.networks.layers import fir_kernel
from cm.runtime.inputs import open_regular, read_regular
from cm.storage.shapes import shapes_only
from cm.storage.unpickle import one_line
from cm.tools.convert.edm_layout import identify
from cm.tools.convert.layout import Config, State, architecture, check_fits

# What the file cannot say: there are no image sides in it, and attention layers are numbered, not placed.
IMAGE_SIZE = 32
ATTENTION_SIDE = 16

MAX_BYTES = 8 << 30  # the authors' files have 0.7 GB

NDARRAY, COMPLEX, NUMPY_SCALAR = 1, 2, 3  # msgpack extension types of flax
WEIGHTS = {"ema": "params_ema", "raw": "params", "target": "target_params"}

# Layers inside a residual block: flax's name -> ours
RESIDUAL = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}


def is_flax(path: str) -> bool:
    """Whether a file starts like a msgpack map with a text key, as flax's checkpoints do."""
    with open_regular(path) as file:
        head = file.read(6)
    if not head:
        return False
    key = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x80 <= head[0] <= 0x8F else 0)  # offset of the first key
    # A pickle begins with 0x80, too, but its second byte is the protocol's number.
    return 0 < key < len(head) and (0xA0 <= head[key] <= 0xBF or head[key] == 0xD9)


def read_flax(path: str) -> dict[str, Any]:
    """The nested dict of a flax checkpoint; arrays are numpy arrays, joined where the file splits them."""
    try:
        import msgpack
    except ImportError:
        raise UserError(f"{path} is a msgpack file: {extra('jax')}") from None
    with one_line(f"{path} is not a readable flax checkpoint"):
        data = read_regular(path, MAX_BYTES)
        tree = msgpack.unpackb(data, ext_hook=_extension, raw=False, strict_map_key=False)
        if not isinstance(tree, dict):
            raise UserError(f"{path} is not a flax checkpoint: it holds a {type(tree).__name__}")
        return _join_chunks(tree)


def _extension(code: int, data: bytes) -> Any:
    import msgpack

    if code in (NDARRAY, NUMPY_SCALAR):
        shape, dtype, content = msgpack.unpackb(data, raw=True)
        array = _array(tuple(shape), dtype.decode(), content)
        return array if code == NDARRAY else array[()]
    if code == COMPLEX:
        return complex(*msgpack.unpackb(data))
    raise ValueError(f"unknown extension type {code}")


def _array(shape: tuple[int, ...], dtype: str, content: bytes) -> np.ndarray:
    if dtype == "bfloat16":  # unknown to numpy: the upper half of a float32
        wide = np.frombuffer(content, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError("arrays of objects are not read")
    return np.frombuffer(content, kind).reshape(shape)


def _join_chunks(tree: Any) -> Any:
    """Put together arrays that flax splits: {"__msgpack_chunked_array__": True, "shape": ..., "chunks": ...}."""
    if not isinstance(tree, dict):
        return tree
    if "__msgpack_chunked_array__" in tree:
        shape, chunks = _sequence(tree["shape"]), _sequence(tree["chunks"])
        return np.concatenate([np.ravel(c) for c in chunks]).reshape([int(n) for n in shape])
    return {key: _join_chunks(value) for key, value in tree.items()}


def _sequence(value: Any) -> list:
    """A list, which flax writes as a dict with the keys "0", "1", ..."""
    return [value[str(i)] for i in range(len(value))] if isinstance(value, dict) else list(value)


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(path joined by slashes, array) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value)


def from_flax(path: str, weights: str = "ema") -> tuple[State, Config]:
    """(SongUNet state dict, model flags) of a JAX checkpoint.

    weights: which of its networks, ema, raw or target. UserError unless every array has its place in NCSN++ or
    DDPM++ for 32x32 images with attention at 16x16.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: {path} can have {', '.join(WEIGHTS)}")
    tree = read_flax(path)
    if not isinstance(tree.get(WEIGHTS[weights]), dict):
        raise UserError(f"{path} has no {WEIGHTS[weights]}; it has {', '.join(map(str, tree))}")
    with one_line(f"{path} does not hold a CIFAR-10 network of the JAX code"):
        arrays = dict(flatten(tree[WEIGHTS[weights]]))
        return convert_params(arrays, path)


def convert_params(arrays: dict[str, np.ndarray], source: str) -> tuple[State, Config]:
    """(SongUNet state dict, model flags) from flax parameters by path."""
    places = _places(arrays, source)
    state: State = {}
    for path, array in arrays.items():
        layer, _, leaf = path.rpartition("/")
        if layer not in places:
            raise UserError(f"{source} has {path}, which no NCSN++ for {IMAGE_SIZE}x{IMAGE_SIZE} images has")
        state[f"{places[layer]}.{_leaf_name(leaf, array)}"] = _to_torch(array)
    state = _merge_attention(state, source)
    config = identify(state, source)
    with shapes_only():
        names = build_network(architecture(config)).state_dict()
    taps = (1, 3, 3, 1) if config["network"] == "ncsnpp" else (1, 1)
    state |= {name: fir_kernel(taps) for name in names if name.endswith("resample_filter")}
    check_fits(state, config, source)
    return {name: state[name] for name in names}, config


def _places(arrays: dict[str, np.ndarray], source: str) -> dict[str, str]:
    """flax layer -> ours, from how many blocks of each class there are."""

    def count(kind: str) -> int:
        return len({m[0] for path in arrays if (m := re.match(rf"{kind}_\d+/", path))})

    blocks, attentions = count("ResnetBlockBigGANpp"), count("AttnBlockpp")
    levels = count("Downsample") + 1 if count("Downsample") else 3
    # Per level: n blocks down, n + 1 up, and one that resamples each way, for which the coarsest has two in the middle
    n, rest = divmod(blocks - 3 * levels, 2 * levels)
    sides = [IMAGE_SIZE >> level for level in range(levels)]
    attended = ATTENTION_SIDE in sides and attentions == n + 2
    if rest or n < 1 or not (attended or attentions == 1):
        raise UserError(
            f"{source} is not a CIFAR-10 NCSN++: {blocks} residual and {attentions} attention blocks"
        )
    names = [*_encoder(sides, n), *_decoder(sides, n)]
    places = {
        "GaussianFourierProjection_0": "map_noise",
        "Dense_0": "map_layer0",
        "Dense_1": "map_layer1",
        "Conv_0": f"enc.{_at(sides[0], 'conv')}",
        "GroupNorm_0": f"dec.{_at(sides[0], 'aux_norm')}",
        "Conv_1": f"dec.{_at(sides[0], 'aux_conv')}",
    }
    for i, side in enumerate(sides[1:]):
        places[f"Downsample_{i}/Conv2d_0"] = f"enc.{_at(side, 'aux_residual')}"
    for i, name in enumerate(names):
        places |= {f"ResnetBlockBigGANpp_{i}/{flax}": f"{name}.{ours}" for flax, ours in RESIDUAL.items()}
    middle = [f"dec.{_at(sides[-1], 'in0')}"]
    down = [f"enc.{_at(ATTENTION_SIDE, f'block{i}')}" for i in range(n)]
    with_attention = [*down, *middle, f"dec.{_at(ATTENTION_SIDE, f'block{n}')}"] if attended else middle
    for i, name in enumerate(with_attention):
        parts = {"GroupNorm_0": "norm2", "NIN_0": "q", "NIN_1": "k", "NIN_2": "v", "NIN_3": "proj"}
        places |= {f"AttnBlockpp_{i}/{flax}": f"{name}.{ours}" for flax, ours in parts.items()}
    return places


def _at(side: int, what: str) -> str:
    return f"{side}x{side}_{what}"


def _encoder(sides: list[int], n: int) -> Iterator[str]:
    for side in sides:
        if side != sides[0]:
            yield f"enc.{_at(side, 'down')}"
        yield from (f"enc.{_at(side, f'block{i}')}" for i in range(n))


def _decoder(sides: list[int], n: int) -> Iterator[str]:
    for side in reversed(sides):
        yield from (f"dec.{_at(side, w)}" for w in (("in0", "in1") if side == sides[-1] else ("up",)))
        yield from (f"dec.{_at(side, f'block{i}')}" for i in range(n + 1))


def _leaf_name(leaf: str, array: np.ndarray) -> str:
    if leaf == "W" and array.ndim == 1:
        return "freqs"
    return "bias" if leaf in ("bias", "b") else "weight"


def _to_torch(array: np.ndarray) -> Tensor:
    """Kernels from (height, width, in, out) to (out, in, height, width), matrices from (in, out) to (out, in)."""
    tensor = torch.from_numpy(np.array(array, dtype=np.float32))
    if tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1)
    elif tensor.ndim == 2:
        tensor = tensor.T
    return tensor.contiguous()


def _merge_attention(state: State, source: str) -> State:
    """Separate q, k, v matrices become rows (channel, {q, k, v}) of 1x1 kernels."""
    merged: State = {}
    for name, tensor in state.items():
        layer, part, leaf = name.rsplit(".", 2) if name.count(".") == 3 else ("", "", "")
        if part == "q":
            parts = [state.get(f"{layer}.{p}.{leaf}") for p in "qkv"]
            if any(p is None or p.shape != tensor.shape for p in parts):
                raise UserError(f"{source}: queries, keys and values of {layer} differ in shape")
            rows = torch.stack(parts, dim=1).flatten(0, 1)
            merged[f"{layer}.qkv.{leaf}"] = rows[..., None, None] if leaf == "weight" else rows
        elif part == "proj" and leaf == "weight":
            merged[name] = tensor[..., None, None]
        elif part not in ("k", "v"):
            merged[name] = tensor
    return merged
