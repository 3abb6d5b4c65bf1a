"""Data sets by name, pipelines of batches, augmentation on the device."""

from mimicnorm_jax.data.augment import Augmentation, augment, normalize
from mimicnorm_jax.data.datasets import DATASETS, get_spec, load
from mimicnorm_jax.data.pipeline import Batch, Pipeline, ResidentPipeline
from mimicnorm_jax.data.specs import Dataset, DatasetSpec, Split

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "Dataset",
    "DatasetSpec",
    "Pipeline",
    "ResidentPipeline",
    "Split",
    "augment",
    "get_spec",
    "load",
    "normalize",
]
