"""Damaged inputs by kind: each generator spoils one valid input at random and says which command reads it."""

import copy
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm.commands.main import main
from cm.storage.weights import META_MEMBER, load_weights
from tests.helpers.bad_data import Malicious, png
from tests.helpers.eval_files import write_classifier, write_npz
from tests.helpers.models import save_consistency_model
from tests.helpers.run_files import make_run

Argv = list[Any]
Generator = Callable[[random.Random, Path, Path], Argv]  # (draws, valid inputs, empty folder) -> a command

# What no program of ours writes in the place of some value. "deep" and "gone" stand for what `spoil` makes of them.
VALUES = [
    None, True, -1, 0, 0.5, float("nan"), float("inf"), 10**400, 10**25, 2**63, -(2**31), "text", "", "\ud800",
    "x" * 5000, "a\nb\x1b[31m", [], {}, [[]], [None], {"a": 1}, ["x"], "NaN", "1", "../../x", "nul\0", "deep", "gone",
]  # fmt: skip
TEXTS = [
    b"",
    b"{",
    bytes(50),
    b"\xef\xbb\xbf{}",
    b'{"a":1}{"b":2}',
    b'{"a":1,}',
    b"NaN",
    b"'x'",
    b"\xff\xfe{}",
]


def places(document: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a JSON document; of a list the first four."""
    yield at
    inner = document.items() if isinstance(document, dict) else enumerate(document[:4])
    for key, value in inner if isinstance(document, dict | list) else ():
        yield from places(value, (*at, key)) if isinstance(value, dict | list) else [(*at, key)]


def spoil(r: random.Random, document: Any) -> bytes:
    """The document as JSON with one value replaced, or no JSON at all."""
    if r.random() < 0.1:
        return r.choice(TEXTS)
    at, value = r.choice(list(places(document))), r.choice(VALUES)
    value = "@deep@" if value == "deep" else value
    spoilt = copy.deepcopy(document)
    if not at:
        spoilt = value
    else:
        holder = spoilt
        for key in at[:-1]:
            holder = holder[key]
        if value == "gone":
            del holder[at[-1]]
        else:
            holder[at[-1]] = value
    return json.dumps(spoilt).replace('"@deep@"', "[" * 100_000 + "]" * 100_000).encode()


def valid_inputs(folder: Path) -> Path:
    """One of everything that a program reads, small."""
    save_consistency_model(folder / "model.pt", resblock_updown=True)
    made = make_run(folder / "run", previews=["onestep"], data_dir=str(folder / "images.zip"))
    beat = dict(rank=0, world_size=1, host="h", pid=1, born=1, step=3, phase="step", since=1.0, time=2.0)
    (made / "heartbeats").mkdir()
    (made / "heartbeats" / "rank_0000.json").write_text(json.dumps(beat))
    labels = [[f"{name}/{i}.png", number] for number, name in enumerate("ab") for i in range(3)]
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, _ in labels:
            archive.writestr(name, png())
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    with zipfile.ZipFile(folder / "images.zip") as archive:
        archive.extractall(folder / "images")
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(folder / "images", ".")
    images = np.zeros((6, 8, 8, 1), np.uint8)
    np.savez(folder / "images.npz", arr_0=images, arr_1=np.arange(6) % 2)
    meta = np.array(json.dumps({"protocol": "adm", "sha256": "x"}))
    np.savez(folder / "reference.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=images, meta=meta)
    (folder / "drawn").mkdir()
    write_npz(folder / "drawn" / "a.npz", 6)
    write_classifier(folder / "judge.pt")
    judge = ("--features", f"classifier={folder / 'judge.pt'}")
    command("reference", folder / "drawn" / "a.npz", folder / "scores.npz", *judge)
    command("prepare", folder / "images", folder / "store", "--image_size", "8")
    command("convert", folder / "model.pt", folder / "model.safetensors", "--to", "safetensors")
    command("convert", folder / "model.pt", folder / "diffusers", "--to", "diffusers")
    drawn = {"nfe": 1, "sigmas": [80.0], "model_path": str(made / "checkpoints/step_000020/model.pt")}
    drawn |= {"weights": "raw", "config": {"sampler": "onestep", "num_samples": 4, "preset": "p"}}
    (folder / "results").mkdir()
    (folder / "results" / "samples_4.json").write_text(json.dumps(drawn))
    (folder / "drawn" / "a.json").write_text(json.dumps(drawn))
    one = {"samples": {"path": "samples_4.npz", "count": 4, "meta": drawn}, "comparable": True}
    scores = {"metrics": {"fid": 1.0}, "protocol": {"name": "adm"}, "features": {}, **one}
    (folder / "results" / "a_vs_b.json").write_text(json.dumps(scores))
    return folder


def command(*argv: Any) -> None:
    """A command that must succeed."""
    main([str(word) for word in argv])


def _json_of(path: Path) -> Any:
    return json.loads(path.read_text().splitlines()[-1] if path.suffix == ".jsonl" else path.read_text())


def json_file(part: str, name: str, *argv: str) -> Generator:
    """A JSON file within a folder or beside it. In argv, @ stands for the spoilt copy and o for the output."""

    def make(r: random.Random, world: Path, folder: Path) -> Argv:
        shutil.copytree(world / part, folder / part)
        path = folder / part / name
        path.write_bytes(spoil(r, _json_of(path)))
        return _argv(argv, folder / part, folder, world)

    return make


def _argv(words: tuple[str, ...], target: Path, folder: Path, world: Path) -> Argv:
    stand_ins = {"@": target, "o": folder / "o", "RUN": world / "run", "FOLDER": folder}
    stand_ins |= {"IN": target / "a.npz"}
    stand_ins |= {"SCORES": world / "scores.npz", "DRAWN": world / "drawn" / "a.npz"}
    stand_ins |= {"JUDGE": f"classifier={world / 'judge.pt'}", "AS JUDGE": f"classifier={target}"}
    return [stand_ins.get(word, word) for word in words]


def meta_of(name: str, *argv: str) -> Generator:
    """The configuration that travels in a weights file. In argv, @ stands for the spoilt copy."""

    def make(r: random.Random, world: Path, folder: Path) -> Argv:
        with (
            zipfile.ZipFile(world / name) as old,
            zipfile.ZipFile(folder / "w.pt", "w", zipfile.ZIP_STORED) as new,
        ):
            for member in old.infolist():
                content = old.read(member)
                is_meta = member.filename.endswith(META_MEMBER)
                new.writestr(member.filename, spoil(r, json.loads(content)) if is_meta else content)
        return _argv(argv, folder / "w.pt", folder, world)

    return make


def safetensors_header(r: random.Random, world: Path, folder: Path) -> Argv:
    """The header of a safetensors file, or its length."""
    content = (world / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = spoil(r, json.loads(content[8 : 8 + length]))
    said = r.choice([len(header)] * 5 + [0, 1, 2**63, 2**64 - 1, 10**9])
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", said) + header + content[8 + length :])
    return ["convert", folder / "w.safetensors", folder / "o"]


def tensors(r: random.Random, world: Path, folder: Path) -> Argv:
    """A weights file of other code: odd values, types, names and wrappers, in both formats of torch.save."""
    state = dict(load_weights(world / "model.pt")[0])
    name = r.choice(list(state))
    t = state[name]
    odd = [
        t.to(torch.complex64), t.long(), t.bool(), t.to_sparse() if t.dim() else t, t.to("meta"), torch.tensor(1.0),
        torch.zeros(1).expand(10**5, 10**6), None, [1], "text", np.float64(3), np.zeros(2), Malicious(), {1, 2},
    ]  # fmt: skip
    wrapped = [
        {}, [state], {"model": state, "ema": state}, {f"module.{k}": v for k, v in state.items()}, {**state, 3: t},
        {**state, ("a",): t}, {**state, "a\n\x1b[31m": t}, {**state, "x" * 10_000: t}, {"a": {"b": {"c": state}}},
    ]  # fmt: skip
    content = {**state, name: r.choice(odd)} if r.random() < 0.6 else r.choice(wrapped)
    torch.save(content, folder / "w.pt", _use_new_zipfile_serialization=r.random() < 0.7)
    return ["convert", folder / "w.pt", folder / "o", "--training_mode", "edm", "--image_size", "8"]


def pickles(r: random.Random, world: Path, folder: Path) -> Argv:
    """Pickles that would run a command, or that ask for gigabytes."""
    memo = b"\x80\x02r" + struct.pack("<I", r.choice([10**8, 2**32 - 1])) + b"."
    calls = [b"cposix\nmkdir\n(Vpwned\ntR.", b"cbuiltins\neval\n(V__import__('os').mkdir('pwned')\ntR."]
    whole = [pickle.dumps({"ema": Malicious()}, protocol) for protocol in (0, 2, 4, 5)]
    (folder / "network.pkl").write_bytes(r.choice([memo, *calls, *whole, b"(" * 20_000 + b"."]))
    return ["convert", folder / "network.pkl", folder / "o"]


HEADERS = [
    "'|u1', 'fortran_order': False, 'shape': (10**9, 8, 8, 1)", "'|u1', 'fortran_order': False, 'shape': (-6, 8, 8, 1)",
    "'|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 1)", "'|O', 'fortran_order': False, 'shape': (6,)",
    "'|V1000000000', 'fortran_order': False, 'shape': (1,)", "'<U1000000000', 'fortran_order': False, 'shape': ()",
    "'<f8', 'fortran_order': False, 'shape': (99999999999999999999,)", "'|u1', 'fortran_order': True, 'shape': (6, 8)",
    "'<M8[s]', 'fortran_order': False, 'shape': (6,)", "'<c16', 'fortran_order': False, 'shape': (4,)",
    "[('a', '|u1'), ('b', '<f4', (1000, 1000))], 'fortran_order': False, 'shape': (6,)", "'|u1'" + ", 'a': {" * 500,
    "__import__('os').mkdir('pwned'), 'fortran_order': False, 'shape': (4,)",
]  # fmt: skip


EVALUATE = ("evaluate", "SCORES", "@", "--features", "JUDGE", "--out", "o.json")
EVALUATE_BY = ("evaluate", "@", "DRAWN", "--features", "JUDGE", "--out", "o.json")
NPZ = {
    "images.npz": [("inspect", "@"), EVALUATE],
    "reference.npz": [("reference", "--inspect", "@")],
    "scores.npz": [EVALUATE_BY],
}


def array_headers(r: random.Random, world: Path, folder: Path) -> Argv:
    """A member of an npz whose header says something else than it holds, also compressed."""
    source = r.choice(list(NPZ))
    with np.load(world / source) as archive:
        arrays = dict(archive)
    name = r.choice(list(arrays))
    del arrays[name]
    np.savez(folder / source, **arrays)
    header = ("{'descr': " + r.choice(HEADERS) + "}\n").encode()
    method = r.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(folder / source, "a", method) as archive:
        magic = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
        archive.writestr(f"{name}.npy", magic + header + bytes(r.choice([0, 4096, 1 << 20])))
    return _argv(r.choice(NPZ[source]), folder / source, folder, world)


def arrays(r: random.Random, world: Path, folder: Path) -> Argv:
    """Arrays of an npz with other values, types and shapes."""
    source = r.choice(list(NPZ))
    with np.load(world / source) as archive:
        found = dict(archive)
    name = r.choice([name for name in found if found[name].dtype.kind != "U"])
    a = found[name]
    other = [
        a * np.nan, a.astype(complex), a[:0], a[:1], a[..., None], a.ravel(), a.astype("U3"), a.astype(bool), -1.0 * a,
        a.astype(np.int64) * 10**15, np.array(3), np.asfortranarray(a), a.astype(">f8"), a.astype(object),
    ]  # fmt: skip
    np.savez(folder / source, **{**found, name: r.choice(other)})
    return _argv(r.choice(NPZ[source]), folder / source, folder, world)


READERS = {
    "model.pt": ("convert", "@", "o"),
    "model.safetensors": ("convert", "@", "o"),
    "images.npz": ("inspect", "@"),
    "images.zip": ("inspect", "@"),
    "images.tar": ("prepare", "@", "o", "--image_size", "8"),
    "reference.npz": ("reference", "--inspect", "@"),
}


def changed_bytes(r: random.Random, world: Path, folder: Path) -> Argv:
    """A file with a few changed bytes, or cut off."""
    name = r.choice(list(READERS))
    content = bytearray((world / name).read_bytes())
    if r.random() < 0.3:
        content = content[: r.randrange(len(content))]
    for _ in range(r.choice([1, 4]) if content else 0):
        # Half of them near an end, where archives have their tables
        far = r.randrange(len(content)) if r.random() < 0.5 else -1 - r.randrange(min(300, len(content)))
        content[far] = r.randrange(256)
    (folder / name).write_bytes(content)
    return _argv(READERS[name], folder / name, folder, world)


def tar_members(r: random.Random, world: Path, folder: Path) -> Argv:
    """A tar with a member that is no file, has an odd name, or whose extended header makes no sense."""
    name = r.choice(
        [
            "a/x.png",
            "../x.png",
            "/tmp/x.png",
            "d" * 3000 + ".png",
            "caf\udce9.png",
            "a\n\x1b[31m.png",
            "a.json",
        ]
    )
    odd, content = tarfile.TarInfo(name), r.choice([png(), b"", b"[" * 50_000, b'{"label": "\\ud800"}'])
    odd.size = len(content)
    odd.type = r.choice(
        [tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    )
    odd.linkname = r.choice(["/etc/passwd", "a/0.png", "nowhere"])
    sparse = {"GNU.sparse.size": "x", "GNU.sparse.map": "1,2,z"}
    odd.pax_headers = r.choice([{}, {}, sparse, {"size": "99999999999999"}])
    with tarfile.open(folder / "images.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(world / "images", ".")
        archive.addfile(odd, io.BytesIO(content))
    return r.choice([["inspect", "images.tar"], ["prepare", "images.tar", folder / "o", "--image_size", "8"]])


SPECIAL = ("pipe", "socket", "zero", "null", "dangling", "loop", "folder", "sparse", "memory")


def put(kind: str, path: Path) -> None:
    """Something that is no ordinary file."""
    links = {
        "zero": "/dev/zero",
        "null": "/dev/null",
        "dangling": "no",
        "loop": path.name,
        "memory": "/proc/self/mem",
    }
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(40 << 30)
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))


PLACES = {
    **{("", name): argv for name, argv in READERS.items()},
    **{("run", name): ("runs", "FOLDER") for name in ("config.json", "status.json", "progress.jsonl")},
    ("run", "heartbeats/rank_0000.json"): ("runs", "FOLDER"),
    ("run", "log.txt"): ("report", "@", "--out", "o"),
    ("run", "status.json"): ("report", "@", "--out", "o"),
    ("run", "previews/step_000010_onestep.png"): ("report", "@", "--out", "o"),
    ("store", "manifest.json"): ("inspect", "@"),
    ("store", "images-00000.npy"): ("inspect", "@"),
    ("images", "a/0.png"): ("inspect", "@"),
    ("images", "dataset.json"): ("prepare", "@", "o", "--image_size", "8"),
    ("diffusers", "unet/config.json"): ("convert", "@", "o"),
    ("results", "samples_4.json"): ("report", "RUN", "--results", "@", "--out", "o"),
    ("results", "a_vs_b.json"): ("report", "RUN", "--results", "@", "--out", "o"),
}


def special_files(r: random.Random, world: Path, folder: Path) -> Argv:
    """A pipe, a device, a link that leads nowhere, a file of 40 GB ... in the place of a file."""
    (part, name), argv = r.choice(list(PLACES.items()))
    path = folder / part / name
    if part:
        shutil.copytree(world / part, folder / part)
        path.unlink()
    put(r.choice(SPECIAL), path)
    return _argv(argv, folder / part if part else path, folder, world)


KINDS: dict[str, Generator] = {
    "model's configuration": meta_of("model.pt", "convert", "@", "o"),
    "model's configuration in the demo": meta_of("model.pt", "demo", "@"),
    "feature network's description": meta_of(
        "judge.pt", "evaluate", "SCORES", "DRAWN", "--features", "AS JUDGE", "--out", "o.json"
    ),
    "evaluated samples' description": json_file(
        "drawn", "a.json", "evaluate", "SCORES", "IN", "--features", "JUDGE", "--out", "o.json"
    ),
    "heartbeat for the doctor": json_file(
        "run", "heartbeats/rank_0000.json", "doctor", "--run_dir", "FOLDER"
    ),
    "safetensors header": safetensors_header,
    "tensors": tensors,
    "pickles": pickles,
    "array headers": array_headers,
    "arrays": arrays,
    "changed bytes": changed_bytes,
    "tar members": tar_members,
    "special files": special_files,
    "run's configuration": json_file("run", "config.json", "runs", "FOLDER", "--json"),
    "run's configuration in a report": json_file("run", "config.json", "report", "@", "--out", "o"),
    "status": json_file("run", "status.json", "runs", "FOLDER"),
    "heartbeat": json_file("run", "heartbeats/rank_0000.json", "runs", "FOLDER"),
    "log": json_file("run", "progress.jsonl", "report", "@", "--out", "o"),
    "state": json_file("run", "checkpoints/step_000020/state.json", "report", "@", "--out", "o"),
    "samples' description": json_file(
        "results", "samples_4.json", "report", "RUN", "--results", "@", "--out", "o"
    ),
    "scores": json_file("results", "a_vs_b.json", "report", "RUN", "--results", "@", "--out", "o"),
    "store's manifest": json_file("store", "manifest.json", "inspect", "@"),
    "labels": json_file("images", "dataset.json", "inspect", "@"),
    "network of a diffusers folder": json_file("diffusers", "unet/config.json", "convert", "@", "o"),
    "grid of a diffusers folder": json_file(
        "diffusers", "scheduler/scheduler_config.json", "convert", "@", "o"
    ),
}

REPORTS = {"run's configuration in a report", "log", "state", "samples' description", "scores"}
REPORTS |= {"heartbeat for the doctor"}
# Of these a list or a report says nothing where they are damaged.
PASSED_OVER = {"run's configuration", "status", "heartbeat", "log", "state", "samples' description", "scores"}
PASSED_OVER |= {"heartbeat for the doctor", "evaluated samples' description"}
