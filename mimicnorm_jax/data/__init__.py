"""Data sets by name, pipelines of batches, augmentation on the device.

What is particular to images that are decoded as they are needed stands in `data.streaming`.
"""

from mimicnorm_jax.data.augment import Augmentation, augment, normalize
from mimicnorm_jax.data.batching import BatchLayout
from mimicnorm_jax.data.datasets import DATASETS, get_spec, load, open_streams, require_prepared
from mimicnorm_jax.data.pipeline import Batch, Pipeline, ResidentPipeline
from mimicnorm_jax.data.specs import Dataset, DatasetSpec, Split, StreamedDataset

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "BatchLayout",
    "Dataset",
    "DatasetSpec",
    "Pipeline",
    "ResidentPipeline",
    "Split",
    "StreamedDataset",
    "augment",
    "get_spec",
    "load",
    "normalize",
    "open_streams",
    "require_prepared",
]
