"""Images and teachers that the tests of the commands share, made once for each file."""

import numpy as np
import pytest
from PIL import Image

from cm.config.scripts import EdmTrainConfig
from tests.helpers.small_runs import train


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two classes of images that are not square and must be resized."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (9, 11), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def teachers(data_dir, tmp_path_factory):
    """One run per column, made when it is asked for."""
    made = {}

    def teacher(column):
        if column not in made:
            out = tmp_path_factory.mktemp(column)
            extra = ["--precond", column, "--class_cond", "False", "--preview_count", "0"]
            made[column] = train(EdmTrainConfig, data_dir, out, *extra)
        return made[column]

    return teacher
