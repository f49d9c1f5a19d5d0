"""The model card of an export: a README.md in the Hub's form that says what the model is, and what is known of it."""

import json
import re
from pathlib import Path
from typing import Any

from cm import __version__
from cm.config.derived import is_consistency
from cm.errors import UserError
from cm.models.files import ModelFile
from cm.storage.weights import file_sha256
from cm.tools.convert.layout import Config, State
from cm.tools.findings import Finding, find_results
from cm.tools.profiling.report import markdown
from cm.tools.runs import CONFIG, Run, read_run

README = "README.md"
LIBRARIES = {"diffusers": "diffusers", "onnx": "onnx"}
PAPERS = "https://arxiv.org/abs/2303.01469"
LICENCE = """\
The code that trained and wrote this model is under the MIT licence. The licence of the weights is not known to the
program that wrote this card: whoever publishes them says it here and in the first lines, and keeps to the terms of the
training images."""
PIPELINE = """from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{place}"{more})
images = pipeline(batch_size=4{labels}, num_inference_steps={steps}).images
images[0].save("sample.png")"""
ONNX = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{place}")
noise = np.random.default_rng(0).standard_normal((4, {shape})).astype(np.float32)
(images,) = session.run(None, {{"noise": noise{labels}}})  # (4, {shape}) in [-1, 1]"""
OURS = """import cm

model = cm.load("{place}"{more})
images = model.sample(4{labels}, seed=0)  # (4, {shape}) in [-1, 1]"""


def card_path(target: str) -> Path:
    """Where the card of an export stands: README.md in its folder or beside its file; where another one stands already,
    the file's name with .md."""
    path = Path(target)
    if path.is_dir():
        return path / README
    beside = path.parent / README
    if beside.exists() and _mark(path.name) not in beside.read_text(encoding="utf-8", errors="replace"):
        return path.with_name(f"{path.name}.md")
    return beside


def _mark(name: str) -> str:
    return f"<!-- card of {name} -->"


def card(target: str, to: str, state: State, config: Config, origin: ModelFile, name: str = "") -> str:
    """The text of the card. name: of a repository, in place of the target's path."""
    path = Path(target)
    run = _run_of(origin.path)
    title = _plain(name or path.stem)
    tags = ["consistency-model" if _consistency(config) else "diffusion-model", to]
    parts = [
        "---",
        "license: unknown",
        f"library_name: {LIBRARIES.get(to, 'consistency-models')}",
        "pipeline_tag: unconditional-image-generation",
        f"tags: {json.dumps(tags)}",
        "---",
        _mark(path.name),
        f"# {title}\n",
        f"{_sentence(config)}\n",
        *markdown(("fact", "value"), _facts(state, config, origin, run)),
        "",
        "## Use\n",
        f"```python\n{_code(path, to, config, name)}\n```\n",
        "## Numbers\n",
        _numbers(run, origin),
        "## Files\n",
        *markdown(("file", "bytes", "SHA-256"), _files(path)),
        "",
        f"## Licence\n\n{LICENCE}\n",
        f"Written by consistency-models {__version__}; the method: {PAPERS}.",
    ]
    return "\n".join(parts) + "\n"


def _sentence(config: Config) -> str:
    size, channels = config["image_size"], config.get("in_channels") or 3
    images = {1: "grey images", 3: "images"}.get(channels, f"images with {channels} channels")
    classes = f" of {config['num_classes']} classes" if config.get("class_cond") else ""
    what = f"draws {images} of {size} x {size} pixels{classes}"
    if not config.get("training_mode"):
        return f"A network that {what}; how it was trained is not known."
    if _consistency(config):
        return f"A consistency model that {what}: in one step, and better in a few."
    return f"A diffusion model that {what}, in some tens of steps."


def _consistency(config: Config) -> bool:
    return bool(config.get("training_mode")) and is_consistency(config["training_mode"])


