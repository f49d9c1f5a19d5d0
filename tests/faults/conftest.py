"""Inputs of the programs, made once."""

import pytest

from cm.runtime import logger
from tests.helpers.programs import make_inputs


@pytest.fixture(scope="session")
def program_inputs(tmp_path_factory):
    """What `tests.helpers.programs.PROGRAMS` read; tests leave it as it is."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    logger.reset()
    return folder
