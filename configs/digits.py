"""A small MimicNorm ResNet on scikit-learn's bundled digits: trains anywhere, needs no network.

python train.py
"""

from ml_collections import ConfigDict

from mimicnorm_jax import training


def get_config(argument: str = "") -> ConfigDict:
    """The config for `--config=configs/digits.py[:MODEL[,METHOD]]`."""
    fields = training.base(
        dataset="digits",
        model="resnet8",
        batch_size=64,
        epochs=30,
        learning_rate=0.1,
        warmup_epochs=2.0,
        schedule="cosine",
        crop_padding=1,
        rotation=10.0,
    )
    return training.with_model(fields, argument)
