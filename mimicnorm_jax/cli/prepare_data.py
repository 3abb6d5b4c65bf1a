"""Downloads a dataset and prepares it once, in the format that reading without TensorFlow needs; or writes a folder of
images, DIR/train/CLASS/FILE and DIR/val/CLASS/FILE, into few large files. Either goes on where it stopped.

mimicnorm prepare-data cifar100 [--data_dir=DIR]
mimicnorm prepare-data folder:DIR --out=RECORDS    then train with --config.dataset=records:RECORDS"""

import argparse
import importlib.util
import sys
from pathlib import Path

from mimicnorm_jax.data import records
from mimicnorm_jax.data.tfds import tfds_dir
from mimicnorm_jax.errors import DataError, UserError
from mimicnorm_jax.utils.console import log_line

FOLDER = "folder:"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    parser = argparse.ArgumentParser(
        prog="mimicnorm prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="a data set of TFDS, such as cifar100, or folder:DIR")
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--out", type=Path, help="of folder:DIR: the folder that gets the records")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.name.startswith(FOLDER):
        if arguments.out is None:
            raise DataError(f"{arguments.name} is written into records: say where with --out=DIR")
        if arguments.data_dir:
            raise UserError(f"--data_dir={arguments.data_dir} is of data sets of TFDS: leave it out")
        records.write(Path(arguments.name.removeprefix(FOLDER)).expanduser(), arguments.out)
        log_line(f"ready: train with --config.dataset=records:{arguments.out} --config.image_size=224")
        return 0
    if arguments.out is not None:
        raise UserError(f"--out={arguments.out} is of folder:DIR: say where {arguments.name} goes with --data_dir=DIR")
    folder = tfds_dir(arguments.data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError("preparing needs TensorFlow, once (pip install tensorflow-cpu); reading does not")
    import tensorflow_datasets as tfds

    builder = tfds.builder(arguments.name, data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    log_line(f"{arguments.name} is ready in {builder.data_dir}")
    return 0
