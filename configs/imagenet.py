"""The paper's recipe on ImageNet (90 epochs), streamed from imagenet2012 as TFDS prepares it, in bfloat16.

python train.py --config=configs/imagenet.py:resnet50,mimicnorm --config.data_dir=DIR

A network that has a form for ImageNet is meant in that form: resnet50 is resnet50_imagenet.

No run of it has been made with this code. The paper reports, in top-1 % under BatchNorm and MimicNorm: ResNet-18 69.76
and 70.15, ResNet-50 76.48 and 76.84, ResNet-101 77.37 and 77.52, VGG-16 73.89 and 73.31, ShuffleNetV2 x0.5 59.77 and
58.31.
"""

from ml_collections import ConfigDict

from mimicnorm_jax import models, training


def get_config(argument: str = "") -> ConfigDict:
    """The config for `--config=configs/imagenet.py[:MODEL[,METHOD]]`."""
    fields = training.base(
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
    fields = training.with_model(fields, argument)
    if (form := f"{fields.model}_imagenet") in models.ARCHITECTURES:
        fields.model = form
    return fields
