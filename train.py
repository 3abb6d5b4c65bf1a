"""Trains an image classifier: `mimicnorm train` from a clone of the repository."""

import sys

from mimicnorm_jax.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
