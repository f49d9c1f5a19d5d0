"""A small classifier of any labelled images: a feature network that trains in seconds to minutes.

    cm evaluate DATA SAMPLES --features classifier           # trains one at its first use
    cm classifier DATA OUT.pt
    cm evaluate DATA SAMPLES --features classifier=OUT.pt

It plays Inception's part where Inception sees nothing: the Fréchet distance in its features, and how often a
class-conditional sample is read as its class.
"""

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm.config.parsing import at_least, expanded
from cm.errors import UserError
from cm.runtime import distributed, job, logger
from cm.runtime.claims import claimed_place
from cm.runtime.files import writing
from cm.runtime.inputs import misfit
from cm.runtime.progress import progress
from cm.storage.filesystem import cache_folder, make_cache_folder
from cm.storage.shapes import shapes_only
from cm.storage.weights import check_matching, load_weights, save_weights
from evaluations.npz_io import ImageSet, Reference, open_images

FEATURE_DIM = 64
LARGE = 16  # pixels: of larger images patches of 2 x 2 are channels, which quarters the work
_BATCH = 128
SIZES = ("image_size", "channels", "num_classes", "patch")  # what a file says of itself
LARGEST = 1 << 16  # of them
MOST_VALUES = 1 << 28  # of pixels that one is trained on, a byte each
EPOCHS, SEEN = 30, 200_000  # passes, and images of all passes where nobody asked for their number
# What a file of this module calls itself, and what older ones did
NAME, OLD_NAME = "classifier", "digits"


