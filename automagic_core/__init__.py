"""What the PyTorch and the JAX optimizer share and neither framework owns.  Needs numpy only."""

from automagic_core.adapter_names import LORA_NAMES, is_lora_name
from automagic_core.codebook import codebook_midpoints, dynamic_codebook
from automagic_core.config import FIELD_NAMES, PROFILES, Config, check_names
from automagic_core.decay import Decay, decay
from automagic_core.frequencies import last_kept_frequency
from automagic_core.layout import (
    Layout,
    absmax_shape,
    check_layout,
    column_axes,
    column_shape,
    picture_axes,
    polarity_shape,
    row_axis,
    row_shape,
    spatial_axes,
)
from automagic_core.memory import ArrayMemory, memory_report
from automagic_core.profiles import OptimizationProfiles
from automagic_core.random_bits import MAX_STEP, Slot, mix32, random_unit, rounding_key
from automagic_core.state_plan import StatePlan, state_plan

__all__ = [
    "FIELD_NAMES",
    "LORA_NAMES",
    "MAX_STEP",
    "PROFILES",
    "ArrayMemory",
    "Config",
    "Decay",
    "Layout",
    "OptimizationProfiles",
    "Slot",
    "StatePlan",
    "absmax_shape",
    "check_layout",
    "check_names",
    "codebook_midpoints",
    "column_axes",
    "column_shape",
    "decay",
    "dynamic_codebook",
    "is_lora_name",
    "last_kept_frequency",
    "memory_report",
    "mix32",
    "picture_axes",
    "polarity_shape",
    "random_unit",
    "rounding_key",
    "row_axis",
    "row_shape",
    "spatial_axes",
    "state_plan",
]
