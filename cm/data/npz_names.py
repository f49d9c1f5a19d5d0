"""npz files of other programs: images and labels under usual names, such as `x_train` and `y_train`."""

from collections.abc import Sequence

import numpy as np

from cm.data import labels as label_modes
from cm.data.decode import readable
from cm.data.sources import ArraySource, bounded_array
from cm.errors import UserError
from cm.storage import filesystem

# In order of preference; upper or lower case
IMAGES = ("images", "x_train", "train_images", "image", "imgs", "x", "data", "samples")
LABELS = ("labels", "y_train", "train_labels", "label", "y", "targets", "target", "classes")


class NamedNpzSource(ArraySource):
    """uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) under one of IMAGES; under LABELS integers or names (N,)."""

    def __init__(self, path: str):
        with readable(path), filesystem.open_npz(path) as arrays:
            members = arrays.zip.namelist()
            there = [name for name in arrays.files if f"{name}.npy" in members]
            image_name, label_name = first_of(IMAGES, there), first_of(LABELS, there)
            if not image_name:
                raise UserError(
                    f"has no array of images: it holds {', '.join(sorted(there)) or 'nothing'}; images are looked for "
                    f"under arr_0, {', '.join(IMAGES)}"
                )
            images = _channels_last(bounded_array(arrays, image_name, images=True), image_name)
            labels = bounded_array(arrays, label_name) if label_name else None
        super().__init__(path, images)
        if labels is not None:
            flat = labels.reshape(-1) if labels.size == len(labels) else labels
            self._stored = label_modes.from_values(flat, f"{path}: {label_name}")
            if len(flat) != len(self.images):
                raise UserError(f"{path}: {len(flat)} {label_name} for {len(self.images)} {image_name}")


def is_named_npz(path: str) -> bool:
    """Whether a path is an npz file without arr_0, the name that this framework writes."""
    if not path.lower().endswith(".npz") or not filesystem.exists(path):
        return False
    try:
        with filesystem.open_zip(path) as archive:
            return "arr_0.npy" not in archive.namelist()
    except Exception:  # damaged bytes make zipfile raise almost anything: who reads the archive says it
        return False


def first_of(wanted: Sequence[str], there: Sequence[str]) -> str:
    """The first wanted name that is there, as it is spelled there; empty where none is."""
    by_lower = {name.lower(): name for name in there}
    return next((by_lower[name] for name in wanted if name in by_lower), "")


def _channels_last(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(f"{name} has shape {images.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    return images
