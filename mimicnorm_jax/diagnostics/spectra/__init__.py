"""Eigenvalues, singular values and densities from matrix-vector products."""
