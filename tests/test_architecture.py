"""The house keeps its shape: imports point downward, start-up stays light, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONG

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for d in ("cm", "evaluations", "scripts") for p in (ROOT / d).rglob("*.py"))
# The packages from the ground up: each may import what stands before it, and nothing else of the project.
ORDER = ["errors", "nn", "seeding", "runtime", "config", "diffusion", "storage", "networks", "objectives"]
ORDER += ["data", "models", "sampling", "training", "commands", "tools", "evaluations", "scripts"]
HEAVY = ["piq", "mpi4py", "blobfile", "scipy", "tensorboard", "torchvision", "PIL", "sklearn", "lmdb"]


def imports(path: Path) -> list[str]:
    """Every module of this project that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.split(".")[0] in ("cm", "evaluations") and "." in name]


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "cm" else parts[0]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_packages_import_only_what_stands_before_them(path):
    """Faces (modules of cm/ that are not in ORDER) rename what is below: they may import anything, nobody them."""
    own = package_of(module_name(path) + ".")
    if own not in ORDER:
        return
    allowed = {own, *ORDER[: ORDER.index(own)]}
    assert {package_of(name) for name in imports(path)} - {"__version__"} <= allowed


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


def test_the_files_that_begin_first_are_there():
    assert all((ROOT / "tests" / name).is_file() for name in LONG)


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
        # torch.load has no limit on memory: `cm.storage.torch_format` reads its files.
        refused = ("eval", "exec", "pickle.load", "pickle.loads", "os.system", "torch.hub.load", "torch.load")
        assert called not in refused, called
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            assert (keyword.arg, value) not in (
                ("weights_only", False),
                ("allow_pickle", True),
                ("shell", True),
            )
