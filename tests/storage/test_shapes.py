"""Networks of which only names and shapes count."""

import subprocess
import sys

import pytest

from cm.commands.cli import parse_config
from cm.config.scripts import SampleConfig
from cm.models.factory import create_network
from cm.storage.shapes import shapes_only


@pytest.mark.parametrize("flags", ["--preset tiny", "--preset digits_sct", "--preset tiny --network ddpmpp"])
def test_names_shapes_and_types_are_those_of_the_network(flags):
    config = parse_config(SampleConfig, flags.split())
    with shapes_only():
        empty = create_network(config).state_dict()
    full = create_network(config).state_dict()
    assert [(n, t.shape, t.dtype) for n, t in empty.items()] == [
        (n, t.shape, t.dtype) for n, t in full.items()
    ]
    assert all(t.is_meta for t in empty.values())


def test_a_program_that_loads_a_model_starts_without_torchs_compiler():
    code = """
import sys
from cm.commands import cli, sample, train
from cm.config.scripts import SampleConfig
from cm.models.factory import create_network
from cm.storage.shapes import shapes_only
config = cli.parse_config(SampleConfig, ["--preset", "tiny"])
with shapes_only():
    create_network(config)
print([m for m in ("torch._dynamo", "torch.distributed.checkpoint") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