def _facts(state: State, config: Config, origin: ModelFile, run: Run | None) -> list[tuple[str, str]]:
    """What the files tell; a row that nothing is known of is left out."""
    step = re.search(r"step_(\d+)", origin.path)
    batch = config.get("global_batch_size") or 0
    trained = f"{int(step[1]):,} steps of {batch:,} images" if step and batch > 0 else ""
    rows = [
        ("preset", config.get("preset")),
        ("objective", config.get("training_mode")),
        ("network", f"{config['network']}, {sum(t.numel() for t in state.values()):,} values"),
        ("preconditioning", config.get("precond")),
        ("noise levels", f"{config['sigma_min']:g} to {config['sigma_max']:g}"),
        ("training images", _last_part(config.get("data_dir"))),
        ("teacher", _last_part(config.get("teacher_model_path"))),
        ("trained", trained),
        ("seed", config.get("seed")),
        ("run", run.name if run else ""),
        ("weights", origin.kind if origin.kind != "file" else ""),
        ("read from", _last_part(origin.path)),
        ("its SHA-256", _hash(origin)),
    ]
    return [(name, _plain(value)) for name, value in rows if value not in (None, "")]


def _hash(origin: ModelFile) -> str:
    if Path(origin.path).is_dir() and not origin.kind.startswith("posthoc:"):
        return ""  # a folder of other code: its files have names of their own
    return origin.sha256


def _last_part(path: Any) -> str:
    """The name of a file, folder or data set: the path on the machine where it was made is nobody's affair."""
    text = str(path or "").rstrip("/\\")
    return text if re.match(r"\w+:[^/\\]", text) else re.split(r"[/\\]", text)[-1]


def _run_of(path: str) -> Run | None:
    """The run that a weights file or a checkpoint lies in."""
    for folder in list(Path(path).parents)[:3]:
        if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
            try:
                return read_run(folder)
            except UserError:  # of another version: the card then tells less
                return None
    return None


def _numbers(run: Run | None, origin: ModelFile) -> str:
    """Measurements of these weights that lie in and beside the run."""
    found = [f for f in find_results(run) if f.metrics and _same(f, origin)] if run else []
    if not found:
        return "None of these weights were found.\n"
    rows = [
        (
            f.sampler,
            str(f.nfe),
            f"{f.count:,}" if f.count else "",
            f.protocol,
            ", ".join(f"{name} {value:.4g}" for name, value in f.metrics.items()),
        )
        for f in found
    ]
    head = ("drawn by", "network evaluations", "samples", "protocol", "measured")
    return "\n".join([*markdown(head, rows), ""])


def _same(finding: Finding, origin: ModelFile) -> bool:
    step = re.search(r"step_(\d+)", origin.path)
    return bool(step) and finding.step == int(step[1]) and finding.weights in ("", origin.kind)


def _files(path: Path) -> list[tuple[str, str, str]]:
    """(name, size, hash) of everything that was written beside the card."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != README)
        names = [p.relative_to(path).as_posix() for p in files]
    else:
        files = [p for p in (path, path.with_name(f"{path.name}.data")) if p.exists()]
        names = [p.name for p in files]
    return [(n, f"{p.stat().st_size:,}", f"`{file_sha256(p)}`") for n, p in zip(names, files)]


def _code(path: Path, to: str, config: Config, name: str) -> str:
    """Python that draws four images with the export."""
    classes = config["num_classes"] if config.get("class_cond") else 0
    chosen = [i % classes for i in range(4)] if classes else []
    side, consistency = config["image_size"], _consistency(config)
    shape = f"{config.get('in_channels') or 3}, {side}, {side}"
    if to == "diffusers":
        return PIPELINE.format(
            pipeline="ConsistencyModelPipeline" if consistency else "DiffusionPipeline",
            place=name or path.name,
            more="" if consistency else ", trust_remote_code=True",
            labels=f", class_labels={chosen}" if classes else "",
            steps=1 if consistency else 18,
        )
    if to == "onnx":
        labels = f', "labels": np.array({chosen})' if classes else ""
        return ONNX.format(place=path.name, shape=shape, labels=labels)
    more = f', training_mode="{config.get("training_mode", "...")}"' if to == "legacy" else ""
    labels = f", classes={chosen}" if classes else ""
    return OURS.format(place=path.name, shape=shape, more=more, labels=labels)


def _plain(value: Any) -> str:
    """Text of a name in a file that others wrote, as one cell of a table."""
    return re.sub(r"[\s|`<>]+", " ", str(value)).strip()[:200]
