"""Conversion of checkpoints: what a file is, and how it is read.

Every reader returns our state dict and the model flags that the file tells; every writer (`export`) takes both. What a
file does not tell (how the model was trained, above all) the caller adds.
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cm.config import presets
from cm.config.derived import is_consistency
from cm.config.fields import flags_of
from cm.config.flags import ModelFlags
from cm.config.rows import OBJECTIVES, PRECONDS
from cm.config.stored import checked
from cm.errors import UserError
from cm.models.files import ModelFile, find_model_file, load_model_file
from cm.models.guided_diffusion import guessed_precond, guided_to_ours, is_guided
from cm.models.identify import RELEASED_HEADS, Heads, identify
from cm.models.wrappers import require_flat, unwrapped
from cm.runtime.inputs import open_regular
from cm.storage.torch_format import LEGACY
from cm.storage.unpickle import one_line
from cm.storage.weights import load_weights
from cm.tools.convert import diffusers, edm2_layout, edm_layout, edm_pickle, jax_cifar
from cm.tools.convert.export import export, hub_name
from cm.tools.convert.layout import Config, State, check_fits
from cm.tools.convert.tensor_files import is_safetensors, read_safetensors


@dataclass(frozen=True)
class Source:
    """A checkpoint to read, and what the caller knows of it.

    weights: which of several networks in it, ema, raw or target; empty takes the average. image_size: where tensor
    shapes do not tell it. qkv_order: of guided-diffusion's files, legacy or new (--use_new_attention_order). heads and
    precond: of files that tell neither.
    """

    path: str
    weights: str = ""
    image_size: int = 0
    qkv_order: str = "legacy"
    heads: Heads = RELEASED_HEADS
    precond: str = ""


def detect(path: str) -> str:
    """The kind of a checkpoint, by its content: a key of READERS."""
    if os.path.isdir(path):
        return "diffusers" if diffusers.is_folder(Path(path)) else "torch"
    if not os.path.isfile(path):
        raise UserError(f"no such checkpoint: {path}")
    if is_safetensors(path):
        return "safetensors"
    if zipfile.is_zipfile(path):
        return "edm" if _mentions_edm(path) else "torch"
    with open_regular(path) as file:
        head = file.read(len(LEGACY))
    if head == LEGACY:
        return "torch"
    if jax_cifar.is_flax(path):
        return "jax"
    if edm_pickle.is_pickle(path):
        return "edm"
    raise UserError(f"{path} is no checkpoint of a kind known here ({', '.join(READERS)})")


def _mentions_edm(path: str) -> bool:
    """Whether a torch zip holds objects of EDM's code instead of plain tensors."""
    # Damaged bytes make zipfile raise almost anything, which the reader of the file says.
    with suppress(Exception), zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        # What is compressed is no file of torch: its reader says so without unpacking it.
        stored = names and archive.getinfo(names[0]).compress_type == zipfile.ZIP_STORED
        return bool(stored) and b"torch_utils.persistence" in archive.read(names[0])
    return False


def _read_torch(source: Source) -> tuple[State, Config]:
    """A checkpoint of ours or a bare state dict: original, guided-diffusion's, or in EDM's layout."""
    if os.path.isdir(source.path):
        weights = "" if source.weights == "ema" else source.weights
        file = load_model_file(source.path, weights)
        state, config = file.state, file.config
    else:
        state, meta = load_weights(source.path)
        config = (meta or {}).get("config")
    return _identified(state, config, source)


def _read_safetensors(source: Source) -> tuple[State, Config]:
    state, meta = read_safetensors(source.path)
    return _identified(state, (meta or {}).get("config"), source)


def _identified(state: State, config: Config | None, source: Source) -> tuple[State, Config]:
    if config is not None:
        return require_flat(state, source.path, described=True), checked(config, source.path)
    state = unwrapped(state, source.path, source.weights)
    if edm_layout.is_edm(state):
        return edm_layout.from_edm(state, source.path)
    if edm2_layout.is_edm2(state):
        return edm2_layout.from_edm2(state, source.path)
    guided = is_guided(state)
    state = guided_to_ours(state, source.qkv_order, source.heads)
    config = identify(state, source.path, source.image_size, source.heads)
    # It predicts the noise at discrete times: with EDM's scalings it would give noise.
    return state, {
        **config,
        "precond": source.precond or guessed_precond(config["image_size"]),
    } if guided else config


