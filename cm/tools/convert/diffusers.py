"""Folders of diffusers, both ways: UNet2DModel, with the scheduler of a consistency model or of an EDM teacher.

Only files are read and written; diffusers itself is not needed. Their qkv projections are three matrices; their rows
are those of ours, ({q, k, v}, head, channel), cut in three.
"""

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from cm.config.derived import is_consistency
from cm.config.rows import NETWORKS, OBJECTIVES
from cm.config.stored import checked
from cm.errors import UserError
from cm.runtime.files import draft_folder
from cm.runtime.inputs import misfit, read_json
from cm.tools.convert.layout import (
    AdmShape,
    Config,
    Layer,
    State,
    architecture,
    check_fits,
    rename,
    require_image_and_level,
    require_resblock_updown,
    with_leaves,
)
from cm.tools.convert.tensor_files import read_safetensors, write_safetensors

WEIGHTS = "diffusion_pytorch_model"
FORMAT_VERSION = "0.20.0"  # of diffusers, the first whose scheduler and U-Net have all these fields
LEVELS = ("sigma_min", "sigma_max", "sigma_data", "rho")
# The pipeline of teachers in a folder, and its source here: no module of ours, since it imports diffusers
EDM_PIPELINE, EDM_SOURCE = "pipeline.py", "edm_pipeline.txt"

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "qkv": "qkv",  # cut into to_q, to_k, to_v afterwards
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# Fields of a U-Net's configuration that have one value in every network of ours
FIXED = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": 32,
    "center_input_sample": False,
    "downsample_type": "resnet",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "upsample_type": "resnet",
}
# What diffusers takes for those of them that a file leaves out
DEFAULTS = {"attn_norm_num_groups": None, "downsample_type": "conv", "upsample_type": "conv"}


# Fields that are read, and their types (see `misfit`); those that may be null may be left out, too
UNET_FIELDS: dict[str, Any] = {
    "block_out_channels": [int],
    "down_block_types": [str],
    "up_block_types": [str],
    **dict.fromkeys(("sample_size", "in_channels", "out_channels", "layers_per_block"), int),
    **dict.fromkeys(("attention_head_dim", "num_class_embeds"), (int, None)),
    "resnet_time_scale_shift": (str, None),
}
SCHEDULER_FIELDS: dict[str, Any] = {
    "_class_name": str,
    "num_train_timesteps": int,
    **dict.fromkeys(LEVELS, float),
}


def is_folder(path: Path) -> bool:
    """Whether this is a pipeline's folder."""
    return (path / "model_index.json").is_file() and (path / "unet" / "config.json").is_file()


def prefixes(shape: AdmShape) -> dict[str, str]:
    """Our layer -> diffusers', for every layer with tensors; `qkv` is not cut yet."""
    names = dict(OUTER)
    for layer in shape.layers():
        parts = ATTENTION if layer.attention else RESIDUAL
        names |= {f"{layer.name}.{ours}": f"{_name(layer, shape)}.{theirs}" for ours, theirs in parts.items()}
    return names


def _name(layer: Layer, shape: AdmShape) -> str:
    kind = "attentions" if layer.attention else "resnets"
    if layer.place == "mid":
        return f"mid_block.{kind}.{layer.index}"
    if layer.place == "enc":
        # The step to a level belongs to the block of the finer one.
        if layer.resample:
            return f"down_blocks.{layer.level - 1}.downsamplers.0"
        return f"down_blocks.{layer.level}.{kind}.{layer.index}"
    up = shape.levels - 1 - layer.level
    return f"up_blocks.{up - 1}.upsamplers.0" if layer.resample else f"up_blocks.{up}.{kind}.{layer.index}"


def to_diffusers(state: State, config: Config, source: str = "the model") -> State:
    """Our ADM U-Net's tensors under diffusers' names."""
    require_resblock_updown(config, "diffusers' UNet2DModel")
    names = with_leaves(prefixes(AdmShape.of(config)), state)
    converted: State = {}
    for name, tensor in rename(state, names, source).items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(".qkv"):
            for part, rows in zip("qkv", tensor.chunk(3)):
                converted[f"{layer[: -len('qkv')]}to_{part}.{leaf}"] = _squeeze(rows)
        else:
            converted[name] = _squeeze(tensor) if ".to_out.0" in name else tensor
    return converted


