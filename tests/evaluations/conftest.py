"""Files and the feature network that tests of the evaluator share."""

import pytest
import torch

from evaluations.features import load_features
from tests.helpers.eval_files import write_classifier, write_npz

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reference of 70 images, samples of 50, and the classifier, as paths."""
    folder = tmp_path_factory.mktemp("eval")
    return {
        "ref": str(write_npz(folder / "ref.npz", 70)),
        "samples": str(write_npz(folder / "samples.npz", 50, seed=1)),
        "weights": str(write_classifier(folder / "classifier.pt")),
    }


@pytest.fixture(scope="module")
def network(files):
    return load_features(f"classifier={files['weights']}", "", CPU)
