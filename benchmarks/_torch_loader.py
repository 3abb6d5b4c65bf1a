"""What a user of PyTorch would run: a DataLoader of worker processes that decode, cut and resample with Pillow.

Imports no package of ours, so that it runs in an environment of its own: `python _torch_loader.py FOLDER SIZE BATCH
WORKERS SECONDS` prints images a second as JSON.
"""

import json
import math
import os
import random
import sys
import time
from typing import Any


def cut(image: Any, size: int) -> Any:
    """A random part of 8 to 100 % of the area, resampled; as torchvision's RandomResizedCrop does it."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return image.resize((size, size), 2, box=(left, top, left + w, top + h))
    return image.resize((size, size), 2)


def main() -> None:
    import numpy as np
    import torch  # type: ignore[import-not-found]
    from PIL import Image

    folder, *numbers = sys.argv[1:]
    size, batch, workers, seconds = (int(number) for number in numbers)
    files = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> Any:
            with Image.open(files[index * 7919 % len(files)]) as image:
                return torch.from_numpy(np.array(cut(image.convert("RGB"), size)))

    loader = torch.utils.data.DataLoader(Files(), batch_size=batch, num_workers=workers)
    count, started = 0, 0.0
    for i, images in enumerate(loader):
        if i == 4 * workers:  # workers have started, and what lay ready is gone
            started = time.perf_counter()
        elif i > 4 * workers:
            count += len(images)
            if time.perf_counter() - started > seconds:
                break
    print(json.dumps({"images_per_second": count / (time.perf_counter() - started)}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
