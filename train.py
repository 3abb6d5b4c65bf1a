"""Trains an image classifier: `mimicnorm train` from a clone of the repository."""

import sys

from mimicnorm_jax.cli.train import main

sys.exit(main())