class SmallClassifier(nn.Module):
    """(B, C, H, W) floats in [-1, 1] -> (features (B, 64), logits (B, num_classes)).

    patch: pixels of such patches are channels of the first layer.
    """

    def __init__(self, image_size: int, channels: int, num_classes: int, width: int = 32, patch: int = 1):
        super().__init__()
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        self.patch = patch
        self.conv1 = nn.Conv2d(channels * patch**2, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(32 * width, FEATURE_DIM)
        self.output = nn.Linear(FEATURE_DIM, num_classes, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv1(F.pixel_unshuffle(x, self.patch)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.conv3(x)), 4)
        # Normalised, so that distances between features have the same scale for every classifier.
        features = F.relu(F.layer_norm(self.hidden(x.flatten(1)), (FEATURE_DIM,)))
        return features, self.output(features)


def to_network_range(images: Tensor) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    held_out: float = 0.2,
    show: bool = False,
) -> tuple[SmallClassifier, dict]:
    """Train on a share 1 - `held_out` of uint8 images (N, H, W, C) with labels (N,); a function of its arguments.

    show: its progress. Returns the classifier in eval mode and its meta data, with the accuracy on the held-out share.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1] or images.shape[1] != images.shape[2]:
        raise ValueError(f"images {images.shape} and labels {labels.shape}: expected (N, S, S, C) and (N,)")
    x, y = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    test, train = order[: int(held_out * len(x))], order[int(held_out * len(x)) :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = images.shape[1]
        patch = 2 if side > LARGE and side % 2 == 0 else 1
        net = SmallClassifier(side, images.shape[3], int(y.max()) + 1, patch=patch)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train) // _BATCH))
        with progress(total=epochs * len(train), desc="classifier", unit="image", enabled=show) as bar:
            for rows in (r for _ in range(epochs) for r in train[torch.randperm(len(train))].split(_BATCH)):
                # A little noise keeps the classifier smooth between the few real images.
                clean = to_network_range(x[rows])
                noisy = clean + 0.1 * torch.randn(clean.shape)
                loss = F.cross_entropy(net(noisy)[1], y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(len(rows))
    net.eval().requires_grad_(False)
    read = [net(to_network_range(x[rows]))[1].argmax(1) for rows in test.split(_BATCH)]
    correct = (torch.cat(read) == y[test]).double().mean() if len(test) else torch.nan
    meta = {"network": NAME, "image_size": net.image_size, "channels": net.channels, "patch": net.patch}
    meta |= {"num_classes": net.num_classes, "seed": seed, "epochs": epochs, "train_images": len(train)}
    return net, meta | {"held_out_images": len(test), "held_out_accuracy": round(float(correct), 4)}


def load_classifier(path: str) -> tuple[SmallClassifier, dict]:
    """The classifier of a file that this module wrote."""
    state, meta = load_weights(path)
    if not meta or meta.get("network") not in (NAME, OLD_NAME):
        raise UserError(f"--features {NAME}={path}: not written by cm classifier")
    said = {"patch": 1, **meta}
    sizes = [said.get(name) for name in SIZES]
    if problem := misfit(said, dict.fromkeys(SIZES, int)):
        raise UserError(f"--features {NAME}={path}: in its description {problem}")
    if not all(size and 0 < size <= LARGEST for size in sizes):
        raise UserError(f"--features {NAME}={path}: its description must have {', '.join(SIZES)}")
    *shape, patch = sizes
    with shapes_only():  # compared before memory is taken
        check_matching(SmallClassifier(*shape, patch=patch), state, f"--features {NAME}={path}")
    net = SmallClassifier(*shape, patch=patch)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), meta


def unfit(images: ImageSet) -> str:
    """Why no classifier can be trained of these images; empty where one can."""
    if images.labels is None:
        return "these images have none"
    if images.labels.min() < 0 or len(np.unique(images.labels)) < 2:
        return "two classes or more, numbered from 0"
    return "" if images.shape[1] == images.shape[2] else "and square images"


def labelled_pixels(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images, labels): all, or of a set that is too large every k-th. UserError where they have no labels."""
    if problem := unfit(images):
        raise UserError(f"{images.path}: a classifier needs labels: {problem}")
    count = images.shape[0]
    step = max(1, -(-count * int(np.prod(images.shape[1:])) // MOST_VALUES))
    if step > 1:
        logger.log(f"{images.path}: a classifier learns from every {step}th image")
    starts = range(0, count, 4096)
    batches = zip(starts, images.batches(range(count), 4096))
    return np.concatenate([batch[-start % step :: step] for start, batch in batches]), images.labels[::step]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The network is so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_reference(reference: Reference) -> str:
    """The file of a classifier of a reference's own labels in the cache, trained if it is not there. Collective.

    It is a function of images and labels. UserError where there are none.
    """
    images = reference.images
    if images is None or unfit(images):
        raise UserError(f"{reference.path} has no labelled images to learn from: --features {NAME}=FILE")
    key = hashlib.sha256(images.sha256().encode() + images.labels.tobytes()).hexdigest()
    path = Path(cache_folder(), "classifiers", f"{key[:16]}.pt")
    with distributed.node_first():
        if not path.exists():
            pixels, labels = labelled_pixels(images)
            make_cache_folder(path.parent)
            logger.log(f"training a small classifier of {reference.path}, kept in {path}")
            epochs = min(EPOCHS, max(1, SEEN // len(labels)))
            with _one_thread():
                net, meta = train_classifier(pixels, labels, epochs=epochs, show=True)
                save_weights(path, net.state_dict(), meta | {"source": reference.path})
    _, meta = load_classifier(str(path))
    if distributed.is_main():
        logger.log(
            f"features: a small classifier of {reference.path}, which reads {meta['held_out_accuracy']:.2%} of "
            "held-out images right; compare its numbers with each other only"
        )
    return str(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", type=expanded, help="labelled images: npz with arr_0 and arr_1, folder, zip or prepared store"
    )
    parser.add_argument("out", type=expanded, help="weights file to write")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of initialisation, order and split")
    parser.add_argument("--epochs", type=at_least(1), default=EPOCHS, help="passes over the data")
    args = parser.parse_args()
    with claimed_place(args.out, "OUT"), _one_thread():
        pixels, labels = labelled_pixels(open_images(args.data))
        net, meta = train_classifier(pixels, labels, seed=args.seed, epochs=args.epochs, show=True)
        with writing(args.out):
            save_weights(args.out, net.state_dict(), meta)
    print(
        f"{args.out}: {meta['held_out_accuracy']:.2%} of {meta['held_out_images']} held-out images read right"
    )


if __name__ == "__main__":
    job.run_main(main)
