"""A small classifier of any labelled images: a feature network that trains in seconds to minutes.

    cm classifier DATA OUT.pt
    cm evaluate DATA SAMPLES --features classifier=OUT.pt

It plays Inception's part where Inception sees nothing: the Fréchet distance in its features, and how often a
class-conditional sample is read as its class.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm.config.parsing import at_least, expanded
from cm.errors import UserError
from cm.runtime import job
from cm.runtime.claims import claimed_place
from cm.runtime.files import writing
from cm.runtime.inputs import misfit
from cm.runtime.progress import progress
from cm.storage.weights import check_matching, load_weights, save_weights

FEATURE_DIM = 64
LARGE = 16  # pixels: of larger images patches of 2 x 2 are channels, which quarters the work
_BATCH = 128
SIZES = ("image_size", "channels", "num_classes", "patch")  # what a file says of itself
LARGEST = 1 << 16  # of them
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
    epochs: int = 30,
    held_out: float = 0.2,
    show: bool = False,
) -> tuple[SmallClassifier, dict]:
    """Train on a share 1 - `held_out` of uint8 images (N, H, W, C) with labels (N,); a function of its arguments.

    show: its progress. Returns the classifier in eval mode and its meta data, with the accuracy on the held-out share.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1] or images.shape[1] != images.shape[2]:
        raise ValueError(f"images {images.shape} and labels {labels.shape}: expected (N, S, S, C) and (N,)")
    x, y = to_network_range(torch.from_numpy(images)), torch.from_numpy(labels.astype(np.int64))
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
                noisy = x[rows] + 0.1 * torch.randn(x[rows].shape)
                loss = F.cross_entropy(net(noisy)[1], y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(len(rows))
    net.eval().requires_grad_(False)
    correct = (net(x[test])[1].argmax(1) == y[test]).double().mean() if len(test) else torch.nan
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
    with torch.device("meta"):  # compared before memory is taken
        check_matching(SmallClassifier(*shape, patch=patch), state, f"--features {NAME}={path}")
    net = SmallClassifier(*shape, patch=patch)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), meta


def main() -> None:
    """Command line."""
    from evaluations.npz_io import open_images

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", type=expanded, help="labelled images: npz with arr_0 and arr_1, folder, zip or prepared store"
    )
    parser.add_argument("out", type=expanded, help="weights file to write")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of initialisation, order and split")
    parser.add_argument("--epochs", type=at_least(1), default=30, help="passes over the data")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the network is so small that threads would only wait for each other
    with claimed_place(args.out, "OUT"), writing(args.out):
        images = open_images(args.data)
        if images.labels is None:
            raise UserError(f"{args.data}: a classifier needs labels, and these images have none")
        pixels = np.concatenate(list(images.batches(range(images.shape[0]), 4096)))
        net, meta = train_classifier(pixels, images.labels, seed=args.seed, epochs=args.epochs, show=True)
        save_weights(args.out, net.state_dict(), meta)
    print(
        f"{args.out}: {meta['held_out_accuracy']:.2%} of {meta['held_out_images']} held-out images read right"
    )


if __name__ == "__main__":
    job.run_main(main)
