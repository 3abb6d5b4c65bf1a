"""Pure functions of arrays, without Flax: kernels, activations, pooling."""
