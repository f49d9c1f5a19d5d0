"""Draw images from a model: an npz of uint8 images and labels, a PNG grid, and what they were drawn with.

python scripts/image_sample.py --model_path RUN_OR_FILE --num_samples 64
"""

import _root  # noqa: F401

from cm.commands.cli import run_script

if __name__ == "__main__":
    run_script("image_sample", "cm.commands.sample:run_image_sample")