def _squeeze(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.flatten(1).contiguous() if kernel.ndim > 1 else kernel.contiguous()


def from_diffusers(state: State, config: Config, source: str = "the folder") -> State:
    """Our state dict from a UNet2DModel's tensors and the flags of its configuration."""
    merged: State = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(".to_q"):
            parts = [state.get(f"{layer[:-1]}{part}.{leaf}") for part in "qkv"]
            if any(part is None for part in parts):
                raise UserError(f"{source} has {name}, but not the keys and values that belong to it")
            merged[f"{layer[: -len('to_q')]}qkv.{leaf}"] = _kernel(torch.cat(parts))
        elif not layer.endswith((".to_k", ".to_v")):
            merged[name] = _kernel(tensor) if ".to_out.0" in name else tensor
    theirs_to_ours = {theirs: ours for ours, theirs in prefixes(AdmShape.of(config)).items()}
    names = with_leaves(theirs_to_ours, merged)
    converted = rename(merged, names, source)
    check_fits(converted, config, source)
    return converted


def _kernel(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[..., None, None] if matrix.ndim == 2 else matrix


def unet_config(config: Config) -> dict[str, Any]:
    """The configuration of the UNet2DModel that equals our network."""
    a = architecture(config)
    attention = AdmShape.of(config).attention
    down = ["AttnDownBlock2D" if i in attention else "ResnetDownsampleBlock2D" for i in range(len(a.widths))]
    up = ["AttnUpBlock2D" if i in attention else "ResnetUpsampleBlock2D" for i in range(len(a.widths))]
    return {
        **FIXED,
        "_diffusers_version": FORMAT_VERSION,
        "attention_head_dim": _head_dim(config, a.widths),
        "block_out_channels": [int(width * a.num_channels) for width in a.widths],
        "class_embed_type": None,
        "down_block_types": down,
        "dropout": 0.0,
        "in_channels": a.in_channels,
        "layers_per_block": a.num_res_blocks,
        "num_class_embeds": a.num_classes,
        "out_channels": a.out_channels,
        "resnet_time_scale_shift": "scale_shift" if a.use_scale_shift_norm else "default",
        "sample_size": a.image_size,
        "up_block_types": up[::-1],
    }


def _head_dim(config: Config, widths: tuple[float, ...]) -> int:
    if config["num_head_channels"] > 0:
        return config["num_head_channels"]
    attended = {
        int(widths[i] * config["num_channels"]) for i in (*AdmShape.of(config).attention, len(widths) - 1)
    }
    heads = {
        config["num_heads"],
        config["num_heads"] if config["num_heads_upsample"] == -1 else config["num_heads_upsample"],
    }
    if len(attended) > 1 or len(heads) > 1:
        raise UserError(
            "diffusers' UNet2DModel has attention heads of one width: --num_head_channels is not set"
        )
    return attended.pop() // heads.pop()


def model_flags(unet: dict[str, Any], source: str) -> Config:
    """Model flags from a UNet2DModel's configuration; UserError where it is not a network of ours."""
    for name, value in FIXED.items():
        given = unet.get(name, DEFAULTS.get(name, value))
        if given != value:
            raise UserError(f"{source}: {name} is {given!r}; only {value!r} is an ADM U-Net of ours")
    widths, size = unet["block_out_channels"], unet["sample_size"]
    if min(size, *widths) < 1:
        raise UserError(f"{source}: sizes and widths must be positive")
    attention = [i for i, kind in enumerate(unet["down_block_types"]) if kind == "AttnDownBlock2D"]
    base = widths[0]
    config = {
        "network": "adm",
        "image_size": size,
        "in_channels": unet["in_channels"],
        "num_channels": base,
        "channel_mult": ",".join(f"{width / base:g}" for width in widths),
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": ",".join(str(size >> i) for i in attention),
        "num_heads": 1,
        "num_heads_upsample": -1,
        "num_head_channels": unet["attention_head_dim"] or -1,
        "class_cond": unet.get("num_class_embeds") is not None,
        "num_classes": unet.get("num_class_embeds") or 0,
        "use_scale_shift_norm": unet.get("resnet_time_scale_shift", "default") == "scale_shift",
        "resblock_updown": True,
        "learn_sigma": unet["out_channels"] == 2 * unet["in_channels"],
    }
    ours = unet_config(config)
    for name in ("down_block_types", "up_block_types"):
        if list(unet[name]) != ours[name]:
            raise UserError(f"{source}: {name} {list(unet[name])} is not an ADM U-Net of ours")
    return config


def read_folder(path: str) -> tuple[State, Config]:
    """(state dict, flags of model, objective and grid) of a pipeline's folder."""
    folder = Path(path)
    unet = _read_json(folder / "unet" / "config.json", UNET_FIELDS)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_FIELDS)
    index = _read_json(folder / "model_index.json", {"time_scale": (float, None)})
    config = model_flags(unet, f"{path}/unet/config.json") | _scheduler_flags(scheduler, index, path)
    checked(config, path)
    return from_diffusers(_read_weights(folder / "unet"), config, path), config


def _scheduler_flags(scheduler: dict[str, Any], index: dict[str, Any], path: str) -> Config:
    """Flags of objective and grid from the configurations of the scheduler and of the pipeline."""
    levels = {name: float(scheduler[name]) for name in LEVELS}
    if scheduler["_class_name"] == "EDMEulerScheduler":
        # A U-Net without a pipeline of ours is fed with the scheduler's own times.
        scale = float(index.get("time_scale") or 1.0)
        own = 0.0 if scale == NETWORKS["adm"].clock else scale
        return {**levels, "training_mode": "edm", "time_scale": own}
    if scheduler["_class_name"] != "CMStochasticIterativeScheduler":
        raise UserError(
            f"{path} has the scheduler {scheduler['_class_name']}: neither of a consistency model nor EDM's"
        )
    return {
        **levels,
        # Distillation and training give the same kind of model; the folder does not tell which it was.
        "training_mode": "consistency_training",
        "steps": scheduler["num_train_timesteps"],
    }


def _read_json(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose fields have the types of `kinds`; UserError names the first that has not."""
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    for name, kind in kinds.items():
        if name not in content and not isinstance(kind, tuple):
            raise UserError(f"{path} has no field {name}")
    empty = next((name for name in kinds if content.get(name) == []), "")
    if problem := misfit(content, kinds) or (empty and f"{empty} is empty"):
        raise UserError(f"{path}: {problem}, which no such network has")
    return content


def _read_weights(folder: Path) -> State:
    from cm.storage.weights import load_weights

    if (folder / f"{WEIGHTS}.safetensors").is_file():
        return read_safetensors(folder / f"{WEIGHTS}.safetensors")[0]
    if (folder / f"{WEIGHTS}.bin").is_file():
        return load_weights(folder / f"{WEIGHTS}.bin")[0]
    raise UserError(f"{folder} has neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin")


def write_folder(path: str, state: State, config: Config) -> None:
    """Write a folder that diffusers loads; UserError for other models.

    A consistency model is for ConsistencyModelPipeline; an EDM teacher for the EDMPipeline in the folder, with
    EDMEulerScheduler.
    """
    require_image_and_level(config, "diffusers' folder")
    consistency = is_consistency(config["training_mode"])
    scheduler, pipeline = _consistency(config) if consistency else _teacher(config)
    contents = {
        "unet/config.json": unet_config(config),
        "scheduler/scheduler_config.json": {"_diffusers_version": FORMAT_VERSION, **scheduler},
        "model_index.json": {
            "_diffusers_version": FORMAT_VERSION,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
            **pipeline,
        },
    }
    if config.get("patch_size", 1) != 1:
        raise UserError(
            f"diffusers' networks know no patches; this one has --patch_size {config['patch_size']}"
        )
    converted, target = to_diffusers(state, config), Path(path)
    if not consistency:
        contents[EDM_PIPELINE] = resources.files(__package__).joinpath(EDM_SOURCE).read_bytes()
    with draft_folder(target) as folder:
        _write_files(folder, converted, contents)
        _put_in_place(folder, target)


def _consistency(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scheduler, pipeline) of a consistency function by Eq. 5, the only kind that diffusers' scheduler knows."""
    row = OBJECTIVES[config["training_mode"]]
    if row.sampler != "onestep":
        raise UserError(f"diffusers has no pipeline for models of {config['training_mode']}")
    if config.get("time_scale") not in (None, 0, 1000):
        raise UserError("diffusers' scheduler feeds 1000 ln(sigma) / 4; this network's --time_scale differs")
    for name, only in (("boundary", "skip"), ("c_out_formula", "code"), ("precond", "edm")):
        if config.get(name, only) != only:
            raise UserError(
                f"diffusers' scheduler knows --{name} {only} only; this model has --{name} {config[name]}"
            )
    scheduler = {
        "_class_name": "CMStochasticIterativeScheduler",
        "clip_denoised": True,
        "num_train_timesteps": config["steps"],
        "s_noise": 1.0,
        **{name: config[name] for name in LEVELS},
    }
    return scheduler, {"_class_name": "ConsistencyModelPipeline"}


def _teacher(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scheduler, pipeline) of a denoiser under EDM's preconditioning."""
    if config["training_mode"] != "edm" or config.get("precond", "edm") != "edm":
        kind = f"{config['training_mode']} with --precond {config.get('precond', 'edm')}"
        raise UserError(f"--to diffusers takes consistency models and EDM's denoisers; this one is of {kind}")
    scheduler = {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sigma_schedule": "karras",
        **{name: config[name] for name in LEVELS},
    }
    time_scale = config.get("time_scale") or NETWORKS["adm"].clock
    return scheduler, {
        "_class_name": [EDM_PIPELINE.removesuffix(".py"), "EDMPipeline"],
        "time_scale": time_scale,
    }


def _write_files(folder: Path, weights: State, contents: dict[str, dict | bytes]) -> None:
    (folder / "unet").mkdir()
    (folder / "scheduler").mkdir()
    write_safetensors(folder / "unet" / f"{WEIGHTS}.safetensors", weights)
    for name, content in contents.items():
        text = content if isinstance(content, bytes) else (json.dumps(content, indent=2) + "\n").encode()
        (folder / name).write_bytes(text)


def _put_in_place(draft: Path, target: Path) -> None:
    """Rename a new folder; of one that is there already, replace the files of these names."""
    if not target.exists():
        draft.rename(target)
        return
    for file in sorted(path for path in draft.rglob("*") if path.is_file()):
        place = target / file.relative_to(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
