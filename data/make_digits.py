"""Writes data/train and data/eval: the UCI handwritten digits as PNG files in class folders, 80/20, split by class.

    uv run data/make_digits.py

The 1,797 scans (8x8 pixels, 17 grey levels) ship with scikit-learn, which is in the dev group. See data/README.md.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

here = Path(__file__).parent
images, labels = load_digits(return_X_y=True)
split = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
for name, indices in zip(("train", "eval"), split):
    for i in indices:
        folder = here / name / str(labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.round(images[i].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png", optimize=True)
    print(f"{here / name}: {len(indices)} images")
