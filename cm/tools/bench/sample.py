"""Sampling and editing: images per second through the scripts' own code, with random weights."""

import torch

from cm.commands.sample import CallCounter, class_labels, noise_levels, sample_batches, solver_options
from cm.config.derived import precision
from cm.config.scripts import SampleConfig
from cm.networks.precision import torso_dtype
from cm.sampling.generate import local_batches
from cm.sampling.noise import get_generator
from cm.tools.bench.editing import edit_cost
from cm.tools.bench.noise import noise_rows
from cm.tools.bench.runs import Options, description, random_model, sample_config
from cm.tools.profiling.flops import network_cost
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import interleaved, peak_memory, product_ceiling

# Samplers of --preset tiny: case -> flags; a preset's own sampler otherwise
CONSISTENCY = ("--training_mode", "consistency_distillation", "--steps", "40")
TINY_CASES = {
    "onestep": (*CONSISTENCY, "--sampler", "onestep"),
    "multistep": (*CONSISTENCY, "--sampler", "multistep", "--ts", "0,22,39"),
    "heun": ("--training_mode", "edm", "--sampler", "heun", "--steps", "10"),
}


def bench_sample(options: Options) -> list[Row]:
    """A row per sampler of --preset tiny, or one for another preset; and rows of the noise, which is case "noise".

    The images become uint8 on the host.
    """
    samplers = tuple(TINY_CASES) if options.preset == "tiny" else (options.preset,)
    rows = []
    for case in options.chosen((*samplers, "noise")):
        if case == "noise":
            rows += noise_rows(options)
        else:
            rows.append(sample_row(case, sample_config(options, TINY_CASES.get(case, ())), options))
    return rows


def sample_row(case: str, config: SampleConfig, options: Options) -> Row:
    """The row of one sampler: batches of --batch_size images."""
    model = random_model(config)
    generator = get_generator(config.generator, num_samples=config.num_samples, seed=config.seed)
    counter = CallCounter()
    draw = sample_batches(model, generator, noise_levels(config), counter, solver_options(model))
    labels = class_labels(config)

    def batch() -> None:
        size = config.batch_size
        for _ in local_batches(draw, num_samples=size, batch_size=size, generator=generator, labels=labels):
            pass

    device = model.device
    timing = interleaved({"batch": batch}, device, warmup=options.warmup, repeats=options.repeats)["batch"]
    flops = counter.per_batch * network_cost(config).forward * config.batch_size
    ceiling = product_ceiling(device, torso_dtype(precision(config)))
    figures = {
        **timing.summary(),
        "images_per_second": config.batch_size / timing.median,
        "evaluations": counter.per_batch,
        "peak_memory_mib": peak_memory(batch, device) / 2**20,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": flops / timing.undisturbed(device) / ceiling,
    }
    return Row(f"sample/{case}", description(config), figures)


def bench_edit(options: Options) -> list[Row]:
    """A row per editing operator: its projection, and its share of the network evaluation that it follows."""
    config = sample_config(options, TINY_CASES["onestep"] if options.preset == "tiny" else ())
    model = random_model(config)
    labels = class_labels(config)
    y = None if labels is None else labels(range(config.batch_size))
    side, channels = config.image_size, config.in_channels
    images = torch.rand(config.batch_size, channels, side, side, device=model.device) * 2 - 1
    cost = edit_cost(model.denoise(y, clip=False), images, repeats=options.repeats)
    return [
        Row(
            f"edit/{name}",
            description(config),
            {
                **timing.summary(),
                "network_ms": 1e3 * cost.network.median,
                "share_of_network": cost.share(name),
            },
        )
        for name, timing in cost.operators.items()
    ]
