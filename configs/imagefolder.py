"""A folder of your own, DIR/train/CLASS/FILE and DIR/val/CLASS/FILE; classes are found, mean and deviation measured.

python train.py --config=configs/imagefolder.py:resnet18_imagenet --config.dataset=folder:DIR
"""

from ml_collections import ConfigDict

from mimicnorm_jax import training


def get_config(argument: str = "") -> ConfigDict:
    """The config for `--config=configs/imagefolder.py[:MODEL[,METHOD]]`."""
    fields = training.base(
        dataset="folder:.",
        image_size=224,
        model="resnet18_imagenet",
        dtype="bfloat16",
        batch_size=128,
        epochs=90,
        learning_rate=0.05,
        schedule="cosine",
        weight_decay=1e-4,
        min_crop_area=0.08,
        flip=True,
    )
    return training.with_model(fields, argument)
