"""Edit images with a consistency model: inpaint, colorize, superres, stroke, denoise, interpolate.

python scripts/image_edit.py inpaint --model_path RUN_OR_FILE --input FILE_OR_FOLDER --mask center:0.5 --num_results 4
"""

import sys

import _root  # noqa: F401

from cm.commands.cli import run_script
from cm.config.scripts import EditConfig


def edit(config: EditConfig) -> None:
    """torch is imported here, after --help has been answered."""
    from cm.commands.edit import run_image_edit

    run_image_edit(config)


if __name__ == "__main__":
    # The task is written as the first word, like a sub-command.
    task = [] if len(sys.argv) < 2 or sys.argv[1].startswith("-") else ["--task", sys.argv[1]]
    run_script(EditConfig, edit, [*task, *sys.argv[1 + bool(task) :]])
