"""Results to figures. The only package that imports matplotlib, and only when something is drawn."""

from mimicnorm_jax.plots.figure import Series, available
from mimicnorm_jax.plots.runs import Rows, along_run, bars, curves, intervals, lines, stacked_bars
from mimicnorm_jax.plots.theory import (
    activations_by_layer,
    condition_numbers,
    correlations_by_depth,
    spectra,
    transition_maps,
)

__all__ = [
    "Rows",
    "Series",
    "activations_by_layer",
    "along_run",
    "available",
    "bars",
    "condition_numbers",
    "correlations_by_depth",
    "curves",
    "intervals",
    "lines",
    "spectra",
    "stacked_bars",
    "transition_maps",
]
