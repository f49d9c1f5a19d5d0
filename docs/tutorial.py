"""From images to a one-step model and its pictures, in Python: python docs/tutorial.py [FOLDER [STEPS]]."""

import sys

import cm
from cm.data.images import save_grid, to_uint8
from cm.data.prepare import prepare

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/tutorial"
length = {"total_training_steps": sys.argv[2]} if len(sys.argv) > 2 else {}

# Any folder, zip, npz or IDX file of images; here scikit-learn's digits, 8 pixels wide.
prepare("digits", f"{folder}/data", image_size=8, overwrite=True)

# A teacher, then a student that needs one evaluation per image. What is not said follows from the data.
cm.train(f"{folder}/data", out_dir=f"{folder}/teacher", **length)
student = cm.train(f"{folder}/data", teacher=f"{folder}/teacher", out_dir=f"{folder}/student", **length)
print(student, student.class_names)

images = student.sample(40, classes=["3", "7"], steps=1, seed=0)  # (40, 1, 8, 8) in [-1, 1]
save_grid(f"{folder}/samples.png", to_uint8(images).numpy())

half = images[:1].new_zeros(8, 8)
half[:, 4:] = 1  # the right half is drawn anew
completed = student.edit.inpaint(images[:8], half, classes=[3, 7] * 4)
save_grid(f"{folder}/completed.png", to_uint8(completed).numpy())
