"""Results to figures. The only package that imports matplotlib, and only when something is drawn.

The list has one function for each kind of figure.
"""

from mimicnorm_jax.plots.figure import Series, available
from mimicnorm_jax.plots.panels import Axes, HeatMap, heat_maps, line_panels
from mimicnorm_jax.plots.runs import along_run, bars, curves, intervals, lines, stacked_bars
from mimicnorm_jax.plots.theory import (
    activations_by_layer,
    condition_numbers,
    correlations_by_depth,
    spectra,
    transition_maps,
)

__all__ = [
    "Axes",
    "HeatMap",
    "Series",
    "activations_by_layer",
    "along_run",
    "available",
    "bars",
    "condition_numbers",
    "correlations_by_depth",
    "curves",
    "heat_maps",
    "intervals",
    "line_panels",
    "lines",
    "spectra",
    "stacked_bars",
    "transition_maps",
]