def _read_edm(source: Source) -> tuple[State, Config]:
    network = edm_pickle.read_network(source.path)
    if network.class_name == edm_pickle.EDM2:
        tensors = edm_pickle.network_tensors(network, source.path)
        facts = edm2_layout.pickled_facts(network, source.path)
        state, config = edm2_layout.from_edm2(tensors, source.path, facts.pop("head_channels"))
        return state, {**config, **facts, "precond": "edm", "training_mode": "edm"}
    state, facts = edm_pickle.edm_network(network, source.path)
    state, config = edm_layout.from_edm(state, source.path)
    return state, {**config, **facts, "training_mode": "edm"}


READERS: dict[str, Callable[[Source], tuple[State, Config]]] = {
    "torch": _read_torch,
    "safetensors": _read_safetensors,
    "edm": _read_edm,
    "jax": lambda source: jax_cifar.from_flax(source.path, source.weights or "ema"),
    "diffusers": lambda source: diffusers.read_folder(source.path),
}


def known_flags(preset: str, **given: Any) -> Config:
    """What the caller says of a model: a preset's flags of model, objective and grid, then those given (not empty)."""
    config: Config = {}
    if preset:
        names = {*flags_of(ModelFlags), "training_mode", "steps"}
        values = presets.values(preset, "release", "image_sample")
        config = {name: value for name, value in values.items() if name in names}
    return config | {name: value for name, value in given.items() if value}


def convert(source: Source, target: str, to: str, known: Config) -> str:
    """Read a checkpoint of any kind and write it as `to`; returns one line that says what was done.

    known: flags that the file does not tell, or may not contradict. UserError where the file and they leave open what
    the target needs.
    """
    hub_name(target)  # a wrong one is said before anything is read
    kind, heads = detect(source.path), _heads(known)
    source = replace(source, precond=known.get("precond", ""), heads=heads or source.heads)
    with one_line(f"{source.path} does not hold a network known here"):
        state, told = READERS[kind](source)
    for name in ("network", "training_mode", "precond"):
        contradicted = name in told and name in known and told[name] != known[name]
        if contradicted and not _interchangeable(name, told, known):
            raise UserError(f"{source.path} has --{name} {told[name]}, not {known[name]}")
    if heads and told.get("network") == "adm" and (other := _heads(told)) != heads:
        raise UserError(f"{source.path} has {other}, not {heads}")
    defaults = {name: field.default for name, field in flags_of(ModelFlags).items()}
    column = told.get("precond") or known.get("precond") or defaults["precond"]
    implied = PRECONDS[column].model or {}
    config = {**defaults, **implied, **known, **told} | {
        k: known[k] for k in ("training_mode", "steps") if k in known
    }
    if to != "legacy":
        _require_objective(config, source.path)
    check_fits(state, config, source.path)
    written = export(target, to, state, config, _origin(source, kind))
    parameters = sum(t.numel() for t in state.values())
    facts = ", ".join([config["network"], f"{parameters:,} values", *_taken(told, known, heads)])
    return f"{source.path} ({kind}): {facts} -> {written}"


def _origin(source: Source, kind: str) -> ModelFile:
    """The file that the weights were read from, without them."""
    if kind == "torch" and os.path.isdir(source.path):
        path, weights = find_model_file(source.path, "" if source.weights == "ema" else source.weights)
        return ModelFile(path, weights, {}, None)
    return ModelFile(source.path, "file", {}, None)


def _heads(flags: Config) -> Heads | None:
    """The attention heads that flags describe; a width wins, as it does in the network."""
    if flags.get("num_head_channels", -1) > 0:
        return Heads(0, flags["num_head_channels"])
    return Heads(flags["num_heads"], -1) if flags.get("num_heads", -1) > 0 else None


def _taken(told: Config, known: Config, heads: Heads | None) -> list[str]:
    """What neither the file nor the caller said, and is as in the released networks."""
    bare = told.get("network") == "adm" and not {"sigma_data", "time_scale", "training_mode"} & told.keys()
    notes = []
    if bare and heads is None:
        notes.append(
            f"{RELEASED_HEADS} as in the released networks (shapes do not tell; else give --num_heads)"
        )
    if bare and "precond" in told and "precond" not in known:
        notes.append(f"--precond {told['precond']} as in those of this size")
    return notes


def _interchangeable(name: str, told: Config, known: Config) -> bool:
    """Distillation and training give the same kind of model, and a diffusers folder does not tell which it was."""
    return name == "training_mode" and all(is_consistency(c[name]) for c in (told, known))


def _require_objective(config: Config, path: str) -> None:
    if config.get("training_mode") not in OBJECTIVES:
        raise UserError(f"{path} does not say how it was trained: give --training_mode or --preset")
    consistency = is_consistency(config["training_mode"])
    if "steps" not in config and consistency:
        raise UserError(f"{path} does not say how many noise levels its grid has: give --steps or --preset")
