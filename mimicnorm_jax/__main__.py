"""`python -m mimicnorm_jax`, the same as `mimicnorm`."""

from mimicnorm_jax.cli import main

if __name__ == "__main__":
    main()
