"""Package description of the consistency-model framework."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "cm" / "__init__.py").read_text())[1]

setup(
    name="consistency-models",
    version=VERSION,
    description="Consistency models in PyTorch: EDM teachers, CD, CT, PD, sampling, editing, evaluation",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["cm", "cm.*", "evaluations", "evaluations.*"]),
    package_data={"evaluations": ["**/*.json", "**/*.html"]},
    install_requires=[
        "torch>=2.4",
        "mpi4py>=4",
        "numpy>=1.26",
        "piq>=0.8",
        "blobfile>=3",
        "pillow>=10.1",
        "scipy>=1.11",
        "tqdm",
    ],
    extras_require={
        "mpi": ["mpich"],
        "quickstart": ["scikit-learn"],
        "plots": ["matplotlib", "jinja2"],
        "tensorboard": ["tensorboard"],
        "lsun": ["lmdb"],
        "jax": ["msgpack"],
        "diffusers": ["diffusers", "safetensors"],
        "safetensors": ["safetensors"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "dev": ["pytest", "pytest-timeout", "ruff"],
    },
)
