"""Edit images with a consistency model: inpaint, colorize, superres, stroke, denoise, interpolate.

python scripts/image_edit.py inpaint --model_path RUN_OR_FILE --input FILE_OR_FOLDER --mask center:0.5 --num_results 4
"""

import sys

import _root  # noqa: F401

from cm.commands.cli import run_script

if __name__ == "__main__":
    # The task is written as the first word, like a sub-command.
    task = [] if len(sys.argv) < 2 or sys.argv[1].startswith("-") else ["--task", sys.argv[1]]
    run_script("image_edit", "cm.commands.edit:run_image_edit", [*task, *sys.argv[1 + bool(task) :]])
