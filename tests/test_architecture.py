"""The house keeps its shape: imports point downward, start-up stays light, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for d in ("cm", "evaluations", "scripts") for p in (ROOT / d).rglob("*.py"))
# Higher layers may import lower ones and their own. A module that is not listed belongs to the machinery.
LAYERS = [
    # mathematics: functions and frozen dataclasses
    {
        "errors", "cores", "parsing", "rules", "nn", "schedules", "precond", "weightings", "random_util", "mersenne",
        "lpips", "distances", "augment", "attention", "forward_mode", "dist_util", "launch", "blob", "memory",
        "noise_schedules", "alpha_sigma", "sde",
    },
    # networks
    {"unet", "networks", "denoiser", "classifier_net"},
    # algorithms
    {"objectives", "resample", "samplers", "guidance", "likelihood", "editing", "masks", "search"},
]  # fmt: skip
FACADES = {"karras_diffusion", "script_util", "train_util", "image_datasets"}
HEAVY = ["piq", "mpi4py", "blobfile", "scipy", "tensorboard", "torchvision", "PIL", "sklearn", "lmdb"]


def layer_of(module: str) -> int:
    name = module.split(".")[1] if module.count(".") else ""
    return next((k for k, names in enumerate(LAYERS) if name in names), len(LAYERS))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top level) of every import of this project."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [
                node.module,
                *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "cm"),
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name, node in tree.body) for name in names if name.split(".")[0] in ("cm", "evaluations")]
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] != "scripts"], ids=module_name)
def test_imports_point_downward(path):
    own = module_name(path)
    for name, top_level in imports(path):
        if own.startswith("cm."):
            assert not name.startswith("evaluations"), f"{own} imports {name}"
            if own.split(".")[1] not in FACADES:
                assert not (set(name.split(".")[1:2]) & FACADES), f"{own} imports the facade {name}"
            if top_level and name.count("."):
                assert layer_of(name) <= layer_of(own), f"{own} imports {name}, which lies above it"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_stay_small(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 450, f"{len(lines)} lines"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno + 1 - docstring.count("\n")
            assert length <= 65, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_are_thin(path):
    tree = ast.parse(path.read_text())
    code = [
        line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) - (ast.get_docstring(tree) or "").count("\n") <= 60


def test_importing_the_library_loads_nothing_heavy():
    modules = [module_name(p) for p in SOURCES if p.parts[-2] != "scripts" and p.name != "__main__.py"]
    modules = [m for m in modules if m.startswith("cm")]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_flags_and_presets_need_no_torch():
    code = "import cm.commands.cli, cm.config.presets, cm.config.derived, sys; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_unpickles_evaluates_or_shells_out(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system", "torch.hub.load"), (
            called
        )
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            assert (keyword.arg, value) not in (
                ("weights_only", False),
                ("allow_pickle", True),
                ("shell", True),
            )
        if called == "torch.load":
            assert any(k.arg == "weights_only" for k in node.keywords)
