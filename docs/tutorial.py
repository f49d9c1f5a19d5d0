"""From images to a one-step model and its pictures, in Python: python docs/tutorial.py"""

import cm
from cm.data.images import save_grid, to_uint8
from cm.data.prepare import prepare

folder, length = "runs/tutorial", {"total_training_steps": 400}  # a first look; {} leaves it to the data

# Any folder, zip, npz or IDX file of images; here scikit-learn's digits, 8 pixels wide.
prepare("digits", f"{folder}/data", image_size=8, overwrite=True)

# A teacher. What is not said follows from the data.
cm.train(f"{folder}/data", out_dir=f"{folder}/teacher", **length)

# A student that needs one evaluation per image.
student = cm.train(f"{folder}/data", teacher=f"{folder}/teacher", out_dir=f"{folder}/student", **length)
print(student, student.class_names)

# Threes and sevens: (40, 1, 8, 8) in [-1, 1].
images = student.sample(40, classes=["3", "7"], steps=1, seed=0)
save_grid(f"{folder}/samples.png", to_uint8(images), columns=10)

# Their right halves are drawn anew.
half = images[:1].new_zeros(8, 8)
half[:, 4:] = 1
completed = student.edit.inpaint(images[:20], half, classes=[3, 7] * 10)
save_grid(f"{folder}/completed.png", to_uint8(completed), columns=10)
