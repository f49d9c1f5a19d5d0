"""Search for the time points of multistep sampling that minimise FID: scripts/ternary_search.py.

Samples are drawn, quantised and measured as image_sample and the evaluator do it, from the same noise for every
candidate. They stay on the rank that drew them; ranks share sums only. What has been measured is kept in
`search_memo.json`, so that a search that was stopped goes on, and no candidate is measured twice.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cm.commands.common import claimed_output
from cm.commands.sample import class_labels, sample_batches
from cm.config.derived import run_dir
from cm.config.parsing import parse_ints
from cm.config.scripts import SearchConfig, resolved
from cm.data.images import save_json
from cm.errors import UserError
from cm.models.pretrained import Pretrained, load_pretrained
from cm.runtime import distributed, logger
from cm.runtime.inputs import misfit, read_json
from cm.runtime.provenance import versions
from cm.sampling.generate import local_batches
from cm.sampling.levels import ts_to_sigmas
from cm.sampling.noise import get_generator
from cm.sampling.search import Points, coarse_to_fine_search, greedy_search, ternary_search
from cm.storage.downloads import local_copy
from evaluations.evaluator import Evaluator, Options
from evaluations.features import FeatureNetwork
from evaluations.fid import FrechetReference, bootstrap_distance
from evaluations.npz_io import open_reference
from evaluations.pipeline import extract
from evaluations.protocols import choose_protocol, measuring
from evaluations.reports.plots import Figure, Series, line_plot

FINALISTS = 3  # candidates of a coarse search that are measured with all samples
REPLICATES = 10  # of the bootstrap behind each error bar

# (ts, number of samples) -> this rank's (sample indices, uint8 images (n, H, W, C))
Sample = Callable[[Points, int], Iterator[tuple[range, np.ndarray | Tensor]]]


@dataclass(frozen=True)
class SearchRange:
    """Where a point is searched: ts = (*before, p, *after) with lo <= p <= hi."""

    before: Points
    after: Points
    lo: int
    hi: int


def parse_range(begin: str, end: str, steps: int) -> SearchRange:
    """`--begin` and `--end` as in the original: lists of the time points before and after the one that is searched.

    The search runs from the last of `begin` to the first of `end`.
    """
    before, after = (parse_ints(name, text) for name, text in (("begin", begin), ("end", end)))
    lo, hi = before[-1], after[0]
    # A single number that is no end of the grid narrows the interval and adds no time point.
    before = (0,) if len(before) == 1 else before
    after = (steps - 1,) if len(after) == 1 else after
    if before[0] != 0 or after[-1] != steps - 1:
        raise UserError(
            f"--begin {begin} must start with 0 and --end {end} end with {steps - 1}, of --steps {steps}"
        )
    if lo >= hi or list((*before, *after)) != sorted((*before, *after)):
        raise UserError(f"--begin {begin} must be smaller than --end {end}, and neither may decrease")
    if not 0 <= lo < hi < steps:
        raise UserError(
            f"--begin {begin} and --end {end} must lie on the grid 0..{steps - 1} of --steps {steps}"
        )
    return SearchRange(before, after, lo, hi)


@dataclass(frozen=True)
class Score:
    """FID of one candidate and its standard error."""

    fid: float
    std: float


class Memo:
    """Scores on disk by (everything that decides them, ts, number of samples). Rank 0 reads and writes."""

    def __init__(self, path: Path, conditions: dict[str, Any]):
        self.path = path
        text = json.dumps(conditions, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._content: dict[str, Any] = {}
        if distributed.is_main() and path.exists():
            try:
                self._content = read_json(path)
                known = self._content.get(self._key, {"scores": {}})["scores"]
                if misfit(list(known.values()), [{f.name: float for f in fields(Score)}]):
                    raise TypeError
                self._scores = {k: Score(**v) for k, v in known.items()}
            except (UserError, TypeError, KeyError, AttributeError):
                raise UserError(f"{path}: not a file of search scores; delete or rename it") from None
        else:
            self._scores = {}
        self._conditions = conditions

    def get(self, ts: Points, num_samples: int) -> Score | None:
        """The score if it is known, on every rank."""
        return distributed.broadcast_object(self._scores.get(_name(ts, num_samples)))

    def put(self, ts: Points, num_samples: int, score: Score) -> None:
        """Keep a score; on disk at once."""
        if distributed.is_main():
            self._scores[_name(ts, num_samples)] = score
            scores = {k: asdict(v) for k, v in self._scores.items()}
            self._content[self._key] = {"conditions": self._conditions, "scores": scores}
            save_json(self.path, self._content)


def _name(ts: Points, num_samples: int) -> str:
    return f"{_comma(ts)} of {num_samples}"


def _comma(ts: Points) -> str:
    return ",".join(map(str, ts))


class Scorer:
    """FID of samples drawn with given time points, measured once. Collective; every rank gets rank 0's numbers."""

    def __init__(self, sample: Sample, network: FeatureNetwork, reference: FrechetReference, memo: Memo):
        self._sample, self._network, self._reference, self._memo = sample, network, reference, memo

    def __call__(self, ts: Points, num_samples: int) -> Score:
        score = self._memo.get(ts, num_samples)
        origin = "known"
        if score is None:
            score, origin = self._measure(ts, num_samples), "measured"
            self._memo.put(ts, num_samples, score)
        logger.log(
            f"ts {_comma(ts)}: FID {score.fid:.4f} ± {score.std:.4f}, {num_samples:,} samples ({origin})"
        )
        return score

    def _measure(self, ts: Points, num_samples: int) -> Score:
        batches = self._sample(ts, num_samples)
        found = extract(
            batches, self._network, kinds=["pool"], keep=True, source=f"samples with --ts {_comma(ts)}"
        )
        fid = self._reference.distance(*found.gaussian("pool"))
        spread = bootstrap_distance(
            found.pool, found.rows, num_samples, self._reference, fid, replicates=REPLICATES
        )
        return distributed.broadcast_object(Score(fid, spread.std))


