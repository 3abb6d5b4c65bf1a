"""The paper's recipe on CIFAR-100 (150 epochs; its ResNet-50 rows use batch_size=128).

python train.py --config=configs/cifar100.py:resnet18,mimicnorm --config.data_dir=DIR
"""

from ml_collections import ConfigDict

from mimicnorm_jax import training


def get_config(argument: str = "") -> ConfigDict:
    """The config for `--config=configs/cifar100.py[:MODEL[,METHOD]]`."""
    fields = training.base(
        dataset="cifar100",
        model="resnet18",
        batch_size=256,
        epochs=150,
        learning_rate=0.1,
        warmup_epochs=2.0,
        schedule="step",
        decay_epochs=(80, 110, 135),
        weight_decay=5e-4,
        crop_padding=4,
        flip=True,
        rotation=15.0,
    )
    return training.with_model(fields, argument)
