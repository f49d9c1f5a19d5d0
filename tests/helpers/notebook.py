"""A program as a notebook with its outputs; docs/tutorial.ipynb is written by: python -m tests.helpers.notebook

A cell is a block between empty lines; comments that begin it become text. What a cell prints and the value of its last
expression are its outputs, as in Jupyter.
"""

import ast
import base64
import contextlib
import io
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.py"


def cells_of(source: str) -> list[dict[str, Any]]:
    """The cells of a program without outputs; the first line of its docstring is the first text."""
    docstring = ast.parse(source).body[0]
    rest = "\n".join(source.split("\n")[docstring.end_lineno :])
    found = []
    for block in [f"# {docstring.value.value.splitlines()[0]}", *rest.strip().split("\n\n")]:
        lines = block.split("\n")
        comments = [*itertools.takewhile(lambda line: line.startswith("#"), lines)]
        text = [line.removeprefix("# ") for line in comments]
        code = lines[len(comments) :]
        if text:
            found.append({"cell_type": "markdown", "metadata": {}, "source": _lines("\n".join(text))})
        if code:
            found.append(
                {
                    "cell_type": "code",
                    "metadata": {},
                    "source": _lines("\n".join(code)),
                    "execution_count": None,
                    "outputs": [],
                }
            )
    return [{"id": f"cell-{i}", **cell} for i, cell in enumerate(found)]


def notebook_of(source: str) -> dict[str, Any]:
    """The program, run in the working directory, as nbformat 4.5."""
    cells, names, count = cells_of(source), {}, 0
    for cell in cells:
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
            cell["outputs"] = _run("".join(cell["source"]), names, count)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _run(code: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The outputs of one cell: what it prints, and what its last expression is."""
    tree, value = ast.parse(code), None
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(last, "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": _shown(value)}
        )
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if not isinstance(value, Image.Image):
        return {"text/plain": _lines(repr(value))}
    png = io.BytesIO()
    value.quantize(64).save(png, format="PNG", optimize=True)
    return {
        "image/png": base64.b64encode(png.getvalue()).decode(),
        "text/plain": [f"<PIL.Image.Image size={value.width}x{value.height}>"],
    }


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        made = notebook_of(TUTORIAL.read_text())
    TUTORIAL.with_suffix(".ipynb").write_text(json.dumps(made, indent=1) + "\n")
