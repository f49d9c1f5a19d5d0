"""NCSN++ and DDPM++ of the authors' JAX code restated in numpy: layers numbered by class in the order of use, NHWC.

Parameters that are asked for and not there are drawn, so that one forward pass makes a checkpoint.
"""

import numpy as np

FIR = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64.0


class Flax:
    """One network: its parameters by path, and the counters that number its layers."""

    def __init__(
        self, channels: int = 8, levels: int = 3, blocks: int = 1, fourier: bool = True, seed: int = 0
    ):
        self.channels, self.levels, self.blocks, self.fourier = channels, levels, blocks, fourier
        self.random = np.random.RandomState(seed)
        self.params: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}

    def number(self, kind: str) -> str:
        """Name of the next layer of a class at the top level."""
        self.counts[kind] = self.counts.get(kind, -1) + 1
        return f"{kind}_{self.counts[kind]}"

    def get(self, path: str, shape: tuple[int, ...], mean: float = 0.0) -> np.ndarray:
        """A parameter, fp32 in the file, fp64 here."""
        if path not in self.params:
            spread = 0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[:-1]))
            self.params[path] = (mean + spread * self.random.standard_normal(shape)).astype(np.float32)
        return self.params[path].astype(np.float64)

    def dense(self, name: str, x: np.ndarray, out: int) -> np.ndarray:
        return x @ self.get(f"{name}/kernel", (x.shape[-1], out)) + self.get(f"{name}/bias", (out,))

    def nin(self, name: str, x: np.ndarray) -> np.ndarray:
        channels = x.shape[-1]
        return x @ self.get(f"{name}/W", (channels, channels)) + self.get(f"{name}/b", (channels,))

    def conv(
        self, name: str, x: np.ndarray, out: int, size: int = 3, stride: int = 1, pad: int = -1
    ) -> np.ndarray:
        kernel = self.get(f"{name}/kernel", (size, size, x.shape[-1], out))
        x = pad_image(x, *[size // 2 if pad < 0 else pad] * 2)
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[
            :, ::stride, ::stride
        ]
        return np.einsum("bhwcij,ijco->bhwo", windows, kernel) + self.get(f"{name}/bias", (out,))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        batch, channels = x.shape[0], x.shape[-1]
        groups = min(channels // 4, 32)
        parts = x.reshape(batch, -1, groups, channels // groups)
        mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
        x = ((parts - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
        return x * self.get(f"{name}/scale", (channels,), 1.0) + self.get(f"{name}/bias", (channels,))

    def block(self, x: np.ndarray, temb: np.ndarray, out: int, resample: str = "") -> np.ndarray:
        name = self.number("ResnetBlockBigGANpp")
        h = swish(self.norm(f"{name}/GroupNorm_0", x))
        if resample:
            change = {"up": self.up, "down": self.down}[resample]
            h, x = change(h), change(x)
        h = (
            self.conv(f"{name}/Conv_0", h, out)
            + self.dense(f"{name}/Dense_0", swish(temb), out)[:, None, None]
        )
        h = self.conv(f"{name}/Conv_1", swish(self.norm(f"{name}/GroupNorm_1", h)), out)
        if resample or x.shape[-1] != out:
            x = self.conv(f"{name}/Conv_2", x, out, size=1)
        return (x + h) / np.sqrt(2)

    def attention(self, x: np.ndarray) -> np.ndarray:
        name = self.number("AttnBlockpp")
        batch, side, _, channels = x.shape
        h = self.norm(f"{name}/GroupNorm_0", x).reshape(batch, side * side, channels)
        q, k, v = (self.nin(f"{name}/NIN_{i}", h) for i in range(3))
        weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(channels))
        h = self.nin(f"{name}/NIN_3", weights @ v / weights.sum(-1, keepdims=True))
        return (x + h.reshape(x.shape)) / np.sqrt(2)

    def up(self, x: np.ndarray) -> np.ndarray:
        if not self.fourier:
            return x.repeat(2, 1).repeat(2, 2)
        spread = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
        spread[:, ::2, ::2] = x
        return 4 * fir(pad_image(spread, 2, 1))

    def down(self, x: np.ndarray) -> np.ndarray:
        if not self.fourier:
            return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]).mean((2, 4))
        return fir(pad_image(x, 1, 1))[:, ::2, ::2]

    def time(self, c_noise: np.ndarray) -> np.ndarray:
        if self.fourier:
            frequencies = self.get("GaussianFourierProjection_0/W", (self.channels,))
            phases = 2 * np.pi * c_noise[:, None] * frequencies
        else:
            half = self.channels // 2
            phases = c_noise[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
        temb = np.concatenate([np.sin(phases), np.cos(phases)], axis=-1)
        temb = self.dense(self.number("Dense"), temb, 4 * self.channels)
        return self.dense(self.number("Dense"), swish(temb), 4 * self.channels)

    def __call__(self, x: np.ndarray, c_noise: np.ndarray) -> np.ndarray:
        """Prediction for images (B, H, W, C)."""
        self.counts = {}
        temb, width = self.time(c_noise), 2 * self.channels
        pyramid = x
        skips = [self.conv(self.number("Conv"), x, self.channels)]
        for level in range(self.levels):
            for _ in range(self.blocks):
                h = self.block(skips[-1], temb, width)
                skips.append(self.attention(h) if h.shape[1] == 16 else h)
            if level < self.levels - 1:
                h = self.block(skips[-1], temb, width, "down")
                if self.fourier:
                    name = self.number("Downsample") + "/Conv2d_0"
                    step = self.conv(name, fir(pad_image(pyramid, 2, 2)), width, stride=2, pad=0)
                    h = pyramid = (step + h) / np.sqrt(2)
                skips.append(h)
        h = self.block(self.attention(self.block(skips[-1], temb, width)), temb, width)
        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = self.block(np.concatenate([h, skips.pop()], axis=-1), temb, width)
            if h.shape[1] == 16:
                h = self.attention(h)
            if level > 0:
                h = self.block(h, temb, width, "up")
        return self.conv(self.number("Conv"), swish(self.norm(self.number("GroupNorm"), h)), x.shape[-1])

    def tree(self) -> dict:
        """The parameters as nested dicts with sorted keys: every operation of JAX on a tree sorts them as text."""
        root: dict = {}
        for path, array in self.params.items():
            *parents, leaf = path.split("/")
            node = root
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array
        return in_order(root)


def in_order(tree: object) -> object:
    """Nested dicts with their keys sorted."""
    return {key: in_order(tree[key]) for key in sorted(tree)} if isinstance(tree, dict) else tree


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def pad_image(x: np.ndarray, before: int, after: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))


def fir(x: np.ndarray) -> np.ndarray:
    """Filter without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (4, 4), axis=(1, 2))
    return np.einsum("bhwcij,ij->bhwc", windows, FIR)
