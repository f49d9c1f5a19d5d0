"""Speed of the evaluation against what it cannot do without, in one run on one machine.

python -m evaluations.bench
"""

import json
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cm import dist_util
from evaluations.fid import frechet_distance
from evaluations.inception_v3 import InceptionV3
from evaluations.precision_recall import precision_recall

FEATURES = 2048


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _features(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows that resemble pooled features: not negative, with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, FEATURES + 1, dtype=dtype) ** -0.3
    return (torch.randn(count, FEATURES, generator=generator, dtype=dtype) * scale).relu()


def bench_frechet(samples: int = 6000) -> dict[str, float]:
    """Fréchet distance at d = 2048 against SciPy's matrix square root of the product, on the CPU."""
    from scipy.linalg import sqrtm

    sides = [(x.mean(0), x.T.cov()) for x in (_features(samples, s, torch.float64) for s in (0, 1))]
    product = (sides[0][1] @ sides[1][1]).numpy()
    frechet_distance(*sides[0], *sides[1])  # the first call loads the library's kernels
    ours = seconds(lambda: frechet_distance(*sides[0], *sides[1]))
    theirs = seconds(lambda: sqrtm(product))
    return {"seconds": ours, "sqrtm_seconds": theirs, "speedup": theirs / ours}


def bench_precision_recall(count: int = 10_000, device: str = "cpu") -> dict[str, float]:
    """Precision and recall of count x count x 2048 against the three matrix products that it needs."""
    a, b = (_features(count, s, torch.float32).to(device) for s in (0, 1))

    def products() -> None:
        for u, v in ((a, a), (b, b), (a, b)):
            for rows in u.split(1000):
                rows @ v.T

    products()
    bare, ours = seconds(products), seconds(lambda: precision_recall(a, b))
    return {"seconds": ours, "products_seconds": bare, "ratio": ours / bare}


def bench_inception(device: str, batch: int = 64, batches: int = 4) -> dict[str, float]:
    """Images per second of 64x64 images, in both memory formats."""
    images = (
        torch.randint(0, 256, (batch, 3, 64, 64), generator=torch.Generator().manual_seed(0))
        .float()
        .to(device)
    )
    found = {}
    for channels_last in (False, True):
        net = InceptionV3(channels_last).to(device)
        net(images)
        elapsed = seconds(lambda net=net: [net(images) for _ in range(batches)])
        found["channels_last" if channels_last else "contiguous"] = batch * batches / elapsed
    return found


def main() -> None:
    """Print all figures as JSON."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    result = {
        "machine": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "frechet": bench_frechet(),
        "precision_recall": bench_precision_recall(device=device),
        "inception_images_per_second": bench_inception(
            device, batch=64 if gpu else 8, batches=4 if gpu else 1
        ),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    dist_util.run_main(main)
