"""The data set that a config names: what is known of it, and its images."""

from dataclasses import replace

from mimicnorm_jax.data import Dataset, DatasetSpec, StreamedDataset, datasets
from mimicnorm_jax.data.streaming import BadImages
from mimicnorm_jax.errors import ConfigError, DataError
from mimicnorm_jax.training.config import TrainConfig


def dataset_of(config: TrainConfig) -> DatasetSpec:
    """What is known of a config's data set before it is read.

    Raises:
      DataError: if it is unknown.
    """
    return datasets.get_spec(config.dataset, config.data_dir, config.image_size)


def is_streamed(config: TrainConfig, spec: DatasetSpec) -> bool:
    """Whether images are decoded as they are needed, and not kept on every device."""
    return config.streaming or spec.read is None


def check_dataset(config: TrainConfig, spec: DatasetSpec) -> None:
    """Raises ConfigError for fields that ask of the data set what it does not have."""
    if config.streaming and spec.open is None:
        raise ConfigError(f"config.streaming is set, but {config.dataset} is only read into memory: leave it out")
    if config.min_crop_area and not is_streamed(config, spec):
        raise ConfigError(
            f"config.min_crop_area is {config.min_crop_area}, but {config.dataset} is kept on the devices, where "
            "images are not cut to size: add --config.streaming, or use config.crop_padding"
        )
    for field in ("mean", "std"):
        if len(values := getattr(config, field)) not in (0, spec.image_shape[-1]):
            raise ConfigError(
                f"config.{field} has {len(values)} numbers, and images of {config.dataset} {spec.image_shape[-1]} "
                "channels: give one a channel, or none to have them measured"
            )


def read_dataset(config: TrainConfig, bad: BadImages | None = None) -> Dataset | StreamedDataset:
    """Reads the images, or opens them to be streamed; with the config's mean and standard deviation, or measured ones.

    Args:
      config: of the run.
      bad: counts images that cannot be used; by default the first one is an error.

    Raises:
      DataError: if the data is not prepared, or damaged; for a channel whose measured deviation is 0.
    """
    spec = dataset_of(config)
    if is_streamed(config, spec):
        moments = (config.mean, config.std)
        dataset = datasets.open_streams(spec, config.data_dir, bad or BadImages(0), moments)
    else:
        dataset = datasets.load(config.dataset, config.data_dir)
        dataset = replace(dataset, mean=config.mean or dataset.mean, std=config.std or dataset.std)
    if not all(dataset.std):
        raise DataError(
            f"channel {dataset.std.index(0)} is the same in all pixels of {config.dataset} that were measured, so that "
            f"its deviation is 0: say what to divide by, as in --config.std={(0.25,) * len(dataset.std)}"
        )
    return dataset
