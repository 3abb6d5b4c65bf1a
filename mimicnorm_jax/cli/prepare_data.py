"""Downloads a dataset and prepares it once, in the format that reading without TensorFlow needs.

python -m mimicnorm_jax prepare-data cifar100 [--data_dir=DIR]
"""

import argparse
import importlib.util
import sys

from mimicnorm_jax.data.datasets import TFDS_NAMES, tfds_dir


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="mimicnorm prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=TFDS_NAMES)
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    arguments = parser.parse_args()
    folder = tfds_dir(arguments.data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        sys.exit("Preparing a download needs TensorFlow, once: pip install tensorflow-cpu. Reading does not.")
    import tensorflow_datasets as tfds

    builder = tfds.builder(arguments.name, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    print(f"{arguments.name} is ready in {builder.data_dir}")
