"""How many images a second a core of this machine decodes."""

import time
from io import BytesIO

import numpy as np
from PIL import Image

from mimicnorm_jax.data.streaming.decoding import Cut, cut_generator, decode

SIDES = (500, 375)
"""Width and height of the file that is decoded: about what ImageNet's are on average."""
QUALITY = 90


def photograph(seed: int = 0) -> bytes:
    """A JPEG of about 80 KB: noise that falls off with its frequency."""
    rng = np.random.default_rng(seed)
    total = np.full((SIDES[1], SIDES[0], 3), 128.0)
    for cells, contrast in ((4, 50), (16, 40), (64, 30), (250, 45)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += contrast * (np.asarray(noise.resize(SIDES, Image.Resampling.BILINEAR)) / 127.5 - 1)
    buffer = BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def decoding_rate(cut: Cut, seconds: float = 0.5) -> float:
    """Images a second that one thread of this process decodes, measured for so many seconds of its time."""
    data, count, started = photograph(), 0, time.thread_time()
    while (elapsed := time.thread_time() - started) < seconds:
        decode(data, cut, cut_generator(0, 0, count))
        count += 1
    return count / elapsed
