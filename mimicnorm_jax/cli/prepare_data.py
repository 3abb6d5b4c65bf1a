"""Downloads a dataset and prepares it once, in the format that reading without TensorFlow needs.

mimicnorm prepare-data cifar100 [--data_dir=DIR]"""

import argparse
import importlib.util
import sys

from mimicnorm_jax.data.tfds import CIFAR10, CIFAR100, tfds_dir


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    parser = argparse.ArgumentParser(
        prog="mimicnorm prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[CIFAR10.name, CIFAR100.name])
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    arguments = parser.parse_args(argv)
    folder = tfds_dir(arguments.data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        print("error: preparing needs TensorFlow, once (pip install tensorflow-cpu); reading does not", file=sys.stderr)
        return 2
    import tensorflow_datasets as tfds

    builder = tfds.builder(arguments.name, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    print(f"{arguments.name} is ready in {builder.data_dir}")
    return 0
