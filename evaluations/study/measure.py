"""What a study measures: its data and classifier, samples with their search for noise levels, and every distance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm.commands.cli import parse
from cm.commands.sample import noise_levels, sample_batches, solver_options
from cm.config.scripts import SampleConfig
from cm.data.images import SampleWriter, save_json
from cm.data.sources import open_source
from cm.errors import UserError
from cm.models.pretrained import load_pretrained
from cm.sampling.generate import Labels, generate
from cm.sampling.noise import IndexedGenerator
from cm.storage.filesystem import write_atomic
from cm.storage.weights import save_weights
from evaluations.evaluator import Evaluator, Options
from evaluations.features import load_features
from evaluations.npz_io import open_images, open_reference
from evaluations.protocols import PROTOCOLS
from evaluations.small_classifier import load_classifier, to_network_range, train_classifier
from evaluations.study.methods import Study

SEARCH_SEED, SEARCH_COUNT = 1000, 500
BATCH = 250  # samples at a time
NEIGHBOURS = 200  # samples whose nearest training images are looked for
BOOTSTRAP = 100


def prepare(study: Study, data: Path, run: Path) -> None:
    """`run`/train.npz and test.npz with images and labels, unless they are there."""
    for part in ("train", "test"):
        out = run / f"{part}.npz"
        if out.exists():
            continue
        source = open_source(str(data / getattr(study, part)))
        labels = source.labels("auto").indices
        if labels is None:
            raise UserError(
                f"{data / getattr(study, part)}: a study needs labels, and there are none beside it"
            )
        arrays = {"arr_0": source.gather(range(len(source))), "arr_1": np.asarray(labels, np.int64)}
        write_atomic(out, lambda file, arrays=arrays: np.savez(file, **arrays))


def arrays_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, H, W, C) uint8, labels (N,)) of an npz that this module wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def classifier(study: Study, run: Path) -> dict[str, Any]:
    """Train `run`/classifier.pt on the training images unless it is there; its meta data, with test_accuracy."""
    path = run / "classifier.pt"
    if not path.exists():
        net, meta = train_classifier(
            *arrays_of(run / "train.npz"), epochs=study.epochs, held_out=0.0, show=True
        )
        images, labels = arrays_of(run / "test.npz")
        with torch.no_grad():
            read = torch.cat(
                [net(to_network_range(x))[1].argmax(1) for x in torch.from_numpy(images).split(500)]
            )
        meta = {k: v for k, v in meta.items() if not k.startswith("held_out")}
        meta |= {
            "test_images": len(labels),
            "test_accuracy": round(float(np.mean(read.numpy() == labels)), 4),
        }
        save_weights(str(path), net.state_dict(), meta)
    return load_classifier(str(path))[1]


class Ruler:
    """Everything that is measured against the test images, which are prepared once."""

    def __init__(self, run: Path):
        self.run = run
        protocol = PROTOCOLS["small"]
        self.network = load_features(f"classifier={run / 'classifier.pt'}", "classifier", torch.device("cpu"))
        self.test = open_reference(str(run / "test.npz"))
        options = Options(protocol, protocol.metrics, batch_size=500, bootstrap=BOOTSTRAP)
        self.all = Evaluator(self.test, self.network, options)
        self.few = Evaluator(self.test, self.network, Options(protocol, ("fid", "accuracy"), batch_size=500))
        self._search: Evaluator | None = None

    def measure(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Metrics of one seed after the other: all of them of the first seed, the cheap ones of the others."""
        evaluators = [self.all, *[self.few] * (len(paths) - 1)]
        runs = []
        for evaluator, path in zip(evaluators, paths):
            images = open_images(str(path))
            runs.append(evaluator.measure(images) | {"count": images.shape[0], "samples": images.meta})
        metrics = {name: float(np.mean([r["metrics"][name] for r in runs])) for name in self.few.metrics}
        return {
            "metrics": {**runs[0]["metrics"], **metrics},
            "fid_range": [f([r["metrics"]["fid"] for r in runs]) for f in (min, max)],
            "runs": runs,
        }

    def to_train(self, path: Path) -> float:
        """Distance to the training images, by which noise levels are chosen: the test images take no part in it."""
        if self._search is None:
            options = Options(PROTOCOLS["small"], ("fid",), batch_size=500)
            self._search = Evaluator(open_reference(str(subset(self.run, 10_000))), self.network, options)
        return self._search.measure(open_images(str(path)))["metrics"]["fid"]

    def floor(self, count: int) -> dict[str, Any]:
        """What as many training images score."""
        path = subset(self.run, count)
        return self.measure([path]) | {"checkerboard": checkerboard(arrays_of(path)[0])}

    def neighbours(self, path: Path) -> dict[str, float]:
        """Median distance in pixels of samples to their nearest training images, and that of test images."""
        train = as_rows(arrays_of(self.run / "train.npz")[0])
        found = {"samples": path, "test": self.run / "test.npz"}
        return {
            name: float(nearest(as_rows(arrays_of(file)[0][:NEIGHBOURS]), train).median())
            for name, file in found.items()
        }

    def provenance(self) -> dict[str, Any]:
        """The protocol and the hashes of what it rests on."""
        return {
            "protocol": self.all.options.protocol.describe(),
            "features": {"name": self.network.name, "sha256": self.network.sha256},
            "reference": {"path": self.test.path, "sha256": self.test.sha256()},
            "bootstrap": BOOTSTRAP,
        }


