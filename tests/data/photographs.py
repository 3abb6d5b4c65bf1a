"""Small data sets of real photographs: regions of the two that scikit-learn carries, as JPEG files."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


@lru_cache(maxsize=1)
def photographs() -> tuple[np.ndarray, ...]:
    """`(427, 640, 3)` uint8."""
    return tuple(np.asarray(image) for image in load_sample_images().images)


def write_folder(root: Path, classes: int, train: int, test: int, seed: int = 0) -> Path:
    """A folder of so many images a class; a class is a vertical strip of one of the photographs."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            picture = photographs()[label % 2]
            height, width = rng.integers(40, 90, (2, count))
            strip = 640 * (label // 2) // -(-classes // 2)
            folder = root / split / f"class{label:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                top = rng.integers(427 - height[i])
                left = min(strip + int(rng.integers(30)), 640 - width[i])
                part = picture[top : top + height[i], left : left + width[i]]
                Image.fromarray(part).save(folder / f"{i:03}.jpg", quality=90)
    return root
