"""Sampling and editing: images per second through the scripts' own code, with random weights; noise alone.

What an edit costs beside the network: the operators of Algorithm 4 against one network evaluation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cm.commands.sample import CallCounter, class_labels, noise_levels, sample_batches, solver_options
from cm.config.choices import PRECISIONS
from cm.config.derived import precision
from cm.config.scripts import SampleConfig
from cm.sampling.editing import LinearEdit, colorize, inpaint, superres
from cm.sampling.generate import local_batches
from cm.sampling.noise import get_generator
from cm.tools.bench.peers import peer_batches
from cm.tools.bench.runs import Options, description, random_model, sample_config
from cm.tools.planning.step import call_trace
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing, beside_peers, interleaved, peak_memory, product_ceiling, timed

# Samplers of --preset tiny: case -> flags; a preset's own sampler otherwise
CONSISTENCY = ("--training_mode", "consistency_distillation", "--steps", "40")
TINY_CASES = {
    "onestep": (*CONSISTENCY, "--sampler", "onestep"),
    "multistep": (*CONSISTENCY, "--sampler", "multistep", "--ts", "0,22,39"),
    "heun": ("--training_mode", "edm", "--sampler", "heun", "--steps", "10"),
}
COMPARED = ("onestep", "heun")  # with the loops of others
# Noise: shape of a draw, --num_samples, --generator
NOISE_SHAPE = (16, 3, 64, 64)
NOISE_COUNTS = (1_000, 1_000_000)
NOISE_KINDS = ("determ", "indexed", "determ-indiv")


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
    peers, left_out = {}, {}
    if case in COMPARED:
        peers, left_out = peer_batches(model.denoiser, config)
    timings = interleaved({"cm": batch, **peers}, device, warmup=options.warmup, repeats=options.repeats)
    timing = timings["cm"]
    peers.clear()
    flops = counter.per_batch * call_trace(config, config.batch_size)[0].flops
    ceiling = product_ceiling(device, PRECISIONS.load(precision(config)))
    figures = {
        **(beside_peers(timings) if len(timings) > 1 else timing.summary()),
        **({"left_out": left_out} if left_out else {}),
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
    network, operators = edit_cost(model.denoise(y, clip=False), images, repeats=options.repeats)
    whole = network.median
    return [
        Row(
            f"edit/{name}",
            description(config),
            {**timing.summary(), "network_ms": 1e3 * whole, "share_of_network": timing.median / whole},
        )
        for name, timing in operators.items()
    ]


def edit_cost(
    denoiser: Callable[[Tensor, Tensor], Tensor], images: Tensor, *, factor: int = 8, repeats: int = 5
) -> tuple[Timing, dict[str, Timing]]:
    """Times per batch: of denoiser(x, sigma), and of each operator's projection, which follows it.

    images (B, C, H, W) with sides that `factor` divides; colourisation is measured for 3 channels.
    """
    known = (torch.arange(images.shape[-1], device=images.device) < images.shape[-1] // 2).float()
    edits: dict[str, LinearEdit] = {"inpaint": inpaint(known), "superres": superres(factor)}
    if images.shape[1] == 3:
        edits["colorize"] = colorize()
    noise = torch.randn_like(images)
    sigma = torch.ones(len(images), device=images.device)
    projections = {name: lambda e=edit: e.project(images, noise) for name, edit in edits.items()}
    with torch.no_grad():
        evaluation = {"network": lambda: denoiser(noise, sigma)}
        network = interleaved(evaluation, images.device, warmup=1, repeats=repeats)["network"]
        return network, interleaved(projections, images.device, warmup=1, repeats=4 * repeats)


def noise_rows(options: Options) -> list[Row]:
    """A row per generator and --num_samples: two draws, as of two steps, for 16 samples from about the 500th on.

    On the CPU. Every call begins at another sample, so that none finds what an earlier one has prepared.
    """
    timings = {(kind, count): Timing() for kind in NOISE_KINDS for count in NOISE_COUNTS}
    for k in range(-1, options.repeats):
        for (kind, count), timing in timings.items():
            generator = get_generator(kind, num_samples=count, seed=0)
            generator.set_done_samples(
                NOISE_COUNTS[0] // 2 + len(NOISE_COUNTS) * k + NOISE_COUNTS.index(count)
            )
            with timed(timing if k >= 0 else Timing(), torch.device("cpu")):
                generator.randn(*NOISE_SHAPE)
                generator.randn(*NOISE_SHAPE)
    smallest = {kind: timings[kind, NOISE_COUNTS[0]].cpu_median for kind in NOISE_KINDS}
    return [
        Row(
            f"noise/{kind}_{count}",
            {"shape": list(NOISE_SHAPE), "generator": kind, "num_samples": count},
            {
                **timing.summary(),
                "images_per_second": NOISE_SHAPE[0] / timing.median,
                "ratio_to_fewest": timing.cpu_median / smallest[kind],
            },
        )
        for (kind, count), timing in timings.items()
    ]
