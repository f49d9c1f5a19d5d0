"""Package description of the consistency-model framework."""

import re
from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "quickstart": ["scikit-learn"],
    "plots": ["matplotlib", "jinja2"],
    "demo": ["gradio>=6"],
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "lsun": ["lmdb"],
    "jax": ["msgpack"],
    "diffusers": ["diffusers", "safetensors"],
    "safetensors": ["safetensors"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "hub": ["huggingface_hub"],
    "datasets": ["torchvision", "datasets"],
    "timm": ["timm"],
    "yaml": ["pyyaml"],
    "completion": ["shtab"],
}
ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "cm" / "__init__.py").read_text())[1]

setup(
    name="consistency-models",
    version=VERSION,
    description="Consistency models in PyTorch: EDM teachers, CD, CT, PD, sampling, editing, evaluation",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    url="https://arxiv.org/abs/2303.01469",
    project_urls={"Paper": "https://arxiv.org/abs/2303.01469"},
    license="MIT",
    keywords="consistency models, diffusion models, generative models, distillation, PyTorch",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["cm", "cm.*", "evaluations", "evaluations.*"]),
    package_data={"cm": ["py.typed", "**/*.txt"], "evaluations": ["py.typed", "**/*.json", "**/*.html"]},
    entry_points={"console_scripts": ["cm=cm.commands.main:main"]},
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
        **EXTRAS,
        # Everything but an MPI library, which a cluster has its own of, and what only developers need.
        "all": sorted({package for packages in EXTRAS.values() for package in packages}),
        "mpi": ["mpich"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff"],
    },
)
