"""FID, sFID, Inception Score, precision, recall, KID and class accuracy of samples against a reference.

    cm evaluate REF SAMPLES [SAMPLES ...]
    cm evaluate REF runs/teacher runs/student --seeds 3

REF: an npz of images (`arr_0` uint8, N x H x W x C), of statistics (`mu, sigma, mu_s, sigma_s`, the reference batches
of guided-diffusion), or both; or a folder or zip of images. SAMPLES: images likewise, or a model: a run, a checkpoint
or a file of weights, which draws --num_samples images of --seeds seeds first (flags of `cm sample`, such as
--sampler heun --steps 18, may follow). Several are compared in one table, seeds of one model by mean and range.
Runs in one process or under mpiexec or torchrun.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cm.commands.common import claimed_output
from cm.config import plugins
from cm.config.parsing import at_least, expanded
from cm.config.rows import METRICS
from cm.data.images import save_json
from cm.errors import UserError, choose
from cm.models.factory import choose_device
from cm.runtime import distributed, job
from cm.runtime.provenance import versions
from cm.storage.downloads import local_copy
from evaluations.comparison import compare, comparison_table
from evaluations.drawn import MOST, is_model, sample_files
from evaluations.features import FeatureNetwork, add_feature_flags, current_name, feature_spec
from evaluations.fid import FrechetReference
from evaluations.metrics import Measured
from evaluations.npz_io import ImageSet, Reference, default_json, open_images, open_reference
from evaluations.pipeline import Extracted, extract, gather_rows, image_batches
from evaluations.protocols import PROTOCOLS, Protocol, choose_protocol, measuring, mismatches

_LACKS = {"spatial": "spatial statistics (mu_s, sigma_s)", "images": "images (arr_0)"}


@dataclass(frozen=True)
class Options:
    """How to measure. bootstrap: replicates of an interval of the FID, 0 for none. seed: of bootstrap and KID."""

    protocol: Protocol
    metrics: tuple[str, ...]
    batch_size: int = 64
    bootstrap: int = 0
    seed: int = 0


class Evaluator:
    """One reference, prepared once, and any number of sets of samples. Methods are collective over ranks."""

    def __init__(self, reference: Reference, network: FeatureNetwork, options: Options):
        self.reference, self.network, self.options = reference, network, options
        self.missing: dict[str, str] = {}  # metric -> why it cannot be had
        wanted = [m for m in options.metrics if self._is_possible(m)]
        self.metrics = wanted
        needs = {METRICS[m].needs for m in wanted}
        self.kinds = [kind for kind in ("pool", "spatial") if kind in needs]
        gaussians = {k: pair for k, pair in reference.statistics.items() if k in self.kinds}
        self.pool: Tensor | None = None
        from_images = [kind for kind in self.kinds if kind not in gaussians]
        if from_images or "images" in needs:
            extracted = self._extract(
                reference.images, from_images, keep="images" in needs, title="reference"
            )
            gaussians |= {kind: extracted.gaussian(kind) for kind in from_images}
            if extracted.pool is not None:
                self.pool = gather_rows(extracted.pool)
        self.frechet = {k: self._frechet_reference(k, *pair) for k, pair in gaussians.items()}

    def _is_possible(self, metric: str) -> bool:
        need, lacks, known = METRICS[metric].needs, "", self.reference.statistics
        # Images beside statistics are only a part of the set.
        whole = bool(self.reference.images) and (need != "spatial" or "pool" not in known)
        if need == "spatial" and "spatial" not in self.network.dims:
            lacks = f"{self.network.name} has no spatial features"
        elif need in _LACKS and need not in known and not whole:
            lacks = f"{self.reference.path} has no {_LACKS[need]}"
        elif metric == "inception_score" and not len(self.network.classifier):
            lacks = f"{self.network.name} has no classes"
        elif METRICS[metric].labels and not self.network.classes:
            lacks = f"{self.network.name} does not know the samples' classes"
        if lacks:
            self.missing[metric] = lacks
        return not lacks

    def _frechet_reference(self, kind: str, mu, sigma) -> FrechetReference:
        if len(mu) != self.network.dims[kind]:
            raise UserError(
                f"{self.reference.path}: {kind} statistics have {len(mu)} dimensions, "
                f"{self.network.name} gives {self.network.dims[kind]}"
            )
        return FrechetReference(mu, sigma, self.network.classifier.device)

    def _extract(self, images: ImageSet, kinds: list[str], keep: bool, title: str) -> Extracted:
        self.network.check(images.shape, images.path)
        batches = image_batches(images, self.options.batch_size, title)
        return extract(batches, self.network, kinds=kinds, keep=keep, source=images.path)

    def measure(self, samples: ImageSet) -> dict[str, Any]:
        """Values, intervals and what could not be measured; complete on rank 0 and the same on all ranks."""
        unlabelled = [m for m in self.metrics if METRICS[m].labels and samples.labels is None]
        missing = self.missing | {m: f"{samples.path} has no labels (arr_1)" for m in unlabelled}
        metrics = [m for m in self.metrics if m not in missing]
        at_once = [m for m in metrics if not METRICS[m].collective]
        keep = bool(self.options.bootstrap or at_once)
        extracted = self._extract(samples, self.kinds, keep, "samples")
        measured = Measured(samples, extracted, self.frechet, self.network, self.options)
        found = {m: METRICS.load(m)(measured) for m in metrics if METRICS[m].collective}
        pool = gather_rows(extracted.pool) if keep else None
        error = None
        if distributed.is_main() and at_once:
            measured.pool = pool.to(self.network.classifier.device)
            measured.reference = None if self.pool is None else self.pool.to(measured.pool.device)
            try:
                found |= {m: METRICS.load(m)(measured) for m in at_once}
            except ValueError as problem:  # such as too few samples; the other ranks wait for an answer
                error = f"{samples.path}: {problem}"
        found, error = distributed.broadcast_object((found, error))
        if error:
            raise UserError(error)
        pairs = {m: v if isinstance(v, tuple) else (v, None) for m, v in found.items()}
        titles = {m: METRICS[m].title_in(self.network.name) for m in pairs}
        if wrong := [titles[m] for m, (value, _) in pairs.items() if not math.isfinite(value)]:
            raise UserError(
                f"{samples.path}: {', '.join(wrong)} against {self.reference.path} is no finite number: "
                "the statistics overflow"
            )
        return {
            "metrics": {m: pairs[m][0] for m in METRICS if m in pairs},
            "intervals": {m: interval for m, (_, interval) in pairs.items() if interval is not None},
            "not_measured": missing,
        }


def evaluate(
    reference: Reference,
    samples: list[ImageSet],
    network: FeatureNetwork,
    options: Options,
    *,
    strict: bool = True,
    force: bool = False,
    seeds: int = 0,
) -> dict[str, Any]:
    """Measure each set of samples; the result is plain JSON with its provenance. Collective.

    seeds: so many sets in turn are seeds of one model; 0: as their metadata say. `models` has the means; of one model,
    `metrics` and `summary` have them, too.

    UserError when reference and samples do not follow one protocol, unless `force`; then the reasons are notes.
    """
    checks = [mismatches(options.protocol, reference, s, network, strict) for s in samples]
    errors = [e for found, _ in checks for e in found]
    if errors and not force:
        raise UserError(f"{errors[0]}; --force True measures anyway")
    for images in samples:  # before the reference, whose features may take long
        network.check(images.shape, images.path)
    evaluator = Evaluator(reference, network, options)
    runs = []
    for images, (found, notes) in zip(samples, checks):
        run = evaluator.measure(images) | {"samples": _describe_images(images)}
        runs.append(run | {"comparable": not (found or notes), "notes": [*found, *notes]})
    result: dict[str, Any] = {
        "protocol": options.protocol.describe(),
        "features": {"name": network.name, "sha256": network.sha256, "transform": network.transform},
        "reference": {"path": reference.path, "sha256": _on_main(reference.sha256), "meta": reference.meta}
        | {"images": reference.images.shape[0] if reference.images else 0},
        "options": {"batch_size": options.batch_size, "bootstrap": options.bootstrap, "seed": options.seed},
        "versions": versions(),
    }
    if len(runs) == 1:
        return runs[0] | result
    models = compare(runs, seeds)
    of_one = {name: models[0][name] for name in ("metrics", "summary")} if len(models) == 1 else {}
    return of_one | {"models": models, "runs": runs} | result


def _describe_images(images: ImageSet) -> dict[str, Any]:
    return {
        "path": images.path,
        "count": images.shape[0],
        "shape": list(images.shape[1:]),
        "sha256": _on_main(images.sha256),
        "meta": images.meta,
    }


def _on_main(compute: Callable[[], str]) -> str:
    return distributed.broadcast_object(compute() if distributed.is_main() else "")


def table(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    network = result["features"]["name"]
    lines = [f"protocol {result['protocol']['name']}, features {network}"]
    lines[0] += f" {result['features']['sha256'][:12]}, reference {result['reference']['path']}"
    for run in result.get("runs", [result]):
        lines += ["", f"{run['samples']['path']}: {run['samples']['count']:,} images"]
        for name, value in run["metrics"].items():
            title, digits = METRICS[name].title_in(network), METRICS[name].digits
            extra = ""
            if interval := run["intervals"].get(name):
                extra = f"  ± {interval['std']:.{digits}f}"
                extra += (
                    f"  95 % [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
                    if "low" in interval
                    else ""
                )
            lines.append(f"  {title:<16}{value:>12.{digits}f}{extra}")
        missing = {METRICS[name].title_in(network): why for name, why in run["not_measured"].items()}
        lines += [f"  {title:<16}{'-':>12}  {why}" for title, why in missing.items()]
        lines += [f"  note: {note}" for note in run["notes"]]
    if "models" in result:
        lines += ["", *comparison_table(result["models"], network)]
    return "\n".join(lines)


def parse_metrics(text: str, protocol: Protocol) -> tuple[str, ...]:
    """The metrics of a comma-separated list; "" for the protocol's, "all" for every one."""
    names = list(METRICS) if text == "all" else [n.strip() for n in text.split(",") if n.strip()]
    for name in names:
        choose(METRICS, name, "--metrics")
    return tuple(names) or protocol.metrics


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags but the positional ones."""
    parser.add_argument(
        "--protocol",
        default="",
        type=current_name,
        choices=("", *PROTOCOLS),
        help="named protocol; a mismatch is an error",
    )
    parser.add_argument("--metrics", default="", help="comma-separated, or all; empty: the protocol's")
    parser.add_argument("--plugin", default="", help="modules of your own with further metrics, as a list")
    parser.add_argument(
        "--bootstrap", type=at_least(0), default=0, help="replicates for a 95 %% interval of the FID; 0: none"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of bootstrap and KID subsets")
    parser.add_argument(
        "--seeds",
        type=at_least(0),
        default=0,
        help="seeds drawn of each model; of files, so many in turn are of one model; 0: as the files say",
    )
    parser.add_argument(
        "--num_samples",
        type=at_least(0),
        default=0,
        help="images drawn of a model; 0: the protocol's number, else at most 1000",
    )
    parser.add_argument("--force", nargs="?", const="True", default="False", choices=("True", "False"))
    parser.add_argument("--out", type=expanded, default="", help="result JSON; empty: beside the samples")
    add_feature_flags(parser)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("reference", metavar="REF", type=expanded)
    parser.add_argument("samples", metavar="SAMPLES", type=expanded, nargs="+")
    add_flags(parser)
    args, args.sampling = parser.parse_known_args()
    if args.sampling and not any(map(is_model, args.samples)):
        parser.error(f"{args.sampling[0]}: unknown flag (flags of cm sample go with a model)")
    plugins.load(args.plugin)
    distributed.setup_dist()
    if args.bootstrap == 1:
        raise UserError("--bootstrap 1: give 0 or at least 2 replicates")
    out = Path(args.out or default_json(args.samples[0], args.reference))
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file")
    with claimed_output(out.parent, [out.name], overwrite=True, flag="--out"):
        measure(args, out)


def to_measure(args: argparse.Namespace, reference: Reference, protocol: Protocol | None) -> list[str]:
    """Files of images for all SAMPLES, drawn where they are models. Collective."""
    count = args.num_samples or (protocol.num_samples if protocol else 0)
    if not count:
        count = min(MOST, reference.images.shape[0]) if reference.images else MOST
    return [
        file for path in args.samples for file in sample_files(path, count, max(args.seeds, 1), args.sampling)
    ]


def measure(args: argparse.Namespace, out: Path) -> None:
    """Evaluate as the flags say; rank 0 prints the table and writes the result to `out`."""
    reference = open_reference(str(local_copy(args.reference, flag="REF")))
    spec = feature_spec(args)
    protocol, strict = choose_protocol(args.protocol, spec, reference)
    device = choose_device(args.device)
    parse_metrics(args.metrics, protocol)  # a mistake is known before anything is trained or drawn
    network, protocol = measuring(spec, protocol, strict, reference, device, sha256=args.weights_sha256)
    drawn = any(map(is_model, args.samples))
    paths = to_measure(args, reference, protocol if strict else None)
    samples = [open_images(str(local_copy(path, flag="SAMPLES"))) for path in paths]
    metrics = parse_metrics(args.metrics, protocol)
    options = Options(protocol, metrics, args.batch_size, args.bootstrap, args.seed)
    seeds = 0 if drawn else args.seeds  # what was drawn says which seeds belong together
    result = evaluate(
        reference, samples, network, options, strict=strict, force=args.force == "True", seeds=seeds
    )
    if distributed.is_main():
        print(table(result), flush=True)
        save_json(out, result)
        print(f"\nresult: {out}", flush=True)


if __name__ == "__main__":
    job.run_main(main)