@dataclass(frozen=True)
class Candidate:
    """One evaluation of the search: the point p tried as number `order`, and what came out."""

    order: int
    p: int
    ts: Points
    num_samples: int
    score: Score


def search_points(
    scorer: Callable[[Points, int], Score],
    span: SearchRange,
    *,
    num_samples: int,
    points: int = 1,
    coarse: int = 0,
) -> tuple[Points, list[Candidate]]:
    """(the best ts, all candidates in the order of evaluation).

    points: how many time points are searched, one after the other, each from the one before it on. coarse: samples
    per candidate of a first search, whose best candidates are then measured with `num_samples`; 0 for none.
    """
    trace: list[Candidate] = []

    def search(candidate: Callable[[int], Points], lo: int, hi: int) -> int:
        def fid(p: int, count: int) -> float:
            ts = (*span.before, *candidate(p), *span.after)
            score = scorer(ts, count)
            trace.append(Candidate(len(candidate(p)), p, ts, count, score))
            return score.fid

        full = partial(fid, count=num_samples)
        if coarse:
            return coarse_to_fine_search(partial(fid, count=coarse), full, lo, hi, FINALISTS)
        return ternary_search(full, lo, hi)

    found = greedy_search(search, [(span.lo, span.hi)] * points)
    return (*span.before, *found, *span.after), trace


def run_search(config: SearchConfig) -> dict[str, Any]:
    """The whole search as configured; writes memo, result and plot to the run directory. Collective."""
    distributed.setup_dist(timeout=60 * config.startup_timeout)
    reference = open_reference(str(local_copy(config.ref_batch, flag="--ref_batch")))
    asked_for = config.protocol if "protocol" in config.explicit else ""
    protocol, strict = choose_protocol(asked_for, config.features, reference)
    model = load_pretrained(config)
    model = replace(model, config=replace(model.config, sampler="multistep"))
    c = model.config
    span = parse_range(c.begin, c.end, c.steps)
    if reference.images and reference.images.shape[1] != c.image_size:
        size = reference.images.shape[1]
        raise UserError(
            f"--ref_batch {reference.path} has {size}-px images, the model draws {c.image_size}-px images"
        )
    network, protocol = measuring(c.features, protocol, strict, reference, model.device)
    network.check((1, c.image_size, c.image_size, c.in_channels or 3), "the model's samples")
    options = Options(protocol, ("fid",), c.batch_size)
    evaluator = Evaluator(reference, network, options)
    directory = Path(run_dir(config))
    with claimed_output(
        directory, ["search.png", "search_result.json"], overwrite=True, kept=["search_memo.json"]
    ):
        conditions = _conditions(model, reference.sha256(), network)
        memo = Memo(directory / "search_memo.json", conditions)
        scorer = Scorer(_sampler(model), network, evaluator.frechet["pool"], memo)
        counts = {"num_samples": c.num_samples, "points": c.points, "coarse": c.coarse}
        ts, trace = search_points(scorer, span, **counts)
        result = _result(model, ts, trace) | {
            "conditions": conditions,
            "protocol": protocol.name,
            "config": resolved(c),
        }
        if distributed.is_main():
            save_json(directory / "search_result.json", result)
            try:
                plot_search(directory / "search.png", trace)
            except UserError as error:  # without matplotlib the numbers are there all the same
                logger.warn(f"no plot: {error}")
            logger.log(_report(result, directory))
    return result


