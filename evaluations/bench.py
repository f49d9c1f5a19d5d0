"""Speed of the evaluation against what it cannot do without (scripts/benchmark.py eval)."""

from collections.abc import Callable

import torch
from torch import Tensor

from cm.models.factory import choose_device
from cm.tools.bench.runs import Options
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing, beside_peers, interleaved
from evaluations.features import inception_channels_last
from evaluations.fid import frechet_distance
from evaluations.inception_v3 import InceptionV3
from evaluations.precision_recall import precision_recall

FEATURES = 2048


def bench_eval(options: Options) -> list[Row]:
    """A row per metric, and one per memory format of the Inception network."""
    device = choose_device(options.device)
    return [row for case in options.chosen(CASES) for row in CASES[case](options, device)]


def bench_frechet(options: Options, device: torch.device, features: int = FEATURES) -> list[Row]:
    """Fréchet distance against SciPy's matrix square root of the product of covariances, both on the CPU."""
    from scipy.linalg import sqrtm

    samples = 3 * features
    sides = [(x.mean(0), x.T.cov()) for x in (_features(samples, features, s, torch.float64) for s in (0, 1))]
    product = (sides[0][1] @ sides[1][1]).numpy()
    runs = {
        "cm": lambda: frechet_distance(*sides[0], *sides[1]),
        "scipy.linalg.sqrtm": lambda: sqrtm(product),
    }
    return [_row("frechet", {"features": features}, runs, options, torch.device("cpu"))]


def bench_precision_recall(
    options: Options, device: torch.device, count: int = 10_000, features: int = FEATURES
) -> list[Row]:
    """Precision and recall of count x count samples against the three matrix products that it needs."""
    a, b = (_features(count, features, s, torch.float32).to(device) for s in (0, 1))

    def products() -> None:
        for u, v in ((a, a), (b, b), (a, b)):
            for rows in u.split(1000):
                rows @ v.T

    runs = {"cm": lambda: precision_recall(a, b), "matrix products": products}
    return [_row("precision_recall", {"count": count, "features": features}, runs, options, device)]


def bench_inception(options: Options, device: torch.device, batch: int = 0) -> list[Row]:
    """The Inception network on 64x64 images; the other memory format is the peer."""
    batch = batch or (64 if device.type == "cuda" else 8)
    images = torch.randint(0, 256, (batch, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    images = images.float().to(device)
    used = inception_channels_last(device)
    nets = {"cm": InceptionV3(used).to(device), f"channels_last={not used}": InceptionV3(not used).to(device)}
    runs = {name: torch.no_grad()(lambda net=net: net(images)) for name, net in nets.items()}
    return [_row("inception", {"batch": batch, "channels_last": used}, runs, options, device, batch)]


def _features(count: int, features: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows that resemble pooled features: not negative, with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, features + 1, dtype=dtype) ** -0.3
    return (torch.randn(count, features, generator=generator, dtype=dtype) * scale).relu()


def _row(
    name: str,
    config: dict[str, object],
    runs: dict[str, Callable[[], object]],
    options: Options,
    device: torch.device,
    images: int = 0,
) -> Row:
    """Our figures beside one peer's."""
    timings: dict[str, Timing] = interleaved(runs, device, warmup=1, repeats=options.repeats)
    figures = beside_peers(timings)
    median = timings["cm"].median
    return Row(f"eval/{name}", config, figures | ({"images_per_second": images / median} if images else {}))


CASES = {
    "frechet": bench_frechet,
    "precision_recall": bench_precision_recall,
    "inception": bench_inception,
}
