"""Table and picture of a digits run: class accuracy and Fréchet distance of its sample sets, by network evaluations.

    python -m evaluations.reports.digits_report RUN

RUN is the folder of scripts/quickstart.sh or evaluations.reports.learning_proof: data/, classifier.pt,
samples/<name>/samples_*.npz with their metadata.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cm.data.images import save_json
from cm.errors import UserError
from cm.runtime import job
from cm.runtime.inputs import read_json
from cm.storage.filesystem import open_npz
from evaluations.evaluator import Evaluator, Options
from evaluations.features import load_features
from evaluations.npz_io import open_images, open_reference
from evaluations.protocols import PROTOCOLS
from evaluations.reports.plots import Block, image_page

# Sample set -> what it is called in the table; sets that are absent are left out
TITLES = {
    "edm_heun18": "EDM teacher, Heun, 18 steps",
    "edm_heun2": "EDM teacher, Heun, 2 steps",
    "edm_onestep": "EDM teacher, one step",
    "cd_onestep": "CD, one step",
    "cd_twostep": "CD, two steps",
    "ct_onestep": "CT, one step",
    "ct_twostep": "CT, two steps",
    "pd_onestep": "PD, one step",
    "cont_edm_heun18": "EDM teacher with a slow clock, Heun, 18 steps",
    "cont_edm_onestep": "EDM teacher with a slow clock, one step",
    "cont_cd_onestep": "continuous CD, one step",
    "cont_cd_twostep": "continuous CD, two steps",
    "cont_ct_onestep": "continuous CT, one step",
    "cont_ct_twostep": "continuous CT, two steps",
    **{
        f"{name.lower()}_{way}step": f"{name}, {way} step{'s' * (way == 'two')}"
        for name in ("iCT", "ECT", "TCM", "sCT", "sCD")
        for way in ("one", "two")
    },
}
PICTURE_ROWS, PICTURE_COLUMNS = 2, 20
METRICS = ("accuracy", "fid")


@dataclass(frozen=True)
class Row:
    """One sample set: title, network evaluations, images, metrics, and where samples and model lie."""

    title: str
    nfe: int
    images: int
    metrics: dict[str, float]
    samples: str = ""
    model_path: str = ""


def measure(run: Path, titles: Mapping[str, str] = TITLES) -> list[Row]:
    """Metrics of the sample sets of a digits run; titles: what they are called."""
    protocol = PROTOCOLS["classifier"]
    features = load_features(f"classifier={run / 'classifier.pt'}", protocol.features, torch.device("cpu"))
    reference = open_reference(str(run / "data"))
    evaluator = Evaluator(reference, features, Options(protocol=protocol, metrics=METRICS))
    rows = []
    for name, title in titles.items():
        found = sorted((run / "samples" / name).glob("samples_*.npz"))
        if found:
            metadata = read_json(found[-1].with_suffix(".json"))
            images = open_images(str(found[-1]))
            metrics = evaluator.measure(images)["metrics"]
            model_path = metadata.get("model_path", "")
            rows.append(Row(title, metadata["nfe"], images.shape[0], metrics, str(found[-1]), model_path))
    if not rows:
        raise UserError(f"{run}/samples holds none of {', '.join(titles)}")
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| samples | network evaluations | read as their class | Fréchet distance |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.title} | {r.nfe} | {r.metrics['accuracy']:.1%} | {r.metrics['fid']:.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def picture(run: Path) -> list[Block]:
    """The first samples of every set under their titles, all from the same noise and labels."""
    blocks = []
    for name, title in TITLES.items():
        for path in sorted((run / "samples" / name).glob("samples_*.npz"))[-1:]:
            with open_npz(path) as arrays:
                images = arrays["arr_0"][: PICTURE_COLUMNS * PICTURE_ROWS]
            columns = min(PICTURE_COLUMNS, len(images))
            rows = len(images) // columns
            blocks.append(Block(title, [images[: rows * columns].reshape(rows, columns, *images.shape[1:])]))
    return blocks


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the quick start")
    run = parser.parse_args().run
    rows = measure(run)
    (run / "report.md").write_text(table(rows))
    facts = {
        r.title: {key: getattr(r, key) for key in ("nfe", "images", "samples", "model_path")} for r in rows
    }
    save_json(run / "report.json", {r.title: facts[r.title] | r.metrics for r in rows})
    image_page(run / "report.png", picture(run))


if __name__ == "__main__":
    job.run_main(main)
