"""The paper's recipe on ImageNet (90 epochs), streamed from imagenet2012 as TFDS prepares it, in bfloat16.

python train.py --config=configs/imagenet.py:resnet50_imagenet,mimicnorm --config.data_dir=DIR

No run of it has been made with this code: what the paper reports stands in docs/training.md.
"""

from ml_collections import ConfigDict

from mimicnorm_jax.training import config


def get_config(argument: str = "") -> ConfigDict:
    """The config for `--config=configs/imagenet.py[:MODEL[,METHOD]]`."""
    fields = config.base(
        dataset="imagenet2012",
        model="resnet50_imagenet",
        dtype="bfloat16",
        batch_size=256,
        epochs=90,
        learning_rate=0.1,
        warmup_epochs=2.0,
        schedule="step",
        decay_epochs=(30, 60, 85),
        weight_decay=1e-4,
        min_crop_area=0.08,
        flip=True,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        max_bad_images=10,
    )
    return config.with_model(fields, argument)