def _sampler(model: Pretrained[SearchConfig]) -> Sample:
    c = model.config

    def sample(ts: Points, num_samples: int) -> Iterator[tuple[range, Tensor]]:
        sigmas = ts_to_sigmas(ts, c.steps, c.sigma_min, c.sigma_max, c.rho)
        # A new generator for each candidate: the same noise for all of them.
        generator = get_generator(c.generator, num_samples=num_samples, seed=c.seed)
        return local_batches(
            sample_batches(model, generator, sigmas),
            num_samples=num_samples,
            batch_size=c.batch_size,
            generator=generator,
            labels=class_labels(c),
            rank=distributed.get_rank(),
            world_size=distributed.get_world_size(),
        )

    return sample


def _conditions(
    model: Pretrained[SearchConfig], reference_sha256: str, network: FeatureNetwork
) -> dict[str, Any]:
    """Everything besides ts and the number of samples that decides a score."""
    names = (
        "seed",
        "generator",
        "clip_denoised",
        "classes",
        "class_cond",
        "steps",
        "sigma_min",
        "sigma_max",
        "rho",
    )
    flags = {name: getattr(model.config, name) for name in (*names, "precision", "use_fp16", "training_mode")}
    hashes = {"model_sha256": model.file.sha256, "reference_sha256": reference_sha256}
    return {**flags, **hashes, "features": network.name, "features_sha256": network.sha256}


def _result(model: Pretrained[SearchConfig], ts: Points, trace: list[Candidate]) -> dict[str, Any]:
    c = model.config
    score = next(t.score for t in trace if t.ts == ts and t.num_samples == c.num_samples)
    return {
        "ts": list(ts),
        "sigmas": ts_to_sigmas(ts, c.steps, c.sigma_min, c.sigma_max, c.rho).tolist(),
        "nfe": len(ts) - 1,
        "fid": score.fid,
        "std": score.std,
        "num_samples": c.num_samples,
        "candidates": [asdict(t) for t in trace],
        **model.provenance(),
        "versions": versions(),
    }


def _report(result: dict[str, Any], directory: Path) -> str:
    sigmas = ", ".join(f"{s:.4g}" for s in result["sigmas"])
    return "\n".join(
        [
            f"best: FID {result['fid']:.4f} ± {result['std']:.4f} with {result['num_samples']:,} samples",
            f"noise levels {sigmas}: {result['nfe']} network evaluations",
            f"flags: --sampler multistep --steps {result['config']['steps']} --ts {_comma(tuple(result['ts']))}",
            f"result: {directory / 'search_result.json'}",
        ]
    )


def plot_search(path: Path, trace: list[Candidate]) -> Figure:
    """FID against the time point; one line per searched point and number of samples."""
    groups: dict[tuple[int, int], dict[int, Score]] = {}
    for t in trace:
        groups.setdefault((t.order, t.num_samples), {})[t.p] = t.score
    several = max(order for order, _ in groups) > 1
    series = [
        Series(
            f"point {order}, {count:,} samples" if several else f"{count:,} samples",
            list(scores),
            [s.fid for s in scores.values()],
            [s.std for s in scores.values()],
        )
        for (order, count), scores in groups.items()
    ]
    title = "FID of multistep samples against the time point"
    return line_plot(path, series, title=title, x_label="grid index (0 = sigma_max)", y_label="FID")
