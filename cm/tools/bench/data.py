"""Reading images: the training set's own path, against a plain PIL data set behind a DataLoader, on one core."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cm.data import open_dataset
from cm.data.prepare import prepare
from cm.data.transforms import center_crop_arr
from cm.tools.bench.runs import Options
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing, interleaved, timed

PHOTO = (500, 375)  # the usual size of an ImageNet photograph
SIZE = 64
COUNT = 64
# What 8 cores should read [images/s]: encoded photographs, or images of the right size.
BAR_PHOTOS, BAR_READY = 3_000, 20_000
PREPARING: dict[str, Any] = {"image_size": SIZE, "labels": "none", "in_channels": 3, "num_workers": 0}


@dataclass(frozen=True)
class Case:
    """Images as ours reads them, and as the plain data set does; bar: images per second of 8 cores."""

    path: str
    plain_path: str
    reads: str
    bar: int


class PlainImages(Dataset):
    """Image files as one reads them without thinking of speed: open, convert, crop, scale, transpose."""

    def __init__(self, folder: str):
        self.paths = sorted(p for p in Path(folder).iterdir() if p.suffix in (".jpg", ".png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        from PIL import Image

        image = center_crop_arr(Image.open(self.paths[index]).convert("RGB"), SIZE)
        return image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1


def bench_data(options: Options, count: int = COUNT) -> list[Row]:
    """Photographs (JPEG) read directly, 64-px PNG files, and the stores that prepare_data makes of both."""
    with tempfile.TemporaryDirectory() as folder:
        photos, small, photo_store, small_store = (
            str(Path(folder, name)) for name in ("photos", "small", "photo_store", "small_store")
        )
        write_pictures(photos, count, PHOTO, "jpg")
        write_pictures(small, count, (SIZE, SIZE), "png")
        preparing = Timing()
        with timed(preparing, torch.device("cpu")):
            prepare(photos, photo_store, **PREPARING)
        prepare(small, small_store, **PREPARING)
        once = f"its store, prepared once at {count / preparing.cpu_median:.0f} images/s per core"
        cases = {
            "jpeg": Case(photos, photos, "JPEG", BAR_PHOTOS),
            "png64": Case(small, small, "PNG", BAR_READY),
            "store64": Case(small_store, small, "its store", BAR_READY),
            "jpeg_store64": Case(photo_store, photos, once, BAR_PHOTOS),
        }
        chosen = options.chosen(cases)
        return [data_row(name, cases[name], count, options) for name in chosen]


def data_row(name: str, case: Case, count: int, options: Options) -> Row:
    """Images per second and core of our data set, and of the plain one on the files that the case began with."""
    dataset = open_dataset(case.path, image_size=SIZE, channels=3)
    loader = DataLoader(PlainImages(case.plain_path), batch_size=count)
    runs = {
        "cm": lambda: dataset.batch(list(range(count)), list(range(count))),
        "plain": lambda: next(iter(loader)),
    }
    device = torch.device("cpu")
    timings = interleaved(runs, device, warmup=options.warmup, repeats=options.repeats)
    ours, plain = timings["cm"], timings["plain"]
    figures = {
        **ours.summary(),
        "images_per_second": count / ours.cpu_median,
        "bar_images_per_second": case.bar / 8,
        "ratio_to_best_peer": ours.cpu_median / plain.cpu_median,
        "peers": {"plain": {**plain.summary(), "images_per_second": count / plain.cpu_median}},
    }
    config = {"images": count, "image_size": SIZE, "cores": 1, "reads": case.reads}
    return Row(f"data/{name}", config | {"peer_reads": Path(case.plain_path).name}, figures)


def write_pictures(folder: str, count: int, size: tuple[int, int], suffix: str) -> None:
    """Random pictures as smooth as photographs: noise of an eighth of the resolution, enlarged, with a little grain."""
    from PIL import Image

    Path(folder).mkdir()
    random = np.random.RandomState(0)
    width, height = size
    for i in range(count):
        coarse = random.randint(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        grain = random.randint(-4, 5, smooth.shape)
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(Path(folder, f"{i:04}.{suffix}"), quality=90)
