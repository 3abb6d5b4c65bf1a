"""`python -m mimicnorm_jax`, the same as `mimicnorm`."""

import sys

from mimicnorm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
