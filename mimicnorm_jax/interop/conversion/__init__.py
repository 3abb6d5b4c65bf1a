"""Networks of other code under MimicNorm: one call converts, a report says what was done."""

from mimicnorm_jax.interop.conversion.convert import layer_report, mimic
from mimicnorm_jax.interop.conversion.from_linen import Mimic
from mimicnorm_jax.interop.conversion.initial import rescale_init
from mimicnorm_jax.interop.conversion.records import Layer, LayerRecord, Report, Select

__all__ = ["Layer", "LayerRecord", "Mimic", "Report", "Select", "layer_report", "mimic", "rescale_init"]
