"""The original's data interface: `load_data` and `ImageDataset` over a folder of image files.

It lists what the original listed (jpg, jpeg, png, gif) and labels by file-name prefix, always in three channels.
`cm.data.open_dataset` is the fuller interface, which the scripts use.
"""

from collections.abc import Iterator, Sequence

import torch

from cm.data import labels
from cm.data.dataset import ImageData
from cm.data.decode import Decoder
from cm.data.sources import FolderSource, image_names
from cm.data.stream import TrainStream
from cm.data.transforms import center_crop_arr, random_crop_arr
from cm.errors import UserError
from cm.runtime import distributed
from cm.seeding import derive_seed
from cm.storage import filesystem

__all__ = ["ImageDataset", "center_crop_arr", "load_data", "random_crop_arr"]

_LISTED = ("jpg", "jpeg", "png", "gif")


class ImageDataset(ImageData):
    """Image files by path; item i is ((3, H, W) float32 in [-1, 1], {"y": class} or {}).

    Holds every `num_shards`-th path from number `shard` on. `classes` is one integer per path, or None.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ):
        self.local_images = list(image_paths[shard::num_shards])
        self.local_classes = None if classes is None else list(classes[shard::num_shards])
        known = labels.UNLABELLED
        if self.local_classes:
            known = labels.from_integers(self.local_classes, "classes")
        super().__init__(
            FolderSource("", self.local_images),
            image_size=resolution,
            labels=known,
            decoder=Decoder(channels=3),
            class_cond=classes is not None,
            random_flip=random_flip,
            random_crop=random_crop,
        )


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    seed: int = 0,
    num_workers: int = 1,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Endless batches of this rank's shard: ((batch_size, 3, H, W) float32 in [-1, 1], {"y": (batch_size,)} or {}).

    Args:
        data_dir: a folder, local or remote, searched recursively.
        batch_size: images per rank; a UserError when the shard holds fewer.
        class_cond: label by the text before the first underscore of each file name, numbered in sorted order.
        deterministic: listed order instead of a shuffle. Shuffle, flips and crops are functions of `seed`.
    """
    paths = _list_images(data_dir)
    classes = None
    if class_cond:
        classes = labels.from_names(
            [labels.name_prefix(path) for path in paths], "file-name prefixes"
        ).indices
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    dataset = ImageDataset(
        image_size,
        paths,
        classes=classes,
        shard=rank,
        num_shards=world_size,
        random_crop=random_crop,
        random_flip=random_flip,
    )
    if len(dataset) < batch_size:
        raise UserError(
            f"{data_dir}: {len(dataset)} images for this rank are fewer than the batch of {batch_size}"
        )
    stream = TrainStream(
        dataset,
        global_batch_size=batch_size,
        seed=derive_seed(seed, "shard", rank),
        num_workers=num_workers,
        shuffle=not deterministic,
    )
    return iter(stream)


def _list_images(data_dir: str) -> list[str]:
    if not data_dir:
        raise UserError("--data_dir is missing")
    if not filesystem.isdir(data_dir):
        raise UserError(f"{data_dir}: no such folder")
    names = image_names(filesystem.list_recursive(data_dir), data_dir, _LISTED)
    return [f"{data_dir.rstrip('/')}/{name}" for name in names]
