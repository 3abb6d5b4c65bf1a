"""Trains an image classifier: `mimicnorm train` from a clone of the repository."""

from mimicnorm_jax.cli.train import main

if __name__ == "__main__":
    main()