def subset(run: Path, count: int) -> Path:
    """An npz of the first `count` training images."""
    path = run / f"train_{count}.npz"
    if not path.exists():
        images, labels = arrays_of(run / "train.npz")
        write_atomic(path, lambda file: np.savez(file, arr_0=images[:count], arr_1=labels[:count]))
    return path


def checkerboard(images: np.ndarray) -> float:
    """Mean excess of the falling over the rising diagonal in blocks of 2 x 2 pixels, in grey levels.

    It is nearly 0 for images; a network on patches of 2 x 2 that has not learned to tell its four pixels apart leaves
    one. images: uint8 (N, H, W, C) of even sides.
    """
    x = images.astype(np.float32)
    falling = x[:, ::2, ::2] + x[:, 1::2, 1::2]
    rising = x[:, ::2, 1::2] + x[:, 1::2, ::2]
    return float((falling - rising).mean() / 2)


def as_rows(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 -> (N, pixels) in [0, 1]."""
    return torch.from_numpy(images).flatten(1).float() / 255


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square distance of each row of a (N, D) to its nearest row of b."""
    found = torch.cat([torch.cdist(a, part).amin(1)[:, None] for part in b.split(10_000)], 1)
    return found.amin(1) / a.shape[1] ** 0.5


def draw(model_path: Path, flags: Mapping[str, Any], count: int, seed: int, out: Path) -> None:
    """`count` samples, classes in turn, as `out` with its metadata beside it; image i depends on (seed, i) only."""
    if out.exists() and out.with_suffix(".json").exists():
        return
    asked = {"model_path": model_path, "device": "cpu", "num_samples": count, "seed": seed, **flags}
    argv = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    model = load_pretrained(parse(SampleConfig, argv))
    c, generator = model.config, IndexedGenerator(seed)
    sigmas = model.denoiser.precond.round_sigma(noise_levels(c))
    shape = (c.image_size, c.image_size, c.in_channels)
    out.parent.mkdir(parents=True, exist_ok=True)
    with SampleWriter(out, (count, *shape), labels=True) as writer:
        generate(
            sample_batches(model, generator, sigmas, None, solver_options(model), None),
            num_samples=count,
            batch_size=BATCH,
            image_shape=shape,
            generator=generator,
            writer=writer,
            labels=Labels(c.num_classes, seed, range(c.num_classes)),
        )
    about = {"flags": dict(flags), "seed": seed, "quantisation": "truncate"}
    save_json(out.with_suffix(".json"), {**model.provenance(), **about})


def search_middle(
    ruler: Ruler, model_path: Path, candidates: Sequence[float], folder: Path
) -> dict[str, Any]:
    """The noise level with which two-step samples are nearest to the training images, and what each candidate gave."""
    found = {}
    for middle in candidates:
        out = folder / f"{middle:g}.npz"
        flags = {"sampler": "multistep", "sigmas": f"80,{middle:g}"}
        draw(model_path, flags, SEARCH_COUNT, SEARCH_SEED, out)
        found[middle] = ruler.to_train(out)
    return {"middle": min(found, key=found.get), "tried": {f"{m:g}": fid for m, fid in found.items()}}
