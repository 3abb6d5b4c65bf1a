"""Image files to arrays of one size, cut as in training on ImageNet and in evaluation."""

import math
from dataclasses import dataclass
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageOps

EVAL_SHARE = 0.875
"""Side of the middle square that evaluation looks at, as a share of the image's shorter side: 224 of 256 pixels."""
GAP = 2.0
"""How many pixels a side a JPEG is decoded with for each that is asked for, at least, as in Pillow's own thumbnails."""
TRIES = 10
RATIOS = (3 / 4, 4 / 3)
Box = tuple[float, float, float, float]
"""Left, upper, right and lower bound, in pixels."""
_ORIENTATION = 0x0112  # The EXIF tag.


class BadImageError(Exception):
    """An image cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Cut:
    """Which part of an image is looked at.

    Attributes:
      size: side of the square result.
      min_area: smallest share of the area that a random cut has (Szegedy et al. 2015; its aspect ratio is between 3/4
        and 4/3); 0 for the middle.
    """

    size: int
    min_area: float = 0.0

    def box(self, width: int, height: int, rng: Random | None) -> Box:
        """The part of an image of that size; random if there is a smallest area and a generator.

        Args:
          width, height: of the image, in pixels.
          rng: of a random cut; None for the middle.
        """
        if self.min_area and rng is not None:
            return _random_box(width, height, self.min_area, rng)
        if width == height == self.size:
            return (0, 0, width, height)
        side = min(width, height) * EVAL_SHARE
        left, upper = (width - side) / 2, (height - side) / 2
        return (left, upper, left + side, upper + side)


def cut_generator(seed: int, epoch: int, index: int) -> Random:
    """What the random cut of an image in an epoch is drawn from; made in a third of the time that NumPy's take."""
    return Random(seed << 64 | epoch << 32 | index)


def _random_box(width: int, height: int, min_area: float, rng: Random) -> Box:
    for _ in range(TRIES):
        area = width * height * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = (int(rng.random() * (side + 1)) for side in (width - w, height - h))
            return (left, upper, left + w, upper + h)
    w, h = min(width, height * RATIOS[1]), min(height, width / RATIOS[0])
    left, upper = (width - w) / 2, (height - h) / 2
    return (left, upper, left + w, upper + h)


def decode(data: bytes, cut: Cut, rng: Random | None = None) -> np.ndarray:
    """Decodes an image file, turned as its EXIF orientation says, without its transparency.

    A JPEG is decoded at an eighth, a quarter or half of its size where that leaves `GAP` times the pixels a side that
    are asked for. An image that has the size already, and is not cut at random, is returned as it is; any other is
    resampled bilinearly with the filter's support scaled (antialiased).

    Args:
      data: bytes of a file of any format that Pillow reads.
      cut: what of it.
      rng: of a random cut.

    Returns:
      `(size, size, 3)` uint8.

    Raises:
      BadImageError: for what is no image, is cut short, has no pixels, or pixels that are no colors.
      MemoryError: says nothing of the image.
    """
    try:
        image: Any = Image.open(BytesIO(data))
        # Other formats have no wider integers than 16 bits, which Pillow gives as 32.
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise BadImageError(f"its pixels are 32-bit numbers (mode {image.mode!r}) of unknown range")
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        width, height = image.size
        box = cut.box(width, height, rng)
        scale = cut.size / min(box[2] - box[0], box[3] - box[1])
        if image.format == "JPEG":
            image.draft(None, (math.ceil(width * scale * GAP), math.ceil(height * scale * GAP)))
        image = _rgb(image)
        if (reduced := image.size) != (width, height):
            factors = (reduced[0] / width, reduced[1] / height) * 2
            box = tuple(min(edge * f, side) for edge, f, side in zip(box, factors, reduced * 2, strict=True))
        if box == (0, 0, cut.size, cut.size) == (0, 0, *image.size):
            return np.asarray(image)
        return np.asarray(image.resize((cut.size, cut.size), Image.Resampling.BILINEAR, box=box))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they like on damaged files
        raise BadImageError(str(error) or type(error).__name__) from error


def _rgb(image: Any) -> Any:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts off at 255.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    # Pillow would copy an image that has the mode already.
    return image if image.mode == "RGB" else image.convert("RGB")
