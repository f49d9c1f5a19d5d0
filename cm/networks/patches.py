"""Patches as channels: a network that works on images of a p-th of the side (Luhman & Luhman 2022).

The pixels of a patch become channels before the network and pixels again after it, an exact inverse. Shapes: images
(B, C, H, W), what the network sees (B, C p^2, H / p, W / p).
"""

from functools import partial
from typing import Any

from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def patched(net: nn.Module, size: int, *, images: bool = True) -> nn.Module:
    """The same network, which now takes images whose patches of `size` pixels are its channels; 1 changes nothing.

    Hooks of the module itself: names in its state dict, its methods and its copies stay what they are. images: what it
    returns, or the first of several things, are such images, too.
    """
    if size > 1:
        net.register_forward_pre_hook(partial(_to_channels, size))
        if images:
            net.register_forward_hook(partial(_to_pixels, size))
    return net


def _to_channels(size: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return pixel_unshuffle(args[0], size), *args[1:]


def _to_pixels(size: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return pixel_shuffle(output[0], size), *output[1:]
    return pixel_shuffle(output, size)
