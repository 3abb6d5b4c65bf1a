"""The 1,797 digits of 8 x 8 pixels that scikit-learn carries."""

from typing import Any

import numpy as np

from mimicnorm_jax.data.specs import DatasetSpec, Split


def _read(spec: DatasetSpec, data_dir: str) -> tuple[Split, Split]:
    """1,437 digits to train, 360 to test, by class."""
    del spec, data_dir
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images = (bunch.images * 255 / 16).round().astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    parts: Any = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])


DIGITS = DatasetSpec("digits", (8, 8, 1), 10, 1437, 360, _read)
