"""Images decoded as they are needed, by threads, ahead of the devices."""

from mimicnorm_jax.data.specs import Encoded, ImageSource
from mimicnorm_jax.data.streaming.bad_images import BadImages
from mimicnorm_jax.data.streaming.decoding import BadImageError, Cut, decode
from mimicnorm_jax.data.streaming.pipeline import StreamingPipeline

__all__ = [
    "BadImageError",
    "BadImages",
    "Cut",
    "Encoded",
    "ImageSource",
    "StreamingPipeline",
    "decode",
]
