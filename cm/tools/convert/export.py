"""Writing a model for others: one writer a kind, a model card beside the result, a folder or the Hugging Face Hub."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cm.models.files import ModelFile
from cm.runtime.files import writing
from cm.storage.weights import save_weights
from cm.tools.convert import diffusers, hub, onnx
from cm.tools.convert.card import card, card_path
from cm.tools.convert.layout import Config, State
from cm.tools.convert.tensor_files import write_safetensors

HUB = "hf://"


WRITERS: dict[str, Callable[[str, State, Config], None]] = {
    "cm": lambda target, state, config: save_weights(target, state, {"config": config}),
    "legacy": lambda target, state, config: save_weights(target, state),
    "safetensors": lambda target, state, config: write_safetensors(target, state, {"config": config}),
    "diffusers": diffusers.write_folder,
    "onnx": onnx.write_onnx,
}
# Name of the file in a repository of the Hub; diffusers' files have names of their own
NAMES = {"cm": "model.pt", "legacy": "model.pt", "safetensors": "model.safetensors", "onnx": "model.onnx"}


def hub_name(target: str) -> str:
    """OWNER/NAME of a target on the Hub, empty for any other; UserError for one that is no repository."""
    return hub.checked_name(target.removeprefix(HUB), target) if target.startswith(HUB) else ""


def export(target: str, to: str, state: State, config: Config, origin: ModelFile) -> str:
    """Write a model as `to` at a path or at hf://OWNER/NAME, with its card; returns where it is.

    origin: the file that the weights come from; its state is not read.
    """
    if repository := hub_name(target):
        with tempfile.TemporaryDirectory() as folder:
            place = os.path.join(folder, NAMES[to]) if to in NAMES else folder
            WRITERS[to](place, state, config)
            text = card(place, to, state, config, origin, name=repository)
            (Path(folder) / "README.md").write_text(text, encoding="utf-8")
            return hub.push(folder, repository)
    with writing(target):
        WRITERS[to](target, state, config)
        beside = card_path(target)
        beside.write_text(card(target, to, state, config, origin), encoding="utf-8")
    return f"{target} ({to}), {beside}"
