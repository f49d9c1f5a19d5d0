"""Data sets that must be refused: damaged, malicious, or of another kind."""

import io
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def png(size=8, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (size, size)).save(file, "PNG")
    return file.getvalue()


def huge_png():
    """A tiny file that claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def npz(**arrays):
    return lambda path: np.savez(path.with_suffix(".npz"), **arrays)


def zipped(members, **options):
    def make(path):
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content, **options)

    return make


def folder_of(files):
    def make(path):
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)

    return make


def cut_npz(path):
    np.savez(path.with_suffix(".npz"), arr_0=np.zeros((8, 8, 8, 1), np.uint8))
    content = path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").write_bytes(content[: len(content) // 2])


IMAGES = np.zeros((8, 8, 8, 1), np.uint8)
EIGHT = {f"{i}.png": png() for i in range(8)}
DATA = {
    "object array": npz(arr_0=np.array([{}] * 8, dtype=object)),
    "object labels": npz(arr_0=IMAGES, arr_1=np.array([{}] * 8, dtype=object)),
    "floats": npz(arr_0=IMAGES.astype(np.float32)),
    "no images": npz(arr_0=IMAGES[:0]),
    "two dimensions": npz(arr_0=IMAGES[:, :, 0, 0]),
    "five channels": npz(arr_0=np.zeros((8, 8, 8, 5), np.uint8)),
    "another name": npz(pictures=IMAGES),
    "labels too few": npz(arr_0=IMAGES, arr_1=np.arange(3)),
    "negative labels": npz(arr_0=IMAGES, arr_1=np.arange(8) - 4),
    "too few images": npz(arr_0=IMAGES[:2]),
    "half a file": cut_npz,
    "an empty npz": lambda path: path.with_suffix(".npz").write_bytes(b""),
    "text as npz": lambda path: path.with_suffix(".npz").write_text("no arrays"),
    "a pickle as npz": lambda path: path.with_suffix(".npz").write_bytes(pickle.dumps(Malicious())),
    "an empty folder": folder_of({}),
    "a folder without images": folder_of({"a.txt": b"x"}),
    "a damaged image": folder_of({**EIGHT, "3.png": png()[:40]}),
    "text as an image": folder_of({**EIGHT, "3.png": b"text"}),
    "an empty image": folder_of({**EIGHT, "3.png": b""}),
    "an image bomb": folder_of({**EIGHT, "3.png": huge_png()}),
    "a zip that leads out": zipped({**EIGHT, "../out.png": png()}),
    "an absolute zip": zipped({**EIGHT, "/out.png": png()}),
    "a zip bomb": zipped({**EIGHT, "b.png": bytes(300 << 20)}, compress_type=zipfile.ZIP_DEFLATED),
    "a zip without images": zipped({"a.txt": b"x"}),
    "text as a zip": lambda path: path.with_suffix(".zip").write_text("no zip"),
    "bad dataset.json": folder_of({**EIGHT, "dataset.json": b"{"}),
    "dataset.json of numbers": folder_of({**EIGHT, "dataset.json": b"[1, 2]"}),
    "dataset.json of other files": folder_of({**EIGHT, "dataset.json": b'{"labels": [["x.png", 1]]}'}),
    "an unknown kind": lambda path: path.with_suffix(".tar").write_bytes(b"x"),
    "nothing": lambda path: None,
}
