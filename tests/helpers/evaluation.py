"""How tests evaluate: all metrics, few images at a time, by the small classifier's protocol."""

import torch

from cm.config.rows import METRICS
from evaluations.evaluator import Options, evaluate
from evaluations.npz_io import open_images, open_reference
from evaluations.protocols import PROTOCOLS

CPU = torch.device("cpu")
DIGITS = PROTOCOLS["classifier"]
ALL = Options(DIGITS, tuple(METRICS), batch_size=16, bootstrap=4)


def measure(files, network, options=ALL, **kwargs) -> dict:
    return evaluate(open_reference(files["ref"]), [open_images(files["samples"])], network, options, **kwargs)
