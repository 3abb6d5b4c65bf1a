"""Data sets by name, pipelines of batches, augmentation on the device."""

from mimicnorm_jax.data.augment import Augmentation, augment, normalize
from mimicnorm_jax.data.bad_images import BadImages
from mimicnorm_jax.data.datasets import DATASETS, first_test_images, first_test_labels, get_spec, load, open_streams
from mimicnorm_jax.data.decoding import BadImageError, Cut, decode
from mimicnorm_jax.data.pipeline import Batch, Pipeline, ResidentPipeline
from mimicnorm_jax.data.specs import Dataset, DatasetSpec, Encoded, ImageSource, Split, StreamedDataset
from mimicnorm_jax.data.streaming import StreamingPipeline

__all__ = [
    "DATASETS",
    "Augmentation",
    "BadImageError",
    "BadImages",
    "Batch",
    "Cut",
    "Dataset",
    "DatasetSpec",
    "Encoded",
    "ImageSource",
    "Pipeline",
    "ResidentPipeline",
    "Split",
    "StreamedDataset",
    "StreamingPipeline",
    "augment",
    "decode",
    "first_test_images",
    "first_test_labels",
    "get_spec",
    "load",
    "normalize",
    "open_streams",
]
