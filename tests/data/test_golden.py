"""Crops, listing, labels and shards equal the published pipeline's, bit for bit (golden/image_datasets.npz)."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from cm.data import open_dataset
from cm.data.transforms import box_center_crop_arr
from cm.errors import UserError
from cm.image_datasets import ImageDataset, center_crop_arr, load_data, random_crop_arr
from tests.helpers import golden_data


@pytest.fixture(scope="module")
def golden():
    return golden_data.load("image_datasets")


@pytest.fixture(scope="module")
def listing(golden, tmp_path_factory):
    """The golden folder: readable images of distinct grey values under the golden names."""
    root = tmp_path_factory.mktemp("listing")
    case = golden.config["listing"][0]
    for number, name in enumerate(case["files_created"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".txt", ".md", "noext")):
            (root / name).write_text("no image")
        else:
            kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(
                name.lower().rpartition(".")[2], name.rpartition(".")[2]
            )
            Image.new("L", (8, 8), 10 * number).save(root / name, format=kind.upper())
    return root, case


def image_of(golden, case):
    return Image.open(io.BytesIO(golden[f"{case['id']}/file_bytes"].tobytes())).convert("RGB")


@pytest.mark.parametrize("size", [16, 32, 64])
def test_center_crop_is_bit_equal(golden, size):
    for case in golden.config["cases"]:
        assert np.array_equal(
            center_crop_arr(image_of(golden, case), size), golden[f"{case['id']}/crop_{size}"]
        ), case


def test_random_crop_is_bit_equal(golden):
    for case in golden.config["cases"]:
        (key,) = golden.keys(f"{case['id']}/randomcrop_seed")
        random.seed(int(key.split("seed")[1].split("_")[0]))
        assert np.array_equal(random_crop_arr(image_of(golden, case), 32), golden[key]), case


def test_items_are_bit_equal_from_files_and_from_a_folder(golden, tmp_path):
    paths = []
    for case in golden.config["cases"]:
        name = f"{case['y']:02}_{case['id']}.{'tiff' if case['format'] == 'TIFF' else 'png'}"
        paths.append(tmp_path / name)
        paths[-1].write_bytes(golden[f"{case['id']}/file_bytes"].tobytes())
    original = ImageDataset(
        16, [str(p) for p in paths], classes=[c["y"] for c in golden.config["cases"]], random_flip=False
    )
    ours = open_dataset(str(tmp_path), image_size=16, channels=3, class_cond=True, random_flip=False)
    for index, case in enumerate(golden.config["cases"]):
        for image, cond in (original[index], ours[index]):
            assert image.dtype == np.float32 and np.array_equal(image, golden[f"{case['id']}/item_16"]), case
            assert cond["y"] == case["y"] and cond["y"].dtype == np.int64
    stacked = ours.batch(range(len(paths)), [0] * len(paths))
    assert np.array_equal(stacked.images[4], golden["04_RGB_200x100/item_16"])
    assert stacked.labels.tolist() == list(range(len(paths)))


def test_listing_labels_and_shards(listing):
    root, case = listing
    batches = load_data(
        data_dir=str(root),
        batch_size=5,
        image_size=8,
        class_cond=True,
        deterministic=True,
        random_flip=False,
        num_workers=0,
    )
    first, second = next(batches), next(batches)
    assert torch.cat([first[1]["y"], second[1]["y"]]).tolist() == case["labels"]
    grey = [10 * case["files_created"].index(name) for name in case["listed"]]
    seen = (torch.cat([first[0], second[0]]) + 1).mul(127.5).mean(dim=(1, 2, 3))
    assert torch.allclose(seen, torch.tensor(grey).float(), atol=1.5)  # JPEG may be off by one
    assert (
        first[0].shape == (5, 3, 8, 8)
        and first[0].dtype == torch.float32
        and first[1]["y"].dtype == torch.int64
    )

    for shard, names in case["shards"].items():
        number, count = map(int, shard.split("of"))
        assert ImageDataset(8, case["listed"], shard=number, num_shards=count).local_images == names


def test_wider_listing_keeps_the_order(listing):
    root, case = listing
    names = open_dataset(str(root), image_size=8).source.names
    assert [name for name in names if not name.endswith((".webp", ".bmp"))] == [
        name for name in case["listed"] if name != ".hidden.png"
    ]
    assert {"a_1.webp", "sub/a_0.bmp"} < set(names)


def test_load_data_takes_hidden_names_as_the_original_did(tmp_path):
    for name in ("a.png", ".b.png", "__MACOSX/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    with pytest.raises(UserError, match="3 images for this rank are fewer than the batch of 4"):
        load_data(data_dir=str(tmp_path), batch_size=4, image_size=8)


def test_load_data_shuffles_by_seed_and_augments_plain_indices(tmp_path):
    for number in range(6):
        Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8) // (number + 1)).save(
            tmp_path / f"{number}.png"
        )

    def batches(seed):
        stream = load_data(data_dir=str(tmp_path), batch_size=6, image_size=8, seed=seed, num_workers=0)
        return torch.stack([next(stream)[0] for _ in range(3)])

    assert torch.equal(batches(0), batches(0)) and not torch.equal(batches(0), batches(1))
    data = ImageDataset(8, [str(tmp_path / "0.png")])
    random.seed(0)
    items = [data[0][0] for _ in range(20)]
    assert data[0][1] == {}
    mirrored = [np.array_equal(item, items[0][:, :, ::-1]) for item in items]
    assert 3 < sum(mirrored) < 17
    with pytest.raises(UserError, match="6 images for this rank are fewer than the batch of 7"):
        load_data(data_dir=str(tmp_path), batch_size=7, image_size=8)
    with pytest.raises(UserError, match="no such folder"):
        load_data(data_dir=str(tmp_path / "x"), batch_size=7, image_size=8)


def test_box_crop_is_the_mean_of_the_central_square():
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2:4], pixels[:, 4:6] = 40, 80
    pixels[:, :2] = pixels[:, 6:] = 255  # outside the square
    assert box_center_crop_arr(Image.fromarray(pixels), 2).tolist() == [[40, 80], [40, 80]]


def test_elongated_image_is_refused_before_it_fills_memory():
    with pytest.raises(UserError, match="too elongated"):
        center_crop_arr(Image.new("L", (10_000_000, 1)), 64)
