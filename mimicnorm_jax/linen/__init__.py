"""Flax linen layers over `functional`."""
